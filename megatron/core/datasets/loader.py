"""Which samples a rank reads at a step, as tensors.

Making a batch takes microseconds (see helpers.cpp), so there are no worker processes and nothing is prefetched.
The only state is the number of consumed samples, which the caller keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

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

    A global batch is a run of consecutive samples; microbatch m of rank r takes `micro_batch_size` of them from
    (m * dp_size + r) * micro_batch_size on, as in Megatron-LM. The samples of a step are therefore the same for
    every number of ranks and every micro batch size.
    """

    def __init__(
        self,
        dataset: SpanCorruptionDataset,
        micro_batch_size: int,
        num_microbatches: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Fix the layout.

        Args:
            dataset: Where samples come from.
            micro_batch_size: Samples of a microbatch.
            num_microbatches: Microbatches of a rank in a step.
            dp_rank: This rank, in [0, dp_size).
            dp_size: Data-parallel ranks.
        """
        assert micro_batch_size > 0 and num_microbatches > 0 and 0 <= dp_rank < dp_size
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.num_microbatches = num_microbatches
        self.dp_rank = dp_rank
        self.dp_size = dp_size

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.micro_batch_size * self.num_microbatches * self.dp_size

    def sample_ids(self, first_sample: int, num_microbatches: int) -> np.ndarray:
        """Ids that this rank reads from `first_sample` on, [num_microbatches, micro_batch_size] int64."""
        groups = np.arange(num_microbatches, dtype=np.int64) * self.dp_size + self.dp_rank
        within = np.arange(self.micro_batch_size, dtype=np.int64)
        return first_sample + groups[:, None] * self.micro_batch_size + within

    def step_batch(self, first_sample: int) -> TensorBatch:
        """This rank's part of the step that starts at `first_sample` (the samples consumed so far): all microbatches
        one after the other.
        """
        ids = self.sample_ids(first_sample, self.num_microbatches)
        return _to_tensors(self.dataset.batch(ids.reshape(-1)))

    def evaluation_batches(self, num_samples: int, microbatches: int = 1) -> Iterator[TensorBatch]:
        """This rank's part of samples 0 .. num_samples - 1, each of which some rank reads exactly once.

        Every rank yields the same number of batches, all of `microbatches` full microbatches: what is missing at the
        end are rows of padding, whose labels the loss leaves out.
        """
        samples_per_round = self.micro_batch_size * self.dp_size * microbatches
        ids = self.sample_ids(0, -(-num_samples // samples_per_round) * microbatches)
        for rows in np.where(ids < num_samples, ids, PADDING_SAMPLE).reshape(-1, microbatches * self.micro_batch_size):
            yield _to_tensors(self.dataset.batch(rows))


def _to_tensors(batch: Batch) -> TensorBatch:
    return TensorBatch(*map(torch.from_numpy, batch))
