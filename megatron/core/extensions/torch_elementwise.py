"""What norms, gated activations and the loss are by torch's own operations, on any device and for any dtype.

Shapes: r rows, v vocabulary (of a rank: its part).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits handled at once: large enough to fill a GPU, small beside a chunk of logits.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension, `[..., h]` to `[..., h]`.

    The statistics are fp32 whatever the dtype of `x`.

    Args:
        x: `[..., h]`.
        weight: `[h]`. It multiplies after the cast back from fp32, as in T5X.
        epsilon: Added to the mean square.
        dtype: Of the result.
    """
    return (F.rms_norm(x, weight.shape, eps=epsilon) * weight.to(x.dtype)).to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """`(x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias`, otherwise as `rms_norm`."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), epsilon).to(dtype)


def activate(x: Tensor, name: str) -> Tensor:
    """ReLU, GELU in its tanh form (as all of T5 has it) or SiLU, by the config's name, `gated-` or not."""
    if name == "relu":
        return F.relu(x)
    return F.silu(x) if name == "gated-silu" else F.gelu(x, approximate="tanh")


def gated_activation(x: Tensor, kind: str) -> Tensor:
    """`activation(gate) * up` of `[..., 2 f]`, rows `(unit, gate|up)`, to `[..., f]`."""
    # [..., 2 f] -> [2, ..., f]: the activation loses more time on strided input than this copy takes.
    gate, up = x.unflatten(-1, (-1, 2)).movedim(-1, 0).contiguous()
    return activate(gate, kind) * up


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS.get(logits.device.type, 1 << 22) // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        yield slice(start, min(start + rows, logits.shape[0]))


def softmax_statistics(logits: Tensor, labels: Tensor, log_z: Tensor, label_logit: Tensor) -> None:
    """Log-partition function and label's logit of each row, a few rows at a time; no autograd.

    Args:
        logits: `[r, v]`, any floating dtype.
        labels: int64 `[r]`; one outside `[0, v)` means no column.
        log_z: `[r]` in the dtype of the arithmetic, is overwritten with `logsumexp(logits)`.
        label_logit: `[r]`, is overwritten with `logits[label]`, 0 where there is no such column.
    """
    for rows in _row_blocks(logits):
        torch.logsumexp(logits[rows].to(log_z.dtype), dim=-1, out=log_z[rows])
    elsewhere = (labels < 0) | (labels >= logits.shape[1])
    found = logits.gather(1, labels.masked_fill(elsewhere, 0)[:, None]).squeeze(1)
    label_logit.copy_(found.masked_fill_(elsewhere, 0.0))


def logits_gradient_(logits: Tensor, labels: Tensor, log_z: Tensor, label_scale: Tensor, softmax_scale: Tensor) -> None:
    """Overwrites logits by `softmax_scale * exp(logits - log_z) - label_scale * onehot(labels)`; no autograd.

    Args:
        logits: `[r, v]`, any floating dtype.
        labels: int64 `[r]`; one outside `[0, v)` means no column.
        log_z: `[r]`, the log-partition function, of all ranks where they divide the columns.
        label_scale: `[r]`.
        softmax_scale: `[r]`.
    """
    elsewhere = (labels < 0) | (labels >= logits.shape[1])
    target = labels.masked_fill(elsewhere, 0)[:, None]  # [r, 1]
    label_scale = label_scale.masked_fill(elsewhere, 0.0)[:, None]
    for rows in _row_blocks(logits):
        softmax = (logits[rows] - log_z[rows, None]).exp_()  # fp32 by promotion
        softmax.mul_(softmax_scale[rows, None]).scatter_add_(1, target[rows], -label_scale[rows])
        logits[rows] = softmax
