"""A corpus of any size in a few KB of disk: files with holes, filled where they are read. For benchmarks and tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets.t5_dataset import DenoisingDataset

DOCUMENT_TOKENS = 1000
LOOKED_AT = 1_000_000  # samples among which those at the ends are sought


def write_sparse_dataset(prefix: Path, num_documents: int) -> None:
    """A dataset of `num_documents` documents whose files have holes but for headers and the ends of splits."""
    num_tokens, size = num_documents * DOCUMENT_TOKENS, num_documents
    bounds = np.round(np.cumsum([0, 0.969, 0.03, 0.001]) * num_documents).astype(np.int64)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, size, size + 1))
        for bound in bounds.tolist():
            around = np.arange(max(bound - 2, 0), min(bound + 3, size + 1), dtype=np.int64)
            sequences = around[around < size]
            for start, values in (
                (34 + 4 * int(around[0]), np.full(sequences.size, DOCUMENT_TOKENS, "<i4")),
                (34 + 4 * size + 8 * int(around[0]), (sequences * DOCUMENT_TOKENS * 2).astype("<i8")),
                (34 + 12 * size + 8 * int(around[0]), around.astype("<i8")),
            ):
                file.seek(start)
                file.write(values.tobytes())
        file.truncate(34 + 20 * size + 8)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * num_tokens)


def ids_at(places: NDArray[np.int64], num_ids: int) -> NDArray[np.uint16]:
    """The token that the corpus has at each place, one of 0, ..., num_ids - 1."""
    return ((places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % np.uint64(num_ids)).astype(
        "<u2"
    )


def samples_of_both_ends(dataset: DenoisingDataset, number: int) -> NDArray[np.int64]:
    """Samples of `dataset` whose windows lie nearest to the ends of its split, so many at each, among the first."""
    starts = dataset._examples(np.arange(LOOKED_AT))[0][:, 2]
    order = np.argsort(starts)
    return np.concatenate([order[:number], order[-number:]])


def wrong_samples(dataset: DenoisingDataset, prefix: Path, ids: NDArray[np.int64], num_ids: int) -> int:
    """Fill the dataset at `prefix` where samples `ids` read it; how many of them have other tokens than it has there.

    Args:
        dataset: Of the first split of the dataset alone, with rows that its windows fill.
        prefix: Of the files.
        ids: Samples.
        num_ids: Ids of the vocabulary that are no sentinels.
    """
    begin, end = dataset.parts[0].tokens
    windows = [np.arange(first, first + length) for first, length in dataset._examples(ids)[0][:, 2:4].tolist()]
    windows = [np.where(places < end, places, places - end + begin) for places in windows]  # a ring
    with Path(f"{prefix}.bin").open("r+b") as file:
        for places in windows:
            for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
                file.seek(2 * int(run[0]))
                file.write(ids_at(run, num_ids).tobytes())
    batch = dataset.batch(ids)
    wrong = 0
    for row, places in enumerate(windows):
        sides = [batch.encoder_input_ids[row, :-1], batch.labels[row, :-1]]  # without EOS
        found = np.concatenate([side[side < num_ids] for side in sides])
        wrong += not np.array_equal(np.sort(found), np.sort(ids_at(places, num_ids)))
    return wrong
