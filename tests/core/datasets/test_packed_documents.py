"""Rows of documents: everything once an epoch, any row at once, fill rates, denoisers, blends, and the loss."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron.core.config import DataConfig, ModelConfig
from megatron.core.datasets import packed_documents, packing_helpers
from megatron.core.datasets.blending import Blend
from megatron.core.datasets.corpus import CorpusRange, open_corpus, split_corpus
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.indexed_dataset import IndexedDatasetWriter
from megatron.core.datasets.packed_documents import PHASES, PackedDocumentsDataset
from megatron.core.datasets.t5_dataset import Batch, SpecialTokens
from megatron.core.errors import UserError
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import initialize_parameters

OBJECTIVES = ("span-corruption", "ul2", "prefix-lm")
TEXT, VOCABULARY = 200, 50_000  # ids below TEXT are special; those of the corpora are all different
MODES = {"[NLU]": [150], "[S2S]": [151, 152], "[NLG]": [153]}
SPECIAL = SpecialTokens(VOCABULARY, 0, 1, 0, tuple(range(149, 49, -1)))


def write(prefix: Path, lengths: Sequence[int], first: int = TEXT, dtype: Any = np.int32) -> CorpusRange:
    """A corpus of documents of these lengths, the tokens of which are numbered from `first` on."""
    with IndexedDatasetWriter(prefix, dtype, overwrite=True) as writer:
        writer.add_documents(np.arange(first, first + sum(lengths)), lengths)
        writer.finalize({})
    return split_corpus(open_corpus(prefix), (1, 0, 0), str(prefix))["train"]


def mixed_lengths(count: int, seed: int = 0) -> list[int]:
    """Some empty documents, some of one token, many short and a few long ones."""
    rng = np.random.default_rng(seed)
    lengths = (12 * rng.lognormal(0, 1, count)).astype(int)
    lengths[rng.random(count) < 0.03] *= 20
    return lengths.tolist()


def plan_of(objective: str, **values: Any) -> DenoisingPlan:
    config = DataConfig(objective=objective, packing="segments", **{"encoder_seq_length": 64} | values)
    return DenoisingPlan.build(config, len(SPECIAL.sentinel_ids), lambda mode: MODES[mode])


def build(parts: CorpusRange | list[CorpusRange], objective: str, seed: int = 1, **values: Any) -> Any:
    plan = plan_of(objective, **values.pop("config", {}))
    parts = [parts] if isinstance(parts, CorpusRange) else parts
    return PackedDocumentsDataset(parts, plan, SPECIAL, seed, "train", **{"window": 16} | values)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> CorpusRange:
    return write(tmp_path_factory.mktemp("corpus") / "mixed", mixed_lengths(300))


def documents_of(part: CorpusRange) -> list[tuple[int, int]]:
    """First and last token of each document that can be denoised."""
    starts = part.corpus.document_starts(*part.documents) + int(part.corpus.pieces[0][0])
    return [(int(a), int(b)) for a, b in pairwise(starts) if b - a >= 2]


def segments_of(batch: Batch) -> list[list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]]:
    """Encoder inputs, decoder inputs and labels of the segments of each row."""
    assert batch.encoder_segment_ids is not None and batch.decoder_segment_ids is not None
    rows = []
    for n, (inside, outside) in enumerate(zip(batch.encoder_segment_ids, batch.decoder_segment_ids, strict=True)):
        assert (batch.encoder_input_ids[n][inside == 0] == SPECIAL.pad_id).all()
        assert (batch.labels[n][outside == 0] == -100).all()
        for ids in (inside, outside):  # 1, 1, 2, 2, 2, ..., 0, 0
            numbers = ids[ids > 0]
            assert (np.diff(numbers, prepend=0) >= 0).all() and (ids[numbers.size :] == 0).all()
        assert set(inside) - {0} == set(outside) - {0} == set(range(1, inside.max() + 1))
        rows.append([
            (batch.encoder_input_ids[n][inside == k], batch.decoder_input_ids[n][outside == k],
             batch.labels[n][outside == k])
            for k in range(1, inside.max() + 1)
        ])  # fmt: skip
    return rows


def text(*ids: NDArray[Any]) -> NDArray[Any]:
    """What is no special id."""
    joined = np.concatenate(ids)
    return joined[joined >= TEXT]


def epoch(dataset: PackedDocumentsDataset, number: int = 0) -> NDArray[np.int64]:
    """Rows of an epoch of the only part."""
    (rows,) = dataset._rows
    rows._epochs_of(np.array([10**9]))  # counts all phases
    ends = rows._phase_ends
    first = number // (len(ends) - 1) * ends[-1] + ends[number % (len(ends) - 1)]
    return np.arange(first, first + np.diff(ends)[number % (len(ends) - 1)])


# ------------------------------------------------------------------------------------------------------------
# What is in the rows


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("number", [0, 1, 13])
def test_an_epoch_holds_each_token_of_each_document_once(part: CorpusRange, objective: str, number: int) -> None:
    dataset = build(part, objective)
    batch = dataset.batch(epoch(dataset, number))
    found = text(batch.encoder_input_ids.reshape(-1), batch.labels.reshape(-1))
    expected = np.concatenate([np.arange(first, end) for first, end in documents_of(part)])
    assert np.array_equal(np.sort(found), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_segment_is_a_denoised_piece_of_one_document(part: CorpusRange, objective: str) -> None:
    dataset = build(part, objective)
    ends = {end for _, end in documents_of(part)}
    starts = {start for start, _ in documents_of(part)}
    longest = plan_of(objective).longest_piece
    for row in segments_of(dataset.batch(epoch(dataset))):
        for inputs, shifted, labels in row:
            raw = np.sort(text(inputs, labels))
            assert 2 <= raw.size <= longest and np.array_equal(raw, np.arange(raw[0], raw[0] + raw.size))
            assert not starts & set(raw[1:].tolist()) and (raw[-1] + 1 in ends or raw.size >= longest - 1)
            assert (text(inputs) == np.sort(text(inputs))).all() and (text(labels) == np.sort(text(labels))).all()
            assert inputs[-1] == labels[-1] == SPECIAL.eos_id
            assert shifted[0] == SPECIAL.decoder_start_id and np.array_equal(shifted[1:], labels[:-1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_statistics_are_those_of_the_rows(part: CorpusRange, objective: str) -> None:
    dataset = build(part, objective)
    batch = dataset.batch(np.arange(dataset.windows_per_epoch))
    assert np.array_equal(epoch(dataset), np.arange(dataset.windows_per_epoch))
    filled = [(ids > 0).mean() for ids in (batch.encoder_segment_ids, batch.decoder_segment_ids)]
    tokens = (batch.encoder_segment_ids > 0).sum() + (batch.decoder_segment_ids > 0).sum()
    assert dataset.fill_rates == pytest.approx(filled, rel=1e-12)
    assert dataset.tokens_per_sample == pytest.approx(tokens / dataset.windows_per_epoch, rel=1e-12)
    assert dataset.fill_rate == pytest.approx(tokens / (batch.encoder_input_ids.size + batch.labels.size), rel=1e-12)
    assert dataset.left_out == part.num_documents - len(documents_of(part)) > 0
    assert dataset.epochs(3 * dataset.windows_per_epoch) == [3.0]


def test_padding_rows(part: CorpusRange) -> None:
    dataset = build(part, "ul2")
    batch = dataset.batch(np.array([-1, 5, -1]))
    assert [len(row) for row in segments_of(batch)] == [0, len(segments_of(dataset.batch(np.array([5])))[0]), 0]
    assert (dataset.row_kinds(np.array([-1, 5]))[0] == -1).all()
    assert segments_of(dataset.batch(np.array([-1]))) == [[]] and dataset.row_kinds(np.array([-1])).shape == (1, 0)


# ------------------------------------------------------------------------------------------------------------
# Order


def content(batch: Batch) -> list[bytes]:
    return [b"".join(np.ascontiguousarray(ids[n]).tobytes() for ids in batch) for n in range(len(batch.labels))]


@settings(max_examples=10, deadline=None)
@given(data=st.data(), objective=st.sampled_from(OBJECTIVES))
def test_a_row_depends_on_its_number_alone(part: CorpusRange, data: st.DataObject, objective: str) -> None:
    straight, jumping = build(part, objective), build(part, objective)
    total = 10 * straight.windows_per_epoch
    wanted = data.draw(st.lists(st.integers(0, total), min_size=1, max_size=12))
    rows: list[bytes] = []
    for first in range(0, max(wanted) + 1, 97):
        rows += content(straight.batch(np.arange(first, first + 97)))
    assert content(jumping.batch(np.array(wanted))) == [rows[n] for n in wanted]
    assert np.array_equal(jumping.row_kinds(np.array(wanted)), straight.row_kinds(np.array(wanted)))


def test_epochs_differ_in_order_and_masks(part: CorpusRange) -> None:
    dataset = build(part, "span-corruption")
    assert len(dataset._rows[0]._counts) == 1
    per_epoch = dataset.windows_per_epoch
    first, second = (segments_of(dataset.batch(np.arange(n * per_epoch, (n + 1) * per_epoch))) for n in (0, 1))
    pieces = [[min(text(*s[::2]).tolist()) for row in rows for s in row] for rows in (first, second)]
    assert pieces[0] != pieces[1] and sorted(pieces[0]) == sorted(pieces[1])
    masks = [{tuple(s[2].tolist()) for row in rows for s in row if s[2].size > 6} for rows in (first, second)]
    assert len(masks[0] & masks[1]) < 0.2 * len(masks[0])
    other_seed = build(part, "span-corruption", seed=2)
    assert other_seed.windows_per_epoch == per_epoch
    assert content(other_seed.batch(np.arange(8))) != content(dataset.batch(np.arange(8)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_how_the_index_is_read_decides_nothing(
    part: CorpusRange, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(part, objective)
    monkeypatch.setattr(packed_documents, "_DOCUMENTS_AT_A_TIME", 40)
    pieced = build(part, objective)
    ids = np.arange(0, 3 * whole.windows_per_epoch, 7)
    assert whole.windows_per_epoch == pieced.windows_per_epoch and whole.fill_rates == pieced.fill_rates
    assert content(whole.batch(ids)) == content(pieced.batch(ids)) and whole.left_out == pieced.left_out


def test_rows_mix_many_blocks(tmp_path: Path) -> None:
    """Neighbouring rows are of different places of the corpus."""
    dataset = build(write(tmp_path / "c", [20] * 2000), "span-corruption", window=8)
    firsts = np.array([min(text(*row[0][::2])) for row in segments_of(dataset.batch(epoch(dataset)))])
    assert np.median(np.abs(np.diff(firsts))) > 0.15 * 40_000


def test_rows_are_pinned(part: CorpusRange) -> None:
    """Continued runs count on them."""
    found = {}
    for objective in OBJECTIVES:
        dataset = build(part, objective)
        rows = dataset.batch(np.arange(0, 4 * dataset.windows_per_epoch, 3))
        found[objective] = hashlib.sha256(b"".join(content(rows))).hexdigest()[:16]
    assert found == {
        "span-corruption": "f2b92f276fc362a9",
        "ul2": "5701bd40f47bf4d9",
        "prefix-lm": "d1f0608a9ef27416",
    }


# ------------------------------------------------------------------------------------------------------------
# Denoisers


def test_kinds_are_those_of_the_segments(part: CorpusRange) -> None:
    dataset = build(part, "ul2")
    denoisers = plan_of("ul2").denoisers
    assert dataset.kinds == tuple(denoiser.name for denoiser in denoisers)
    ids = np.arange(dataset.windows_per_epoch)
    rows, kinds = segments_of(dataset.batch(ids)), dataset.row_kinds(ids)
    assert [len(row) for row in rows] == (kinds >= 0).sum(axis=1).tolist()
    for row, row_kinds in zip(rows, kinds, strict=True):
        for (inputs, _, labels), kind in zip(row, row_kinds, strict=False):
            mode = denoisers[kind].mode_ids
            assert tuple(inputs[: len(mode)]) == mode
            lengths = denoisers[kind].lengths(text(inputs[len(mode) :], labels).size)
            assert (inputs.size, labels.size) == (lengths.inputs, lengths.targets)
    counts = np.bincount(kinds[kinds >= 0], minlength=7)
    assert np.abs(counts - counts.mean()).max() < 12  # of equal rates


def test_denoisers_and_cuts_repeat_but_masks_do_not(part: CorpusRange) -> None:
    for objective in ("ul2", "prefix-lm"):
        dataset = build(part, objective)

        def labels(number: int, dataset: PackedDocumentsDataset = dataset) -> list[tuple[int, tuple[int, ...]]]:
            rows = segments_of(dataset.batch(epoch(dataset, number)))
            return sorted((int(min(text(s[0], s[2]))), tuple(s[2].tolist())) for row in rows for s in row)

        first, next_, again = labels(0), labels(1), labels(PHASES)
        assert [(start, len(ids)) for start, ids in first] == [(start, len(ids)) for start, ids in again]
        assert [(start, len(ids)) for start, ids in first] != [(start, len(ids)) for start, ids in next_]
        assert (first == again) == (objective == "prefix-lm")


def test_prefixes_are_cut_anywhere(tmp_path: Path) -> None:
    dataset = build(write(tmp_path / "c", [11] * 2000), "prefix-lm")
    rows = segments_of(dataset.batch(np.arange(dataset.windows_per_epoch)))
    counts = Counter(text(inputs).size for row in rows for inputs, _, _ in row)
    assert set(counts) == set(range(1, 11)) and min(counts.values()) > 150


# ------------------------------------------------------------------------------------------------------------
# Blends


def test_parts_of_a_blend_come_in_their_shares(tmp_path: Path) -> None:
    parts = [
        write(tmp_path / f"c{n}", mixed_lengths(size, n), TEXT + 15_000 * n) for n, size in enumerate([150, 40, 90])
    ]
    blend = Blend([5, 1, 2])
    dataset = build(parts, "ul2", blend=blend)
    alone = [build(part, "ul2").windows_per_epoch for part in parts]
    assert dataset.windows_per_epoch == pytest.approx(sum(alone), rel=0.05)
    rows = segments_of(dataset.batch(np.arange(400)))
    sources = [{int(min(text(s[0], s[2]))) // 15_000 for s in row} for row in rows]
    assert all(len(found) == 1 for found in sources)
    drawn, _ = blend.draws(np.arange(400))
    assert [found.pop() for found in sources] == drawn.tolist()
    tokens = [sum(s[0].size + s[2].size for s in row) for row in rows]
    assert dataset.tokens_per_sample == pytest.approx(np.mean(tokens), rel=0.05)
    of_parts = [rows.rows_per_epoch for rows in dataset._rows]
    assert dataset.epochs(400) == [250 / of_parts[0], 50 / of_parts[1], 100 / of_parts[2]]
    # An epoch of a part has all of its documents.
    its_rows = np.flatnonzero(blend.draws(np.arange(8 * of_parts[1]))[0] == 1)[: of_parts[1]]
    batch = dataset.batch(its_rows)
    expected = np.concatenate([np.arange(first, end) for first, end in documents_of(parts[1])])
    assert np.array_equal(np.sort(text(batch.encoder_input_ids.reshape(-1), batch.labels.reshape(-1))), expected)


# ------------------------------------------------------------------------------------------------------------
# Cutting


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=30), longest=st.integers(3, 12), begin=st.integers(0, 5),
    blocks=st.integers(1, 6),
)  # fmt: skip
def test_pieces(lengths: list[int], longest: int, begin: int, blocks: int) -> None:
    starts = begin + np.append(0, np.cumsum(lengths, dtype=np.int64))
    bounds = np.append(np.arange(0, len(lengths), blocks), len(lengths))
    pieces, tokens, first_pieces = packing_helpers.cut_documents(starts, bounds, longest)
    expected: list[tuple[int, int]] = []
    expected_firsts = [0]
    for block in pairwise(bounds):
        for document in range(*block):
            first, left = int(starts[document]), lengths[document]
            while left >= 2:
                take = min(left, longest)
                take -= left - take == 1
                expected.append((first, take))
                first, left = first + take, left - take
            assert left == (lengths[document] == 1)
        expected_firsts.append(len(expected))
    assert list(zip(pieces.tolist(), tokens.tolist(), strict=True)) == expected
    assert first_pieces.tolist() == expected_firsts


@pytest.mark.parametrize(
    ("starts", "bounds", "longest", "message"),
    [
        ([0, 5, 4], [0, 2], 5, "starts"),
        ([-1, 5], [0, 1], 5, "starts"),
        ([], [0], 5, "starts"),
        ([0, 5], [0, 2], 5, "bounds"),
        ([0, 5], [1, 1], 5, "bounds"),
        ([0, 5], [], 5, "bounds"),
        ([0, 5], [0, 1], 2, "longest"),
        ([0, 5], [0, 1], 2**31, "longest"),
    ],
)
def test_wrong_cuts_throw(starts: list[int], bounds: list[int], longest: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packing_helpers.cut_documents(np.array(starts, np.int64), np.array(bounds, np.int64), longest)


def test_blocks_of_long_documents_are_short(tmp_path: Path) -> None:
    """Their rows are planned together, and must fit into memory."""
    part = write(tmp_path / "c", [3] * 100 + [2000] * 5 + [3] * 10)
    dataset = build(part, "span-corruption", window=16)
    (rows,) = dataset._rows
    assert max(np.diff(rows._bounds)) == 16 and rows._bounds[-1] == 115
    starts = part.corpus.document_starts(0, 115)[rows._bounds]
    assert (np.diff(starts)[np.diff(rows._bounds) > 1] <= 16 * plan_of("span-corruption").longest_piece).all()
    batch = dataset.batch(epoch(dataset))
    assert text(batch.encoder_input_ids.reshape(-1), batch.labels.reshape(-1)).size == 330 + 10_000


# ------------------------------------------------------------------------------------------------------------
# Mistakes


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no train document of 2 tokens or more"):
        build(write(tmp_path / "c", [1, 0, 1]), "span-corruption")
    with pytest.raises(UserError, match="--encoder-seq-length is too short for --packing segments"):
        build(write(tmp_path / "c", [9, 9]), "prefix-lm", config={"encoder_seq_length": 2})
    dataset = build(write(tmp_path / "c", [9, 9], VOCABULARY - 12), "span-corruption")
    with pytest.raises(UserError, match=r"c: token id 5000\d at token offset 1\d is outside .*; use the tokenizer"):
        dataset.batch(np.arange(dataset.windows_per_epoch))


# ------------------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_rows_have_the_loss_and_gradients_of_their_documents(tmp_path: Path, objective: str) -> None:
    config = ModelConfig(
        encoder_num_layers=2, decoder_num_layers=1, hidden_size=24, num_attention_heads=3, kv_channels=5,
        vocab_size=TEXT + 1000,
    )  # fmt: skip
    model = T5Model(config)
    initialize_parameters(model, seed=0)
    lengths = np.random.default_rng(3).integers(2, 60, 32).tolist()
    dataset = build(write(tmp_path / "c", lengths), objective)
    batch = dataset.batch(np.arange(dataset.windows_per_epoch))
    rows = segments_of(batch)
    assert len(rows) < 0.7 * sum(map(len, rows))

    def losses(examples: list[dict[str, NDArray[Any]]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = torch.zeros(1)
        for example in examples:
            inputs = {name: torch.from_numpy(np.atleast_2d(ids)) for name, ids in example.items()}
            total = total + model(**inputs).loss.total
        total.backward()
        return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    names = ("encoder_input_ids", "decoder_input_ids", "labels")
    packed, packed_gradients = losses([dict(batch._asdict())])
    alone, gradients = losses([dict(zip(names, segment, strict=True)) for row in rows for segment in row])
    assert packed == pytest.approx(alone, rel=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            packed_gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name
        )


# ------------------------------------------------------------------------------------------------------------
# Size


def write_index(prefix: Path, count: int, seed: int = 0) -> None:
    """Documents of about 90 tokens; the `.bin` is a hole."""
    rng, end = np.random.default_rng(seed), 0
    with Path(f"{prefix}.idx").open("wb") as file:
        header = b"MMIDIDX\x00\x00" + b"".join(n.to_bytes(w, "little") for n, w in ((1, 8), (8, 1), (count, 8)))
        file.write(header + (count + 1).to_bytes(8, "little"))
        for first in range(0, count, 1 << 20):
            last = min(first + (1 << 20), count)
            lengths = (60 * rng.lognormal(0, 0.9, last - first)).astype("<i4")
            ends = end + np.cumsum(lengths, dtype="<i8") * 2
            pointers = np.append(end, ends[:-1]).astype("<i8")
            columns = ((lengths, 4, 0), (pointers, 8, 4), (np.arange(first, last, dtype="<i8"), 8, 12))
            for column, width, behind in columns:
                file.seek(34 + behind * count + width * first)
                file.write(column.tobytes())
            end = int(ends[-1])
        file.write(np.array([count], "<i8").tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(end)


# In a process of its own, without torch, whose memory is that of the data.
OPEN = """
import sys, time
from pathlib import Path
import numpy as np
from megatron.core.config import DataConfig
from megatron.core.datasets.corpus import open_corpus, split_corpus
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.packed_documents import PackedDocumentsDataset
from megatron.core.datasets.t5_dataset import SpecialTokens
part = split_corpus(open_corpus(sys.argv[1]), (1, 0, 0), "c")["train"]
plan = DenoisingPlan.build(DataConfig(packing="segments"), 100)
start = time.perf_counter()
dataset = PackedDocumentsDataset([part], plan, SpecialTokens(500, 0, 1, 0, tuple(range(100))), 1, "train")
opened = time.perf_counter()
batch = dataset.batch(np.array([0, dataset.windows_per_epoch - 1, 10**13]))
assert (batch.encoder_segment_ids[:, 0] == 1).all()
read = time.perf_counter()
status = Path("/proc/self/status").read_text().split()
print(opened - start, read - opened, int(status[status.index("VmHWM:") + 1]) / 1024, dataset.fill_rate)
"""


@pytest.mark.parametrize("count", [10**6, pytest.param(10**8, marks=pytest.mark.slow)])
def test_many_documents_are_planned_in_little_memory(tmp_path: Path, count: int) -> None:
    write_index(tmp_path / "c", count)
    command = [sys.executable, "-c", OPEN, str(tmp_path / "c")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    open_s, read_s, peak_mib, fill_rate = map(float, result.stdout.split())
    print(f"{count} documents: {open_s:.1f} s, 3 rows {read_s:.2f} s, {peak_mib:.0f} MiB, {fill_rate:.4f} filled")
    assert peak_mib < 300 and fill_rate > 0.93
