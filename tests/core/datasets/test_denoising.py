"""Denoisers: their flags, and how many tokens go where."""

import re
from pathlib import Path

import pytest

from megatron.core.config import DataConfig
from megatron.core.datasets.denoising import (
    UL2_DENOISERS,
    Denoiser,
    DenoisingPlan,
    SpanLengths,
    denoisers_of,
    mode_tokenizer,
)
from megatron.core.errors import UserError
from megatron.core.tokenizers import BertWordPieceCase, ByteTokenizer

# Inputs, density, mean span; raw tokens, inputs, targets, noise, spans of Google's `random_spans_helper`.
GOOGLE = [
    (512, 0.15, 3.0, (568, 512, 114, 85, 28)),
    (512, 0.15, 8.0, (588, 512, 100, 88, 11)),
    (512, 0.5, 3.0, (766, 512, 512, 383, 128)),
    (512, 0.5, 8.0, (908, 512, 512, 454, 57)),
    (512, 0.15, 64.0, (600, 512, 92, 90, 1)),
    (512, 0.5, 64.0, (1006, 512, 512, 503, 8)),
    (256, 0.15, 3.0, (284, 256, 58, 43, 14)),
    (128, 0.15, 3.0, (141, 128, 29, 21, 7)),
    (1024, 0.15, 3.0, (1137, 1024, 229, 171, 57)),
    (2048, 0.15, 3.0, (2274, 2048, 456, 341, 114)),
]


def no_modes(mode: str) -> tuple[int, ...]:
    return ()


@pytest.mark.parametrize(("length", "density", "mean", "expected"), GOOGLE)
def test_windows_are_those_of_google(length: int, density: float, mean: float, expected: tuple[int, ...]) -> None:
    assert Denoiser("", mean, density).window(length) == SpanLengths(*expected)


@pytest.mark.parametrize("mode", [(), (5,), (5, 6, 7)])
def test_a_window_is_the_largest_that_fits_with_its_mode(mode: tuple[int, ...]) -> None:
    kinds = [(3.0, 0.15), (8.0, 0.5), (2.0, 0.5), (64.0, 0.5), (None, 0.25), (None, None)]
    for mean, density in kinds:
        denoiser = Denoiser("", mean, density, mode_ids=mode)
        for length in range(16, 70):
            window = denoiser.window(length)
            largest = max(raw for raw in range(2, 2 * length + 9) if denoiser.lengths(raw).inputs <= length)
            assert window.raw == largest or (density == 0.5 and window.raw == largest - 1)
            assert length - 1 <= window.inputs <= length
            if density is not None:
                assert window.inputs + window.targets == window.raw + len(mode) + 2 * window.num_spans + 2
                assert window.num_spans <= window.noise_tokens and window.num_spans <= window.raw - window.noise_tokens


def test_a_span_as_long_as_the_noise_is_one_span() -> None:
    assert Denoiser("", 1e6, 0.25).lengths(400).num_spans == 1


def test_ul2_is_the_papers_table() -> None:
    plan = DenoisingPlan.build(DataConfig(objective="ul2"), 128, no_modes)
    assert [(d.mean_span_length, d.noise_density) for d in plan.denoisers] == [
        (3, 0.15), (8, 0.15), (None, 0.25), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5),
    ]  # fmt: skip
    assert len({d.rate for d in plan.denoisers}) == 1 and len({d.name for d in plan.denoisers}) == 7
    by_kind = {(0.15 if d == 0.15 else 0.5, m): lengths for length, d, m, lengths in GOOGLE if length == 512}
    for denoiser, window in zip(plan.denoisers, plan.windows, strict=True):
        if denoiser.mean_span_length is not None and denoiser.noise_density is not None:
            assert window == SpanLengths(*by_kind[denoiser.noise_density, denoiser.mean_span_length])
        else:
            assert window == SpanLengths(681, 512, 171, 170, 0)
    assert (plan.encoder_length, plan.decoder_length) == (512, 512) and plan.longest_piece == 568
    modes = [text.split(":")[0] for text in UL2_DENOISERS]
    tokenized = DenoisingPlan.build(DataConfig(objective="ul2"), 128, ByteTokenizer().tokenize)
    assert [ByteTokenizer().detokenize(d.mode_ids) for d in tokenized.denoisers] == modes
    assert all(511 <= window.inputs <= 512 for window in tokenized.windows)


def test_prefix_lm_pairs_two_windows_a_row() -> None:
    paired = DenoisingPlan.build(DataConfig(objective="prefix-lm", encoder_seq_length=64), 0)
    assert paired.paired and paired.windows[0].raw == 62 and paired.tokens_per_sample == 128
    assert (paired.encoder_length, paired.decoder_length) == (64, 64)
    single = DenoisingPlan.build(DataConfig(objective="prefix-lm", packing="none", encoder_seq_length=64), 0)
    assert not single.paired and single.windows[0] == SpanLengths(64, 64, 64, 63, 0)
    with pytest.raises(UserError, match="--encoder-seq-length is 3; a pair"):
        DenoisingPlan.build(DataConfig(objective="prefix-lm", encoder_seq_length=3), 0)


def test_own_mixture() -> None:
    texts = ["R:3:0.15:2", ":8.5:0.5:0.5", "S:prefix:0.25", "P:prefix:uniform:1e-9", "X:3:0.15"]
    seen = []

    def tokenize(mode: str) -> list[int]:
        seen.append(mode)
        return [9]

    found = denoisers_of(DataConfig(objective="ul2", denoisers=texts), tokenize)
    names = ["R-span-3-0.15", "span-8.5-0.5", "prefix-0.25", "prefix-uniform", "X-span-3-0.15"]
    assert [d.name for d in found] == names and seen == ["R", "S", "P", "X"]
    assert [d.mode_ids for d in found] == [(9,), (), (9,), (9,), (9,)]
    assert [d.rate / found[0].rate for d in found] == pytest.approx([1, 0.25, 0.5, 0.5e-9, 0.5], rel=0.2)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["R"], "not of the form"),
        (["R:3"], "not of the form"),
        (["R:three:0.15"], "not of the form"),
        (["R:3:uniform"], "not of the form"),
        (["R:3:0.15:1:1"], "not of the form"),
        (["R:3:0.15:"], "not of the form"),
        (["R:0.5:0.15"], "at least 1 token"),
        (["R:inf:0.15"], "at least 1 token"),
        (["R:nan:0.15"], "at least 1 token"),
        (["R:3:0"], "at least 1 token"),
        (["R:3:1"], "at least 1 token"),
        (["R:prefix:nan"], "at least 1 token"),
        (["R:3:0.15:0"], "a rate is above 0"),
        (["R:3:0.15:-1"], "a rate is above 0"),
        (["R:3:0.15:inf"], "a rate is above 0"),
        ([":3:0.15:1e-310"], "a rate is above 0"),
        ([":3:0.15:1e300"], "a rate is above 0"),
        (["R:3:0.15", "R:3.0:0.15:2"], "R-span-3-0.15 2 times"),
        (["S:prefix:uniform", "S:prefix:uniform"], "S-prefix-uniform 2 times"),
    ],
)
def test_denoisers_that_cannot_be_read(texts: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=r"--denoisers") as error:
        denoisers_of(DataConfig(objective="ul2", denoisers=texts), no_modes)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_mode_has_to_be_spelled(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nR\n")
    tokenize = mode_tokenizer(BertWordPieceCase(tmp_path / "vocab.txt"))
    assert tokenize("R") == (2,)
    with pytest.raises(UserError, match="unknown ids for the mode 'S'"):
        tokenize("S")
    with pytest.raises(UserError, match="no ids for the mode ' '"):
        tokenize(" ")


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(objective="ul2"),
        DataConfig(encoder_seq_length=2048),
        DataConfig(objective="ul2", denoisers=["R:3:0.15", ":2:0.5"], encoder_seq_length=1024),
    ],
)
def test_too_few_sentinels_are_refused_and_the_cure_helps(config: DataConfig) -> None:
    tokenizer = ByteTokenizer(100)
    with pytest.raises(UserError, match=r"has 100 sentinels; give --vocab-extra-ids \d+") as error:
        DenoisingPlan.build(config, len(tokenizer.sentinel_ids), mode_tokenizer(tokenizer))
    found = re.search(r"--vocab-extra-ids (\d+)", str(error.value))
    assert found is not None
    wanted = int(found[1])
    for number in (wanted - 1, wanted):
        other = tokenizer.with_sentinels(number)
        if number < wanted:
            with pytest.raises(UserError):
                DenoisingPlan.build(config, len(other.sentinel_ids), mode_tokenizer(other))
        else:
            DenoisingPlan.build(config, len(other.sentinel_ids), mode_tokenizer(other))


def test_rows_that_are_too_short() -> None:
    with pytest.raises(UserError, match=r"--encoder-seq-length is 3; a sample of span-3-0.15 has at least 4"):
        DenoisingPlan.build(DataConfig(objective="ul2", encoder_seq_length=3), 100)
    with pytest.raises(UserError, match=r"--decoder-seq-length is 114, but --objective ul2 .* needs 51"):
        DenoisingPlan.build(DataConfig(objective="ul2", decoder_seq_length=114), 128)
    with pytest.raises(UserError, match="spans between"):
        DenoisingPlan.build(DataConfig(objective="ul2", denoisers=[":1:0.9"]), 1000)
