"""AdamWScale (nanoT5): AdamW whose step is multiplied by the RMS of the logical matrix it changes.

T5's initial matrices differ in scale by orders of magnitude (the embedding has std 1, the query projection
`(d_model * d_kv)**-0.5`), so one absolute step size cannot suit them all; Adafactor has the same factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron.core.config import OptimizerConfig
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.base import Synchronize
from megatron.core.optimizer.logical_matrices import LogicalMatrices
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ModelParameter, buckets

MIN_RMS = 1e-3
# Updates are made in buckets of at most this size, or that of the largest parameter: the buffer that holds them stays
# small, and in the cache on a CPU.
BUCKET_MIB = {"cpu": 1, "cuda": 256}


class AdamWScale(AdamW):
    """AdamW whose step, but not its weight decay, is multiplied by `max(1e-3, RMS)` of each logical matrix.

    The moments, the bias correction and the place of eps are torch's AdamW's.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Sequence[ModelParameter],
        context: ParallelContext,
        synchronize: Synchronize | None = None,
    ) -> None:
        super().__init__(config, parameters, context, synchronize)
        self.matrices = LogicalMatrices(self)
        limit = BUCKET_MIB[context.device.type] * 2**20
        joined = buckets([self.local_exp_avg[i].nbytes for i in self.held], limit)
        self.buckets = [[self.held[i] for i in bucket] for bucket in joined]
        sizes = [sum(self.local_exp_avg[i].numel() for i in bucket) for bucket in self.buckets]
        self.buffer = self.local_exp_avg[0].new_empty(max(sizes, default=0))

    @torch.no_grad()
    def step(self, lr: float, divisor: torch.Tensor | None = None, skip: torch.Tensor | None = None) -> None:
        """Update the parameters in place."""
        self.count_step(skip)
        parameters, gradients = self.local_parameters(), self.local_gradients()
        views = self.matrices.views(parameters)
        sums = self.matrices.sums_of_squares(views)
        scales = self.matrices.per_granule(self.matrices.rms(sums).clamp_(min=MIN_RMS), parameters[0].dtype)
        if self.config.weight_decay:
            decayed = [parameters[i] for i in self.held if self.specs[i].weight_decay]
            factor = 1.0 - lr * self.config.weight_decay
            torch._foreach_mul_(decayed, factor if skip is None else torch.where(skip, 1.0, factor))
        for bucket in self.buckets:
            # A step of rate 1 from zero leaves minus the update in the buffer; a skipped one leaves the zero, whose
            # sign is such that adding it changes no bit.
            sizes = [parameters[i].numel() for i in bucket]
            buffer = self.buffer[: sum(sizes)].fill_(0.0 if skip is None else -0.0)
            updates = [u.view_as(views[i]) for i, u in zip(bucket, buffer.split(sizes), strict=True)]
            shaped = [u.view_as(parameters[i]) for i, u in zip(bucket, updates, strict=True)]
            self._fused(bucket, shaped, gradients, divisor, lr=1.0, decay=0.0, skip=skip)
            torch._foreach_addcmul_([views[i] for i in bucket], updates, [scales[i] for i in bucket], value=lr)
