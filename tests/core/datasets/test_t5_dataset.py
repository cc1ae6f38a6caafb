"""The T5 dataset over real indexed datasets: splits, ledger of tokens, independence of batching, refusals."""

import hashlib
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import DataConfig
from megatron.core.datasets.corpus import Corpus, open_corpus, split_corpus
from megatron.core.datasets.indexed_dataset import IndexedDatasetWriter
from megatron.core.datasets.loader import T5Loader, TensorBatch
from megatron.core.datasets.t5_dataset import (
    Batch,
    DenoisingDataset,
    SpecialTokens,
)
from megatron.core.errors import UserError
from tests.denoising import denoised, in_memory, plan_for

SENTINELS = tuple(range(10_099, 9_999, -1))
SPECIAL = SpecialTokens(vocab_size=10_100, pad_id=0, eos_id=1, decoder_start_id=0, sentinel_ids=SENTINELS)
NUM_TOKENS = 9_000


def config(**values: Any) -> DataConfig:
    return DataConfig(**{"encoder_seq_length": 32, "split": "1"} | values)


def distinct_tokens(count: int = NUM_TOKENS) -> np.ndarray:
    """Each id once, so that a sample shows which tokens of the corpus it read."""
    return np.arange(2, count + 2, dtype=np.uint16)


def dataset(tokens: np.ndarray | None = None, seed: int = 0, name: str = "train", **values: Any) -> DenoisingDataset:
    return denoised(distinct_tokens() if tokens is None else tokens, SPECIAL, config(**values), seed, name)


def write(prefix: Path, documents: Iterable[np.ndarray]) -> Corpus:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finalize()
    return open_corpus(prefix)


def text_of(batch: Batch | TensorBatch) -> np.ndarray:
    """Corpus tokens of a batch in any order: neither special nor sentinel nor ignored."""
    ids = np.concatenate([np.asarray(batch.encoder_input_ids).ravel(), np.asarray(batch.labels).ravel()])
    return ids[(ids > 1) & (ids < min(SENTINELS))]


# ------------------------------------------------------------------------------------------------------------
# Samples


def test_shapes_and_no_padding() -> None:
    samples = dataset(encoder_seq_length=512)
    batch = samples.batch(np.arange(5))
    assert samples.plan.windows[0] == (568, 512, 114, 85, 28)
    assert batch.encoder_input_ids.shape == (5, 512)
    assert batch.decoder_input_ids.shape == batch.labels.shape == (5, 114)
    assert {array.dtype for array in batch[:3]} == {np.dtype(np.int32)}
    assert samples.fill_rate == 1.0
    assert (batch.labels >= 1).all()
    assert (batch.decoder_input_ids[:, 0] == SPECIAL.decoder_start_id).all()
    assert (batch.decoder_input_ids[:, 1:] == batch.labels[:, :-1]).all()


def test_every_token_once_an_epoch_over_all_batches() -> None:
    samples = dataset()
    assert samples.windows_per_epoch == NUM_TOKENS // samples.plan.windows[0].raw
    for epoch in range(2):
        first = epoch * samples.windows_per_epoch
        used = text_of(samples.batch(np.arange(first, first + samples.windows_per_epoch)))
        assert len(np.unique(used)) == len(used) == samples.windows_per_epoch * samples.plan.windows[0].raw
        assert NUM_TOKENS - len(used) < samples.plan.windows[0].raw


@pytest.mark.parametrize("extra", [0, 1, 33, 34, 35])
def test_ledger_of_small_corpora(extra: int) -> None:
    """One window exactly (T == R), one token more, and so on to two windows and one token."""
    raw = dataset().plan.windows[0].raw
    assert raw == 34
    tokens = distinct_tokens(raw + extra)
    samples = dataset(tokens)
    used = text_of(samples.batch(np.arange(samples.windows_per_epoch)))
    assert samples.windows_per_epoch == 1 + extra // raw
    assert len(np.unique(used)) == len(used) == samples.windows_per_epoch * raw
    assert set(used) <= set(tokens.tolist())


def test_window_is_what_the_sample_holds() -> None:
    tokens = distinct_tokens(100)
    samples = dataset(tokens)
    for sample_id in range(20):
        (window,) = samples.tokens_of(sample_id)
        assert (np.diff(window) % 100 == 1).all()  # consecutive in the ring
        assert sorted(window) == sorted(text_of(samples.batch(np.array([sample_id]))))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_order_and_batching_do_not_matter(ids: list[int], shuffle: Any) -> None:
    samples = dataset()
    alone = {n: samples.batch(np.array([n])) for n in ids}
    shuffle.shuffle(ids)
    together = samples.batch(np.array(ids))
    for row, n in enumerate(ids):
        for array, single in zip(together[:3], alone[n][:3], strict=True):
            assert (array[row] == single[0]).all()


def test_seeds_names_and_epochs_differ() -> None:
    ids = np.arange(50)
    batches = [
        dataset().batch(ids),
        dataset(seed=1).batch(ids),
        dataset(seed=2**64).batch(ids),  # no seed is cut to 64 bits
        dataset(name="valid").batch(ids),
        dataset().batch(ids + dataset().windows_per_epoch),
    ]
    for i, one in enumerate(batches):
        for other in batches[:i]:
            assert (one.encoder_input_ids != other.encoder_input_ids).mean() > 0.9


def test_padding_to_a_multiple() -> None:
    """512 / 114 with rows of a multiple of 64: only the decoder is padded, to 128."""
    plan = plan_for(config(encoder_seq_length=512), SPECIAL, pad_to_multiple_of=64)
    samples = DenoisingDataset([in_memory(distinct_tokens())], plan, SPECIAL, 0, "train")
    plain = dataset(encoder_seq_length=512).batch(np.arange(4))
    batch = samples.batch(np.arange(4))
    assert (samples.encoder_length, samples.decoder_length) == (512, 128)
    assert samples.fill_rate == (512 + 114) / (512 + 128)
    assert (batch.encoder_input_ids == plain.encoder_input_ids).all()
    assert (batch.labels[:, :114] == plain.labels).all()
    assert (batch.labels[:, 114:] == -100).all()
    assert (batch.decoder_input_ids[:, 114:] == SPECIAL.pad_id).all()


def test_an_unreachable_length_is_not_padded() -> None:
    """Half noise in spans of one token: 32 encoder tokens cannot be reached, so that rows have 31."""
    samples = dataset(encoder_seq_length=32, noise_density=0.5, mean_noise_span_length=1.0)
    batch = samples.batch(np.arange(3))
    assert batch.encoder_input_ids.shape == (3, samples.plan.windows[0].inputs) == (3, 31)
    assert (batch.encoder_input_ids[:, -1] == SPECIAL.eos_id).all()
    assert samples.fill_rate == 1.0


# ------------------------------------------------------------------------------------------------------------
# Ranks and processes


def steps(samples: DenoisingDataset, micro: int, num: int, dp: int, num_steps: int = 3) -> np.ndarray:
    """Encoder rows of all ranks in the order of the samples."""
    rows = []
    for step in range(num_steps):
        loaders = [T5Loader(samples, micro, num, rank, dp) for rank in range(dp)]
        parts = [loader.step_batch(step * loader.global_batch_size).split(num) for loader in loaders]
        rows += [parts[rank][m].encoder_input_ids for m in range(num) for rank in range(dp)]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize(("micro", "num", "dp"), [(1, 12, 1), (12, 1, 1), (3, 2, 2), (2, 1, 6), (1, 3, 4)])
def test_a_step_has_the_same_samples_on_any_layout(micro: int, num: int, dp: int) -> None:
    samples = dataset()
    assert (steps(samples, micro, num, dp) == samples.batch(np.arange(36)).encoder_input_ids).all()


def test_loader_gives_int32_tensors() -> None:
    loader = T5Loader(dataset(), 2, 3)
    microbatches = loader.step_batch(0).split(3)
    assert len(microbatches) == 3
    for microbatch in microbatches:
        assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in microbatch.inputs().values())
        assert microbatch.labels.shape == (2, loader.dataset.decoder_length)


@pytest.mark.parametrize("num_samples", [1, 5, 12, 13, 24])
@pytest.mark.parametrize(("micro", "dp"), [(4, 3), (1, 1), (5, 2)])
def test_evaluation_covers_each_sample_once(num_samples: int, micro: int, dp: int) -> None:
    samples = dataset()
    ranks = [list(T5Loader(samples, micro, 1, rank, dp).evaluation_batches(num_samples)) for rank in range(dp)]
    assert {len(batches) for batches in ranks} == {-(-num_samples // (micro * dp))}
    assert {len(batch.labels) for batches in ranks for batch in batches} == {micro}
    used = np.concatenate([text_of(batch) for batches in ranks for batch in batches])
    assert sorted(used) == sorted(text_of(samples.batch(np.arange(num_samples))))


def test_two_processes_give_the_samples_of_one() -> None:
    program = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1]); import test_t5_dataset as t\n"
        "rank = int(sys.argv[2]); loader = t.T5Loader(t.dataset(), 4, 3, rank, 2)\n"
        "for part in loader.step_batch(24).split(3): sys.stdout.buffer.write(part.encoder_input_ids.numpy().tobytes())"
    )
    folder = str(Path(__file__).parent)
    outputs = [
        subprocess.run([sys.executable, "-c", program, folder, str(rank)], capture_output=True, check=True).stdout
        for rank in range(2)
    ]
    one = dataset().batch(np.arange(24, 48)).encoder_input_ids.reshape(3, 2, 4, -1)
    for rank, output in enumerate(outputs):
        assert hashlib.sha256(output).digest() == hashlib.sha256(one[:, rank].tobytes()).digest()


# ------------------------------------------------------------------------------------------------------------
# Splits


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5000), st.tuples(*[st.floats(0, 1)] * 3).filter(lambda w: sum(w) > 0.01))
def test_split_is_megatrons(num_documents: int, weights: tuple[float, float, float]) -> None:
    """Bounds are int(round(share up to here x documents)), and the ranges follow one another."""
    first, second, third = (weight / sum(weights) for weight in weights)
    corpus: Any = SimpleNamespace(num_documents=num_documents, document_start=lambda document: 7 * document)
    parts = list(split_corpus(corpus, (first, second, third), "").values())
    bounds = [0, round(first * num_documents), round((first + second) * num_documents), num_documents]
    assert [part.documents for part in parts] == list(pairwise(bounds))
    assert [part.tokens for part in parts] == [(7 * begin, 7 * end) for begin, end in pairwise(bounds)]


def test_splits_share_no_token(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", np.split(distinct_tokens(), 90))
    plan = plan_for(config(), SPECIAL)
    ranges = split_corpus(corpus, (0.8, 0.15, 0.05), "corpus")
    train, valid, test = (DenoisingDataset([part], plan, SPECIAL, 0, name) for name, part in ranges.items())
    used = [set(text_of(part.batch(np.arange(part.windows_per_epoch)))) for part in (train, valid, test)]
    assert min(used[1]) > max(used[0])
    assert min(used[2]) > max(used[1])
    assert max(used[0]) <= 7_201
    assert (train.batch(np.arange(9)).labels != valid.batch(np.arange(9)).labels).any()


# ------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_seq_length": 2}, r"--encoder-seq-length is 2"),
        (
            {"encoder_seq_length": 512, "decoder_seq_length": 113},
            r"--decoder-seq-length is 113, but --objective span-corruption .* 512 needs 114",
        ),
        (
            {"encoder_seq_length": 2048},
            r"span-3-0.15 makes 114 spans a sample of --encoder-seq-length 2048, but .* 100 sent",
        ),
        ({"encoder_seq_length": 9000}, r"sentinels"),
        (
            {"encoder_seq_length": 8500, "mean_noise_span_length": 100.0},
            r"corpus has 9000 train tokens, but one sample",
        ),
    ],
)
def test_refusals_name_the_numbers(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        dataset(**values)
    assert "\n" not in str(caught.value)


def test_decoder_bound_larger_than_needed_does_not_pad() -> None:
    assert dataset(encoder_seq_length=512, decoder_seq_length=114).decoder_length == 114
    assert dataset(encoder_seq_length=512, decoder_seq_length=128).decoder_length == 114


def test_corpus_shorter_than_one_window() -> None:
    with pytest.raises(UserError, match=r"^corpus has 33 train tokens, but one sample takes 34; use more text"):
        dataset(distinct_tokens(33))


@pytest.mark.parametrize("split", ["inf,1,1", "nan,1,1", "1,nan", "1e308,1e308,1", "0,0,0", "1,-1", "a", "", "1,1,1,1"])
def test_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(UserError, match="--split"):
        DataConfig(split=split)


@pytest.mark.parametrize("values", [{}, {"shuffle_block_windows": 8}, {"objective": "prefix-lm"}], ids=str)
def test_reading_ahead_changes_no_sample(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write(tmp_path / "d", [distinct_tokens()[:5000], distinct_tokens()[5000:]])
    part = split_corpus(corpus, (1, 0, 0), "d")["train"]

    def build() -> DenoisingDataset:
        options = config(**values)
        return DenoisingDataset(
            [part], plan_for(options, SPECIAL), SPECIAL, 0, block_windows=options.shuffle_block_windows
        )

    plain = build()
    monkeypatch.setattr("megatron.core.datasets.t5_dataset.exceeds_memory", lambda parts: True)
    ahead, ids = build(), np.array([3, -1, 0, 500, 7])
    for found, expected in zip(ahead.batch(ids), plain.batch(ids), strict=True):
        assert (found is None and expected is None) or np.array_equal(found, expected)


def test_the_block_of_a_window_is_what_is_read() -> None:
    """Blocks hold their windows, have the length of eight of them, and do not overlap."""
    part = in_memory(distinct_tokens())
    samples = DenoisingDataset([part], plan_for(config(), SPECIAL), SPECIAL, 0, block_windows=8)
    raw, ids = samples.plan.windows[0].raw, np.arange(samples.windows_per_epoch)
    windows = samples._layouts.examples(np.zeros(ids.size, np.int32), ids)[0][:, 2]
    blocks = samples._layouts.examples(np.zeros(ids.size, np.int32), ids, True)[0][:, 2:4]
    assert np.all((windows - blocks[:, 0]) % NUM_TOKENS + raw <= blocks[:, 1])
    distinct = np.unique(blocks, axis=0)
    assert distinct[:, 1].sum() == raw * ids.size and set(distinct[:, 1]) == {8 * raw, raw * (ids.size % 8)} - {0}
