"""What data looks like: lengths of documents and examples, fill of the rows, frequencies of the ids.

Everything is counted over a sample of bounded size, whatever the size of the corpora.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets.corpus import CorpusRange
from megatron.core.datasets.loader import Dataset
from megatron.core.datasets.t5_dataset import IGNORED_LABEL, Batch, SpecialTokens

_ALL_DOCUMENTS = 200_000  # of a split that has no more, all are looked at
_RUNS, _RUN = 2_000, 50  # else so many runs of neighbouring documents
_BATCH = 128


@dataclass
class RowStatistics:
    """Of some rows of a dataset.

    Attributes:
        num_rows: Rows that were looked at.
        input_lengths: Encoder tokens of each example, end of sequence included.  # [m]
        target_lengths: Decoder tokens of each example, likewise.  # [m]
        slots: Columns of an encoder and of a decoder row.
        id_counts: How often each id stands in inputs and targets, without padding.  # [vocab_size]
        kind_counts: Examples of each kind.  # [kinds]
    """

    num_rows: int
    input_lengths: NDArray[np.int64]
    target_lengths: NDArray[np.int64]
    slots: tuple[int, int]
    id_counts: NDArray[np.int64]
    kind_counts: NDArray[np.int64]

    @property
    def fill_rates(self) -> tuple[float, float]:
        """Shares of the encoder's and of the decoder's slots that hold tokens."""
        rows = max(self.num_rows, 1)
        return (
            float(self.input_lengths.sum() / (rows * self.slots[0])),
            float(self.target_lengths.sum() / (rows * self.slots[1])),
        )

    @property
    def tokens_per_row(self) -> float:
        """Encoder and decoder tokens of a row, mean."""
        return float((self.input_lengths.sum() + self.target_lengths.sum()) / max(self.num_rows, 1))


def segments_of(batch: Batch) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Segment of each encoder and decoder position: 0 for padding, and 1 all over where a batch has no segment ids."""
    if batch.encoder_segment_ids is not None and batch.decoder_segment_ids is not None:
        return batch.encoder_segment_ids, batch.decoder_segment_ids
    return np.ones_like(batch.encoder_input_ids), (batch.labels != IGNORED_LABEL).astype(np.int32)


def row_statistics(dataset: Dataset, num_rows: int, special: SpecialTokens, first_row: int = 0) -> RowStatistics:
    """Make `num_rows` rows from `first_row` on, and count what is in them; memory grows with the examples alone."""
    id_counts = np.zeros(special.vocab_size, np.int64)
    kind_counts = np.zeros(len(dataset.kinds), np.int64)
    lengths: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for start in range(first_row, first_row + num_rows, _BATCH):
        ids = np.arange(start, min(start + _BATCH, first_row + num_rows))
        batch = dataset.batch(ids)
        segments = segments_of(batch)
        for found, of_side, tokens in zip(lengths, segments, (batch.encoder_input_ids, batch.labels), strict=True):
            counts = [np.bincount(row)[1:] for row in of_side]
            found += counts
            id_counts += np.bincount(tokens[(of_side > 0) & (tokens >= 0)], minlength=id_counts.size)
        kinds = dataset.row_kinds(ids)
        kind_counts += np.bincount(kinds[kinds >= 0], minlength=kind_counts.size)
    inputs, targets = (np.concatenate([np.zeros(0, np.int64), *found]) for found in lengths)
    slots = dataset.encoder_length, dataset.decoder_length
    return RowStatistics(num_rows, inputs, targets, slots, id_counts, kind_counts)


def document_lengths(parts: Sequence[CorpusRange], seed: int = 0) -> tuple[NDArray[np.int64], bool]:
    """Tokens of the documents of corpora.

    Returns:
        Tokens of each document that was looked at.  # [m]
        Whether these are all.

    Raises:
        UserError: the index entries that are used contradict each other.
    """
    counts = np.array([part.num_documents for part in parts], np.int64)
    if counts.sum() <= _ALL_DOCUMENTS:
        return np.concatenate([_lengths(part, 0, part.num_documents) for part in parts]), True
    rng = np.random.default_rng(seed)
    ends = counts.cumsum()
    documents = np.sort(rng.integers(0, ends[-1], _RUNS))
    owners = np.searchsorted(ends, documents, side="right")
    lengths = [
        _lengths(parts[owner], first, min(first + _RUN, int(counts[owner])))
        for owner, first in zip(owners, (documents - (ends - counts)[owners]).tolist(), strict=True)
    ]
    return np.concatenate(lengths), False


def _lengths(part: CorpusRange, first: int, stop: int) -> NDArray[np.int64]:
    """Tokens of documents `first` to `stop` of a range."""
    if first == stop:
        return np.zeros(0, np.int64)
    begin = part.documents[0]
    return np.diff(part.corpus.document_starts(begin + first, begin + stop))
