"""Which samples a rank reads at a step, as tensors.

Making a batch takes microseconds (see helpers.cpp), so there are no worker processes and nothing is prefetched.
The only state is the id of the next sample, which the caller keeps. Nothing is drawn from a random number generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from megatron.core.datasets.sample_ranges import SampleRanges
from megatron.core.datasets.t5_dataset import PADDING_SAMPLE, Batch, SpanCorruptionDataset


class TensorBatch(NamedTuple):
    """One or more microbatches of int32 tensors."""

    encoder_input_ids: torch.Tensor
    """[b, s_enc]"""
    decoder_input_ids: torch.Tensor
    """[b, s_dec]"""
    labels: torch.Tensor
    """[b, s_dec], -100 where there is nothing to predict."""

    def to(self, device: torch.device) -> TensorBatch:
        """The same microbatch on `device`."""
        return TensorBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def split(self, parts: int) -> list[TensorBatch]:
        """The same rows in `parts` batches of equal size."""
        split = (tensor.chunk(parts) for tensor in self)
        return [TensorBatch(*part) for part in zip(*split, strict=True)]


class T5Loader:
    """The microbatches of one data-parallel rank.

    A global batch is a run of consecutive samples, but for those that are skipped; microbatch m of rank r takes
    `micro_batch_size` of them from (m * dp_size + r) * micro_batch_size on, as in Megatron-LM. The samples of a step
    are therefore the same for every number of ranks and every micro batch size.
    """

    def __init__(
        self,
        dataset: SpanCorruptionDataset,
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

    def evaluation_batches(self, num_samples: int, microbatches: int = 1) -> Iterator[TensorBatch]:
        """This rank's part of samples 0 .. num_samples - 1, each of which some rank reads exactly once.

        Every rank yields the same number of batches, all of `microbatches` full microbatches: what is missing at the
        end are rows of padding, whose labels the loss leaves out.
        """
        samples_per_round = self.micro_batch_size * self.dp_size * microbatches
        ids = self._places(-(-num_samples // samples_per_round) * microbatches)
        for rows in np.where(ids < num_samples, ids, PADDING_SAMPLE).reshape(-1, microbatches * self.micro_batch_size):
            yield _to_tensors(self.dataset.batch(rows))

    def _places(self, num_microbatches: int) -> np.ndarray:
        """Places of this rank's samples among those of all ranks, [num_microbatches, micro_batch_size] int64."""
        groups = np.arange(num_microbatches, dtype=np.int64) * self.dp_size + self.dp_rank
        within = np.arange(self.micro_batch_size, dtype=np.int64)
        return groups[:, None] * self.micro_batch_size + within


def _to_tensors(batch: Batch) -> TensorBatch:
    return TensorBatch(*map(torch.from_numpy, batch))
