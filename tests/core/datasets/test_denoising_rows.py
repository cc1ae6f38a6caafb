"""Rows of all denoising objectives: what is in them, in which order windows come, blends, pieces, several a row."""

import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import DataConfig
from megatron.core.datasets import helpers
from megatron.core.datasets.blending import Blend
from megatron.core.datasets.denoising import Denoiser
from megatron.core.datasets.t5_dataset import Batch, DenoisingDataset, SpecialTokens, denoisers_for
from megatron.core.errors import UserError
from tests.core.datasets.test_span_corruption import Permutation, Random, chi_square_excess, derive
from tests.denoising import denoised, in_memory, plan_for

FIRST_TOKEN, LAST_TOKEN = 11, 60_000  # corpus ids that are neither special nor modes nor sentinels
SENTINELS = tuple(range(60_300, 60_000, -1))
SPECIAL = SpecialTokens(vocab_size=60_301, pad_id=0, eos_id=1, decoder_start_id=0, sentinel_ids=SENTINELS)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "span-corruption": {},
    "dense spans": {"noise_density": 0.5, "mean_noise_span_length": 2.0},
    "ul2": {"objective": "ul2"},
    "mixture": {"objective": "ul2", "denoisers": ["[A]:3:0.15:2", ":prefix:uniform:1", "[S2S]:prefix:0.25:0.5"]},
    "pairs": {"objective": "prefix-lm"},
    "prefix-lm": {"objective": "prefix-lm", "packing": "none"},
}

quick = settings(deadline=None, max_examples=60)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def config(objective: str, **values: Any) -> DataConfig:
    return DataConfig(**{"encoder_seq_length": 64, "split": "1"} | OBJECTIVES[objective] | values)


def distinct_tokens(count: int) -> np.ndarray:
    """Each id once, so that a sample shows which tokens of the corpus it read."""
    return np.arange(FIRST_TOKEN, FIRST_TOKEN + count, dtype=np.int32)


def random_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(FIRST_TOKEN, LAST_TOKEN, count).astype(np.uint16)


class Example(NamedTuple):
    """Inputs and targets of a segment, with the denoiser that the dataset says it has."""

    kind: int
    inputs: list[int]
    targets: list[int]


def examples_of(dataset: DenoisingDataset, ids: Any) -> Iterator[list[Example]]:
    """The examples of each row; checks all that must hold for padding, segments and decoder inputs."""
    ids = np.asarray(ids, np.int64)
    batch, kinds = dataset.batch(ids), dataset.row_kinds(ids)
    segments = encoder_segments(batch), decoder_segments(batch)
    for row in range(len(ids)):
        found = []
        for segment, kind in enumerate(kinds[row].tolist(), start=1):
            inputs = batch.encoder_input_ids[row][segments[0][row] == segment].tolist()
            targets = batch.labels[row][segments[1][row] == segment].tolist()
            decoder = batch.decoder_input_ids[row][segments[1][row] == segment].tolist()
            assert decoder == [SPECIAL.decoder_start_id, *targets[:-1]]
            found.append(Example(kind, inputs, targets))
        assert (batch.encoder_input_ids[row][segments[0][row] == 0] == SPECIAL.pad_id).all()
        assert (batch.labels[row][segments[1][row] == 0] == -100).all()
        assert (batch.decoder_input_ids[row][segments[1][row] == 0] == SPECIAL.pad_id).all()
        yield found


def encoder_segments(batch: Batch) -> np.ndarray:
    given = batch.encoder_segment_ids
    return np.ones_like(batch.encoder_input_ids) if given is None else given


def decoder_segments(batch: Batch) -> np.ndarray:
    given = batch.decoder_segment_ids
    return np.where(batch.labels == -100, 0, 1) if given is None else given


def restored(denoiser: Denoiser, example: Example) -> tuple[list[int], int]:
    """The raw tokens that an example was made of, and the number of its spans."""
    inputs, targets = example.inputs, example.targets
    mode = len(denoiser.mode_ids)
    assert tuple(inputs[:mode]) == denoiser.mode_ids
    assert inputs[-1] == targets[-1] == SPECIAL.eos_id
    inputs, targets = inputs[mode:-1], targets[:-1]
    if denoiser.mean_span_length is None:
        return inputs + targets, 0
    sentinels = [token for token in targets if token > LAST_TOKEN]
    assert sentinels == [token for token in inputs if token > LAST_TOKEN] == list(SENTINELS[: len(sentinels)])
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token > LAST_TOKEN:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    assert all(spans.values())
    return [x for token in inputs for x in spans.get(token, [token])], len(sentinels)


# ------------------------------------------------------------------------------------------------------------
# Lengths


@st.composite
def denoisers(draw: st.DrawFn) -> Denoiser:
    mode = tuple(range(2, 2 + draw(st.integers(0, 3))))
    mean = draw(st.none() | st.sampled_from([1.0, 1.5, 3.0, 8.0, 64.0]) | st.floats(1, 1e9))
    density = st.sampled_from([0.15, 0.25, 0.5]) | st.floats(1e-9, 1 - 1e-9)
    return Denoiser("", mean, draw(density if mean else density | st.none()), mode_ids=mode)


def native(*kinds: Denoiser) -> helpers.Denoisers:
    table = [[kind.mean_span_length or 0.0, kind.noise_density or 0.0] for kind in kinds]
    modes = [np.array(kind.mode_ids, np.int32) for kind in kinds]
    return helpers.Denoisers(np.array(table), modes, np.array(SENTINELS, np.int32), 1, 0, 0, SPECIAL.vocab_size)


@settings(deadline=None, max_examples=300)
@given(denoisers(), st.integers(2, 3000) | st.integers(2, 2**30), st.integers(1, 2**30))
def test_lengths_are_those_of_the_plan(denoiser: Denoiser, raw: int, cut: int) -> None:
    def lengths(cut: int) -> list[int]:
        ints = (np.array([value], np.int32) for value in (0, raw, cut))
        return native(denoiser).lengths(*ints)[0].tolist()

    expected = denoiser.lengths(raw)
    assert lengths(-1) == [expected.inputs, expected.targets]
    if denoiser.noise_density is None:
        cut = 1 + cut % (raw - 1)
        assert lengths(cut) == [len(denoiser.mode_ids) + cut + 1, raw - cut + 1]
    else:
        with pytest.raises(ValueError, match="a cut must"):
            lengths(cut)


def test_cuts_are_uniform() -> None:
    keys = helpers.derived_keys(5, np.arange(20_000))
    kinds, raw = np.zeros(keys.size, np.int32), np.full(keys.size, 11, np.int32)
    cuts = native(Denoiser("", None, None)).cuts(kinds, raw, keys)
    counts = np.bincount(cuts, minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    assert chi_square_excess(counts[1:], np.full(10, keys.size / 10)) < 4
    assert (native(Denoiser("", None, 0.25)).cuts(kinds, raw, keys) == -1).all()


def test_derived_keys() -> None:
    values = np.array([0, 1, 2**40, -1])
    assert helpers.derived_keys(7, values).tolist() == [derive(7, value % 2**64) for value in values.tolist()]


# ------------------------------------------------------------------------------------------------------------
# Samples


@each_objective
def test_examples_are_their_windows(objective: str) -> None:
    """Tokens, mode, sentinels and lengths of every example of an epoch; each token at most once."""
    count = 20_000
    dataset = denoised(distinct_tokens(count), SPECIAL, config(objective))
    plan = dataset.plan
    read: list[int] = []
    sizes = []
    ids = np.arange(dataset.windows_per_epoch)
    for sample_id, row in zip(ids.tolist(), examples_of(dataset, ids), strict=True):
        for example, tokens in zip(row, dataset.tokens_of(sample_id), strict=True):
            denoiser, window = plan.denoisers[example.kind], plan.windows[example.kind]
            raw, spans = restored(denoiser, example)
            assert raw == tokens.tolist()
            assert len(raw) == window.raw and spans == window.num_spans
            if denoiser.noise_density is not None:
                assert (len(example.inputs), len(example.targets)) == (window.inputs, window.targets)
            sizes.append(len(example.inputs) + len(example.targets))
            read += raw
    assert len(set(read)) == len(read)
    longest = max(window.raw for window in plan.windows)
    assert count - len(read) < (2 if plan.paired else 1) * longest
    assert sum(sizes) / len(ids) == pytest.approx(dataset.tokens_per_sample, rel=0.02)
    slots = dataset.encoder_length + dataset.decoder_length
    assert dataset.fill_rate == pytest.approx(dataset.tokens_per_sample / slots)


def test_pairs_fill_their_rows() -> None:
    dataset = denoised(random_tokens(50_000), SPECIAL, config("pairs"))
    ids = np.arange(2000)
    batch = dataset.batch(ids)
    assert batch.encoder_segment_ids is not None and batch.decoder_segment_ids is not None
    assert (batch.encoder_segment_ids > 0).all() and (batch.decoder_segment_ids > 0).all()
    assert dataset.fill_rate == 1.0 and dataset.row_kinds(ids).shape == (2000, 2)
    cuts = (batch.encoder_segment_ids == 1).sum(axis=1) - 1
    raw = dataset.plan.windows[0].raw
    assert chi_square_excess(np.bincount(cuts, minlength=raw)[1:], np.full(raw - 1, 2000 / (raw - 1))) < 4


def test_padding_rows() -> None:
    for objective in OBJECTIVES:
        dataset = denoised(random_tokens(9_000), SPECIAL, config(objective))
        batch, plain = dataset.batch(np.array([3, -1, 4])), dataset.batch(np.array([3, 4]))
        for array, alone, padding in zip(batch, plain, (0, 0, -100, 0, 0), strict=True):
            if array is not None and alone is not None:
                assert (array[1] == padding).all() and (array[[0, 2]] == alone).all()
        assert (dataset.row_kinds(np.array([3, -1])) >= 0).all(axis=1).tolist() == [True, False]


@each_objective
def test_samples_are_pure_functions(objective: str) -> None:
    dataset = denoised(random_tokens(30_000), SPECIAL, config(objective), block_windows=4)
    rng = np.random.default_rng(1)
    ids = np.concatenate([rng.integers(0, 10**12, 40), rng.integers(0, 400, 40)])
    together = dataset.batch(ids)
    alone = [dataset.batch(ids[i : i + 1]) for i in range(ids.size)]
    for arrays in zip(together, *alone, strict=True):
        if arrays[0] is not None:
            assert (np.concatenate(arrays[1:]) == arrays[0]).all()
    assert (np.concatenate([dataset.row_kinds(ids[i : i + 1]) for i in range(80)]) == dataset.row_kinds(ids)).all()


def test_threads_share_a_dataset() -> None:
    dataset = denoised(random_tokens(30_000), SPECIAL, config("ul2"))
    ids = np.arange(500)
    expected = dataset.batch(ids).labels
    wrong: list[int] = []

    def read(start: int) -> None:
        for n in range(60):
            part = np.roll(ids, start * 31 + n)
            if (dataset.batch(part).labels != expected[part]).any():
                wrong.append(n)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PINNED = {
    "span-corruption": 1571100412, "dense spans": 1767358247, "ul2": 2031262602, "mixture": 3219112670,
    "pairs": 134453905, "prefix-lm": 2065442311, "blocks": 3387785756, "blend": 2269701112,
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_samples_never_change(name: str) -> None:
    """The samples of a seed are part of every checkpoint that was trained with it: these numbers stay."""
    objective = name if name in OBJECTIVES else "ul2"
    plan = plan_for(config(objective), SPECIAL)
    tokens = (np.arange(50_000) * 7919 % 59_981 + FIRST_TOKEN).astype(np.uint16)
    parts = [in_memory(np.roll(tokens, 1000 * n)) for n in range(3 if name == "blend" else 1)]
    blend = Blend([5, 1, 3]) if name == "blend" else None
    options = {"blend": blend, "block_windows": 3 if name == "blocks" else 1}
    dataset = DenoisingDataset(parts, plan, SPECIAL, 2024, "train", **options)  # type: ignore[arg-type]
    arrays = [array for array in dataset.batch(np.array([0, 1, 2, 3, 500, 123_456_789])) if array is not None]
    assert crc32(b"".join(array.astype("<i4").tobytes() for array in arrays)) == PINNED[name]


# ------------------------------------------------------------------------------------------------------------
# Order of the windows


@quick
@given(st.integers(2_000, 40_000), st.integers(0, 2**64 - 1), st.integers(0, 3))
def test_windows_of_a_mixture(num_tokens: int, key: int, epoch: int) -> None:
    """Window k of the ring has denoiser k of the mixture, and begins behind those before it."""
    plan = plan_for(config("ul2"), SPECIAL)
    raw = np.array([window.raw for window in plan.windows])
    kinds, _ = plan.mixture.draws(np.arange(num_tokens // raw.min() + 1))
    ends = raw[kinds].cumsum()
    count = int(np.searchsorted(ends, num_tokens, side="right"))
    layouts = helpers.WindowLayouts(
        np.array([[7, 7 + num_tokens]]), np.array([key], np.uint64), raw, plan.mixture.fractions, plan.mixture.children
    )
    assert layouts.windows_per_epoch.tolist() == [count]
    draws = np.arange(epoch * count, (epoch + 1) * count)
    found, keys = layouts.examples(np.zeros(count, np.int32), draws)
    offset = Random(derive(derive(key, 1), epoch)).below_wide(num_tokens)
    permutation = Permutation(count, derive(derive(key, 2), epoch))
    windows = np.array([permutation.forward(place) for place in range(count)])
    assert (found[:, 0] == np.arange(count)).all() and (found[:, 1] == 0).all() and (found[:, 5] == -1).all()
    assert (found[:, 2] == 7 + (offset + ends[windows] - raw[kinds[windows]]) % num_tokens).all()
    assert (found[:, 3] == raw[kinds[windows]]).all() and (found[:, 4] == kinds[windows]).all()
    assert keys.tolist() == [derive(derive(key, 3), n) for n in draws.tolist()]


@quick
@given(st.integers(1, 6_000), st.integers(1, 20), st.integers(0, 2**64 - 1), st.integers(0, 2))
def test_blocks_are_permuted_and_local(windows: int, block: int, key: int, epoch: int) -> None:
    ring = np.array([[0, windows]])
    layouts = helpers.WindowLayouts(
        ring, np.array([key], np.uint64), np.array([1]), np.zeros(0, np.uint64), np.zeros((0, 2), np.int32), block
    )
    draws = np.arange(epoch * windows, (epoch + 1) * windows)
    starts = layouts.examples(np.zeros(windows, np.int32), draws)[0][:, 2]
    offset = Random(derive(derive(key, 1), epoch)).below_wide(windows)
    order = (starts - offset) % windows
    assert sorted(order.tolist()) == list(range(windows))
    if block == 1:
        return
    in_blocks = windows // block * block
    assert sorted(order[in_blocks:].tolist()) == list(range(in_blocks, windows))  # the rest comes last
    for first in range(0, in_blocks, 256 * block):
        group = order[first : min(first + 256 * block, in_blocks)]
        blocks, sizes = np.unique(group // block, return_counts=True)
        assert (sizes == block).all() and blocks.size == group.size // block


def test_blocks_are_shuffled() -> None:
    """Within a group, neighbours in the order are no neighbours in the corpus; groups are spread over all of it."""
    windows, block = 256 * 8 * 40, 8
    layouts = helpers.WindowLayouts(
        np.array([[0, windows]]), np.array([1], np.uint64), np.array([1]),
        np.zeros(0, np.uint64), np.zeros((0, 2), np.int32), block,
    )  # fmt: skip
    starts = layouts.examples(np.zeros(windows, np.int32), np.arange(windows))[0][:, 2] / windows
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 0.02
    groups = starts.reshape(40, -1)
    assert abs(groups.mean(axis=1) - 0.5).max() < 0.1
    assert (np.abs(np.diff(starts)) * windows < block).mean() < 0.01


# ------------------------------------------------------------------------------------------------------------
# Corpora


@each_objective
def test_pieces_are_one_corpus(objective: str) -> None:
    tokens = random_tokens(20_000)
    whole = denoised(tokens, SPECIAL, config(objective))
    cuts = np.sort(np.random.default_rng(2).integers(0, tokens.size, 90))
    part = in_memory(*np.split(tokens, [0, *cuts, cuts[-1]]), tokens=(0, tokens.size))
    pieces = DenoisingDataset([part], whole.plan, SPECIAL, 0, "train")
    ids = np.arange(3 * whole.windows_per_epoch)
    for one, other in zip(whole.batch(ids), pieces.batch(ids), strict=True):
        assert (one is None and other is None) or (one == other).all()  # type: ignore[union-attr]


def test_foreign_ids_name_corpus_and_offset() -> None:
    tokens = random_tokens(9_000).astype(np.int32)
    tokens[[100, 8_800]] = SPECIAL.vocab_size, -1  # outside the range, and in it
    parts = [
        in_memory(random_tokens(9_000), name="books"),
        in_memory(*np.split(tokens, [4_000, 8_800]), tokens=(4_000, 9_000), name="web"),
    ]
    plan = plan_for(config("span-corruption"), SPECIAL)
    dataset = DenoisingDataset(parts, plan, SPECIAL, 0, "train", blend=Blend([1, 1]))
    with pytest.raises(
        UserError, match=r"^web: token id -1 at token offset 8800 is outside the vocabulary of 60301 ids;"
    ):
        dataset.batch(np.arange(2 * dataset.windows_per_epoch))


def test_a_blend_has_the_samples_of_its_parts() -> None:
    """Draw k of a part is its sample k, whatever the others are; epochs are counted for each."""
    plan = plan_for(config("ul2"), SPECIAL)
    parts = [in_memory(random_tokens(size, size)) for size in (4_000, 9_000, 30_000)]
    blend = Blend([2, 1, 4])
    dataset = DenoisingDataset(parts, plan, SPECIAL, 3, "train", blend=blend)
    ids = np.arange(700)
    batch, kinds = dataset.batch(ids), dataset.row_kinds(ids)
    chosen, draws = blend.draws(ids)
    for index, part in enumerate(parts):
        alone = DenoisingDataset([part], plan, SPECIAL, 3, f"train/{index}")
        mine = chosen == index
        assert (alone.batch(draws[mine]).labels == batch.labels[mine]).all()
        assert (alone.row_kinds(draws[mine]) == kinds[mine]).all()
        assert dataset.epochs(700)[index] == mine.sum() / alone.windows_per_epoch
    assert dataset.windows_per_epoch == sum(
        DenoisingDataset([part], plan, SPECIAL, 3).windows_per_epoch for part in parts
    )


def test_a_part_that_is_too_short_is_named() -> None:
    parts = [in_memory(random_tokens(9_000)), in_memory(random_tokens(70), name="tiny")]
    plan = plan_for(config("ul2"), SPECIAL)
    with pytest.raises(UserError, match=r"^tiny has 70 train tokens, but one sample takes 1\d\d; use more text"):
        DenoisingDataset(parts, plan, SPECIAL, 0, "train", blend=Blend([1, 1]))


# ------------------------------------------------------------------------------------------------------------
# Several examples a row


def packed_call(lengths: list[tuple[int, int]], rows: int, columns: tuple[int, int]) -> dict[str, Any]:
    """Arguments of `fill_rows` for examples (row, raw) from all over a corpus, with the denoisers of UL2 in turn."""
    plan = plan_for(config("mixture"), SPECIAL)
    examples = [[row, 0, 13 * i, raw, i % 3, -1] for i, (row, raw) in enumerate(lengths)]
    outputs = [np.full((rows, columns[side]), -7, np.int32) for side in (0, 1, 1, 0, 1)]
    names = ("encoder_input_ids", "decoder_input_ids", "labels", "encoder_segment_ids", "decoder_segment_ids")
    return {
        "sources": helpers.TokenSources([[distinct_tokens(9_000)]], np.array([[0, 9_000]]), SPECIAL.vocab_size),
        "examples": np.array(examples, np.int64).reshape(-1, 6),
        "keys": helpers.derived_keys(3, np.arange(len(lengths))),
        "denoisers": denoisers_for(plan, SPECIAL),
        **dict(zip(names, outputs, strict=True)),
    }


@quick
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(2, 40)), max_size=12))
def test_packed_examples_are_those_of_their_own_rows(lengths: list[tuple[int, int]]) -> None:
    """Examples of a row stand one after the other, in order, and are what they would be alone."""
    call = packed_call(lengths, 4, (600, 600))
    helpers.fill_rows(**call)
    filled = [[0, 0] for _ in range(4)]
    segments = [0] * 4
    for i, (row, _) in enumerate(lengths):
        alone = packed_call([(0, 0)], 1, (100, 100))
        alone["examples"], alone["keys"] = call["examples"][i : i + 1].copy(), call["keys"][i : i + 1].copy()
        alone["examples"][0, 0] = 0
        helpers.fill_rows(**alone)
        segments[row] += 1
        for side, names in enumerate((["encoder_input_ids"], ["decoder_input_ids", "labels"])):
            segment_name = ("encoder_segment_ids", "decoder_segment_ids")[side]
            size = int(alone[segment_name].sum())
            begin = filled[row][side]
            for name in names:
                assert (call[name][row, begin : begin + size] == alone[name][0, :size]).all()
            assert (call[segment_name][row, begin : begin + size] == segments[row]).all()
            filled[row][side] += size
    for row in range(4):
        assert (call["encoder_input_ids"][row, filled[row][0] :] == 0).all()
        assert (call["labels"][row, filled[row][1] :] == -100).all()
        assert (call["decoder_input_ids"][row, filled[row][1] :] == 0).all()
        assert (call["encoder_segment_ids"][row, filled[row][0] :] == 0).all()
        assert (call["decoder_segment_ids"][row, filled[row][1] :] == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    fits = packed_call([(0, 30), (0, 30)], 1, (75, 75))
    helpers.fill_rows(**fits)
    with pytest.raises(ValueError, match="rows must hold at least"):
        helpers.fill_rows(**packed_call([(0, 30), (0, 30)], 1, (30, 75)))
    with pytest.raises(ValueError, match="several examples in a row need segment ids"):
        helpers.fill_rows(**fits | {"encoder_segment_ids": None, "decoder_segment_ids": None})
    with pytest.raises(ValueError, match="for both sides or for none"):
        helpers.fill_rows(**fits | {"encoder_segment_ids": None})


# ------------------------------------------------------------------------------------------------------------
# UL2 against the table of its paper

# Mode of the published checkpoints, mean span (None: the end of the text), density; all at equal rates.
PAPER = [
    ("[NLU]", 3, 0.15), ("[NLU]", 8, 0.15), ("[S2S]", None, 0.25),
    ("[NLG]", 3, 0.5), ("[NLG]", 8, 0.5), ("[NLG]", 64, 0.15), ("[NLG]", 64, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_ul2_is_the_papers(count: int) -> None:
    """Rates, modes, lengths, densities and the distribution of span lengths, over so many samples of 512 inputs."""
    modes = {"[NLU]": (7, 8, 9), "[S2S]": (5,), "[NLG]": (4, 9)}
    plan = plan_for(DataConfig(objective="ul2"), SPECIAL, tokenize=lambda mode: modes[mode])
    dataset = DenoisingDataset([in_memory(random_tokens(5_000_000))], plan, SPECIAL, 1, "train")
    counts = np.zeros(7, np.int64)
    first_runs: list[list[np.ndarray]] = [[] for _ in PAPER]
    for first in range(0, count, 5_000):
        ids = np.arange(first, first + 5_000)
        batch, kinds = dataset.batch(ids), dataset.row_kinds(ids)[:, 0]
        counts += np.bincount(kinds, minlength=7)
        sizes = encoder_segments(batch).sum(axis=1), decoder_segments(batch).sum(axis=1)
        masked = (batch.labels >= FIRST_TOKEN) & (batch.labels <= LAST_TOKEN)
        for kind, (mode, mean, density) in enumerate(PAPER):
            window, mine = plan.windows[kind], kinds == kind
            assert (batch.encoder_input_ids[mine, : len(modes[mode])] == modes[mode]).all()
            assert 511 <= window.inputs <= 512 and (sizes[0][mine] == window.inputs).all()
            assert (sizes[1][mine] == window.targets).all()
            assert (masked[mine].sum(axis=1) == window.noise_tokens).all()
            assert abs(window.noise_tokens - density * window.raw) <= 0.5
            assert ((batch.labels[mine] > LAST_TOKEN).sum(axis=1) == window.num_spans).all()
            assert window.num_spans == (max(1, round(window.noise_tokens / mean)) if mean else 0)
            if window.num_spans > 1:
                first_runs[kind].append((batch.labels[mine] == SENTINELS[1]).argmax(axis=1) - 1)
    assert abs(counts - count / 7).max() < 5 * math.sqrt(count / 7)
    for kind, window in enumerate(plan.windows):
        if window.num_spans > 1:
            check_first_spans(np.concatenate(first_runs[kind]), window.noise_tokens, window.num_spans)


def check_first_spans(lengths: np.ndarray, noise: int, spans: int) -> None:
    """The first of s parts of n has length k in C(n - k - 1, s - 2) of C(n - 1, s - 1) compositions."""
    ways = [math.comb(noise - k - 1, spans - 2) / math.comb(noise - 1, spans - 1) for k in range(1, noise)]
    expected = np.array(ways) * lengths.size
    counts = np.bincount(lengths - 1, minlength=noise - 1)
    often = expected >= 10
    assert (
        chi_square_excess(
            np.append(counts[often], counts[~often].sum()), np.append(expected[often], expected[~often].sum())
        )
        < 4.5
    )
    assert lengths.mean() == pytest.approx(noise / spans, rel=6 / math.sqrt(lengths.size))
