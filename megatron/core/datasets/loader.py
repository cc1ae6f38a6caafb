"""Which samples a rank reads at a step, as tensors.

Making a sample takes microseconds (see helpers.cpp), so there are no worker processes; a thread makes the batches of
the next steps (see prefetch.py). The only state is the id of the next sample, which the caller keeps. Nothing is drawn
from a random number generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.core.datasets.sample_ranges import SampleRanges
from megatron.core.datasets.t5_dataset import PADDING_SAMPLE, Batch


class TensorBatch(NamedTuple):
    """One or more microbatches of int32 tensors."""

    encoder_input_ids: torch.Tensor
    """[b, s_enc]"""
    decoder_input_ids: torch.Tensor
    """[b, s_dec]"""
    labels: torch.Tensor
    """[b, s_dec], -100 where there is nothing to predict."""
    encoder_segment_ids: torch.Tensor | None = None
    """[b, s_enc], examples of packed rows from 1, 0 for padding; None when rows are single and full."""
    decoder_segment_ids: torch.Tensor | None = None
    """[b, s_dec], likewise."""

    def inputs(self) -> dict[str, torch.Tensor]:
        """What there is, by the names of the model's arguments."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    def to(self, device: torch.device) -> TensorBatch:
        """The same microbatch on `device`; from pinned memory, the host does not wait for the copy."""
        return TensorBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs().items()})

    def split(self, parts: int) -> list[TensorBatch]:
        """The same rows in `parts` batches of equal size."""
        pieces = {name: tensor.chunk(parts) for name, tensor in self.inputs().items()}
        return [TensorBatch(**{name: piece[i] for name, piece in pieces.items()}) for i in range(parts)]


class Dataset(Protocol):
    """An endless sequence of samples for the model, epoch after epoch.

    One thread at a time calls `batch` of a dataset, but not always the same one, while others may read everything else
    of it: what `batch` remembers must not show elsewhere. Several datasets are used at the same time and may share what
    none of them changes.
    """

    @property
    def encoder_length(self) -> int:
        """Columns of an encoder row (s_enc)."""

    @property
    def decoder_length(self) -> int:
        """Columns of a decoder row (s_dec)."""

    @property
    def windows_per_epoch(self) -> int:
        """Samples of an epoch."""

    @property
    def tokens_per_sample(self) -> float:
        """Encoder and decoder tokens of a sample without padding; the mean where samples differ."""

    @property
    def fill_rate(self) -> float:
        """Share of the row slots that hold data."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the denoisers whose losses are told apart."""

    def row_kinds(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Which of `kinds` made segment s + 1 of each row, -1 where there is none: `[b, s]`; s = 1 without segments."""

    def epochs(self, num_samples: int) -> list[float]:
        """How often each corpus has been read after so many samples."""

    def batch(self, sample_ids: NDArray[np.int64]) -> Batch:
        """The samples of these ids `[b]`, in this order; -1 gives a row of padding whose labels are all -100."""


class T5Loader:
    """The microbatches of one data-parallel rank.

    A global batch is a run of consecutive samples, but for those that are skipped; microbatch m of rank r takes
    `micro_batch_size` of them from (m * dp_size + r) * micro_batch_size on, as in Megatron-LM. The samples of a step
    are therefore the same for every number of ranks and every micro batch size.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        num_microbatches: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        skipped: SampleRanges | None = None,
    ) -> None:
        """Fix the layout.

        Args:
            dataset: Where samples come from.
            micro_batch_size: Samples of a microbatch.
            num_microbatches: Microbatches of a rank in a step.
            dp_rank: This rank, in [0, dp_size).
            dp_size: Data-parallel ranks.
            skipped: Samples that steps leave out; None: none. Evaluation is not concerned.
        """
        assert micro_batch_size > 0 and num_microbatches > 0 and 0 <= dp_rank < dp_size
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.num_microbatches = num_microbatches
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.skipped = skipped or SampleRanges()

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.micro_batch_size * self.num_microbatches * self.dp_size

    def sample_ranges(self, first_sample: int) -> list[tuple[int, int]]:
        """Inclusive ranges of the ids that all ranks together read in the step that starts at `first_sample`."""
        return self.skipped.deal(first_sample, self.global_batch_size)

    def next_sample(self, first_sample: int) -> int:
        """Where the step after the one that starts at `first_sample` starts: the first id not dealt out by then."""
        return self.sample_ranges(first_sample)[-1][1] + 1

    def sample_ids(self, first_sample: int) -> np.ndarray:
        """Ids that this rank reads in the step that starts at `first_sample`, [num_microbatches, micro_batch_size]."""
        places = self._places(self.num_microbatches)
        firsts, lasts = np.array(self.sample_ranges(first_sample), dtype=np.int64).T
        if len(firsts) == 1:
            return firsts[0] + places
        ends = np.cumsum(lasts + 1 - firsts)  # where each range ends among the places of the global batch
        ranges = np.searchsorted(ends, places, side="right")
        return lasts[ranges] + 1 + places - ends[ranges]

    def step_batch(self, first_sample: int) -> TensorBatch:
        """This rank's part of the step that starts at `first_sample`: all microbatches one after the other."""
        return _to_tensors(self.dataset.batch(self.sample_ids(first_sample).reshape(-1)))

    def evaluation_ids(self, num_samples: int, microbatches: int = 1) -> Iterator[NDArray[np.int64]]:
        """This rank's part of samples 0 .. num_samples - 1, each of which some rank gets exactly once.

        Every rank yields the same number of batches, all of `microbatches` full microbatches: what is missing at the
        end are rows of padding, whose labels the loss leaves out.
        """
        samples_per_round = self.micro_batch_size * self.dp_size * microbatches
        ids = self._places(-(-num_samples // samples_per_round) * microbatches)
        yield from np.where(ids < num_samples, ids, PADDING_SAMPLE).reshape(-1, microbatches * self.micro_batch_size)

    def evaluation_batches(self, num_samples: int, microbatches: int = 1) -> Iterator[TensorBatch]:
        """The batches of `evaluation_ids`."""
        for ids in self.evaluation_ids(num_samples, microbatches):
            yield _to_tensors(self.dataset.batch(ids))

    def _places(self, num_microbatches: int) -> np.ndarray:
        """Places of this rank's samples among those of all ranks, [num_microbatches, micro_batch_size] int64."""
        groups = np.arange(num_microbatches, dtype=np.int64) * self.dp_size + self.dp_rank
        within = np.arange(self.micro_batch_size, dtype=np.int64)
        return groups[:, None] * self.micro_batch_size + within


def _to_tensors(batch: Batch) -> TensorBatch:
    return TensorBatch(**{name: torch.from_numpy(rows) for name, rows in batch._asdict().items() if rows is not None})
