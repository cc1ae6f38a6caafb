"""Cross-entropy and z-loss of rows of logits, and their gradient in place of the logits.

With `log_z = logsumexp(logits)`, the cross-entropy of a row is `log_z - logits[label]` and the z-loss of T5X
`weight * log_z**2`. All arithmetic is fp32 (fp64 for fp64 logits), a few rows at a time, from logits as they are; on
CPUs in one pass over them (`extensions.cpu_elementwise`).

Where ranks divide the vocabulary, each has its own part of every row: `label_statistics` gives its part of the two
numbers a row that the losses are made of, `joined_statistics` puts the parts together.

Shapes: r rows, v vocabulary (of a rank: its part).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.core.extensions import cpu_elementwise
from megatron.core.tensor_parallel.handle import TensorParallel
from megatron.core.tensor_parallel.mappings import all_gather

# Elements handled at once: large enough to fill a GPU, small beside a chunk of logits.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS.get(logits.device.type, 1 << 22) // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        yield slice(start, min(start + rows, logits.shape[0]))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic on logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def label_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """`[2, r]` of logits `[r, v]` and int64 labels `[r]`: logarithm of the partition function, and the label's logit.

    The latter is 0 where the label is none of `0 ... v - 1`: another rank has it, or nobody.
    """
    dtype = statistics_dtype(logits.dtype)
    statistics = torch.empty(2, len(logits), dtype=dtype, device=logits.device)
    if cpu_elementwise.supports(logits):
        cpu_elementwise.softmax_statistics(logits, labels, statistics[0], statistics[1])
        return statistics
    for rows in _row_blocks(logits):
        torch.logsumexp(logits[rows].to(dtype), dim=-1, out=statistics[0, rows])
    elsewhere = (labels < 0) | (labels >= logits.shape[1])
    label_logits = logits.gather(1, labels.masked_fill(elsewhere, 0)[:, None]).squeeze(1)
    statistics[1] = label_logits.masked_fill_(elsewhere, 0.0)
    return statistics


def joined_statistics(statistics: Tensor, parallel: TensorParallel) -> Tensor:
    """The ranks' `[2, r]` of `label_statistics` to those of whole rows, by one all-gather of two numbers a row."""
    if parallel.size == 1:
        return statistics
    every = all_gather(statistics[None], 0, parallel.group)  # [tp, 2, r]
    return torch.stack((every[:, 0].logsumexp(0), every[:, 1].sum(0)))


def logits_gradient_(logits: Tensor, labels: Tensor, log_z: Tensor, label_scale: Tensor, softmax_scale: Tensor) -> None:
    """Put `softmax * softmax_scale - onehot * label_scale` in the place of the logits `[r, v]`, rounded once.

    Args:
        logits: This rank's part.
        labels: int64 `[r]`; the onehot term is left out where a label is none of `0 ... v - 1`.
        log_z: `[r]`, of the whole rows, as are the scales.
        label_scale: `[r]`.
        softmax_scale: `[r]`.
    """
    if cpu_elementwise.supports(logits):
        cpu_elementwise.logits_gradient_(logits, labels, log_z, label_scale, softmax_scale)
        return
    elsewhere = (labels < 0) | (labels >= logits.shape[1])
    target = labels.masked_fill(elsewhere, 0)[:, None]  # [r, 1]
    label_scale = label_scale.masked_fill(elsewhere, 0.0)[:, None]
    for rows in _row_blocks(logits):
        softmax = (logits[rows] - log_z[rows, None]).exp_()  # fp32 by promotion
        softmax.mul_(softmax_scale[rows, None]).scatter_add_(1, target[rows], -label_scale[rows])
        logits[rows] = softmax
