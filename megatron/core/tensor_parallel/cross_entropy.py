"""Cross-entropy and z-loss of rows of logits, and their gradient in place of the logits.

With `log_z = logsumexp(logits)`, the cross-entropy of a row is `log_z - logits[label]` and the z-loss of T5X
`weight * log_z**2`. All arithmetic is fp32 (fp64 for fp64 logits), from logits as they are, by the kernels or the
operations of torch that `extensions.elementwise` chooses.

Where ranks divide the vocabulary, each has its own part of every row: `label_statistics` gives its part of the two
numbers a row that the losses are made of, `joined_statistics` puts the parts together.

Shapes: r rows, v vocabulary (of a rank: its part).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.extensions.elementwise import choose_cross_entropy
from megatron.core.tensor_parallel.handle import TensorParallel
from megatron.core.tensor_parallel.mappings import all_gather


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic on logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def label_statistics(logits: Tensor, labels: Tensor, backend: str = "auto") -> Tensor:
    """`[2, r]` of logits `[r, v]` and int64 labels `[r]`: logarithm of the partition function, and the label's logit.

    The latter is 0 where the label is none of `0 ... v - 1`: another rank has it, or nobody. `backend` is the value of
    `--cross-entropy-backend`.
    """
    statistics = torch.empty(2, len(logits), dtype=statistics_dtype(logits.dtype), device=logits.device)
    choose_cross_entropy(backend).module(logits).softmax_statistics(logits, labels, statistics[0], statistics[1])
    return statistics


def joined_statistics(statistics: Tensor, parallel: TensorParallel) -> Tensor:
    """The ranks' `[2, r]` of `label_statistics` to those of whole rows, by one all-gather of two numbers a row."""
    if parallel.size == 1:
        return statistics
    every = all_gather(statistics[None], 0, parallel.group)  # [tp, 2, r]
    return torch.stack((every[:, 0].logsumexp(0), every[:, 1].sum(0)))


def logits_gradient_(
    logits: Tensor,
    labels: Tensor,
    log_z: Tensor,
    label_scale: Tensor,
    softmax_scale: Tensor,
    backend: str = "auto",
) -> None:
    """Put `softmax * softmax_scale - onehot * label_scale` in the place of the logits `[r, v]`, rounded once.

    Args:
        logits: This rank's part.
        labels: int64 `[r]`; the onehot term is left out where a label is none of `0 ... v - 1`.
        log_z: `[r]`, of the whole rows, as are the scales.
        label_scale: `[r]`.
        softmax_scale: `[r]`.
        backend: Value of `--cross-entropy-backend`.
    """
    module = choose_cross_entropy(backend).module(logits)
    module.logits_gradient_(logits, labels, log_z, label_scale, softmax_scale)
