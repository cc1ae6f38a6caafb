"""Elementwise operations of the model on CPUs, each one pass over memory, forward and backward.

Arithmetic is fp32 and is rounded once, when a result is stored. The results do not depend on the number of threads.
`supports` says which tensors they take; others are for torch's own operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The kernels resolve OpenMP's symbols in the runtime that torch has loaded by now: one pool of threads, not two.
from megatron.core.extensions import elementwise_kernels as kernels

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def supports(tensor: Tensor) -> bool:
    """Whether the operations here take a tensor of this device and dtype."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES


def _check_rows(logits: Tensor, labels: Tensor, *per_row: Tensor) -> None:
    assert supports(logits) and logits.ndim == 2 and logits.is_contiguous(), (logits.dtype, logits.shape)
    assert labels.dtype == torch.int64
    for tensor in (labels, *per_row):
        assert tensor.shape == logits.shape[:1] and tensor.is_contiguous(), (tensor.shape, logits.shape)
    assert all(tensor.dtype == torch.float32 for tensor in per_row)


def softmax_statistics(logits: Tensor, labels: Tensor, log_z: Tensor, label_logit: Tensor) -> None:
    """Log-partition function and label's logit of each row; no autograd.

    Args:
        logits: `[r, v]`, fp32 or bf16, contiguous.
        labels: int64 `[r]`; one outside `[0, v)` means no column.
        log_z: fp32 `[r]`, is overwritten with `logsumexp(logits)`.
        label_logit: fp32 `[r]`, is overwritten with `logits[label]`, 0 where there is no such column.
    """
    _check_rows(logits, labels, log_z, label_logit)
    kernels.softmax_statistics(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        labels.data_ptr(),
        log_z.data_ptr(),
        label_logit.data_ptr(),
        torch.get_num_threads(),
    )


def logits_gradient_(
    logits: Tensor, labels: Tensor, log_z: Tensor, label_scale: Tensor, softmax_scale: Tensor
) -> Tensor:
    """Overwrites logits by `softmax_scale * exp(logits - log_z) - label_scale * onehot(labels)`; no autograd.

    Args:
        logits: `[r, v]`, fp32 or bf16, contiguous.
        labels: int64 `[r]`; one outside `[0, v)` means no column.
        log_z: fp32 `[r]`, the log-partition function, of all ranks where they divide the columns.
        label_scale: fp32 `[r]`.
        softmax_scale: fp32 `[r]`.

    Returns:
        `logits`.
    """
    _check_rows(logits, labels, log_z, label_scale, softmax_scale)
    kernels.logits_gradient(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        labels.data_ptr(),
        log_z.data_ptr(),
        label_scale.data_ptr(),
        softmax_scale.data_ptr(),
        torch.get_num_threads(),
    )
    return logits
