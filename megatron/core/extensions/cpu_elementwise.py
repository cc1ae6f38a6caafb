"""Elementwise operations of the model on CPUs, each one pass over memory, forward and backward.

Arithmetic is fp32 and is rounded once, when a result is stored. The results do not depend on the number of threads.
`supports` says which tensors they take; others are for torch's own operations.

Those with a gradient are operators `torch.ops.megatron_t5.*`; `fused_elementwise` says what norms and gated activations
are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# The kernels resolve OpenMP's symbols in the runtime that torch has loaded by now: one pool of threads, not two.
from megatron.core.extensions import elementwise_kernels as kernels
from megatron.core.extensions.fused_elementwise import (
    ElementwiseFunctions,
    check_rows,
    define,
    define_operators,
    fake_gated,
    rows_and_width,
)
from megatron.core.extensions.seeds import seed

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
KEYS = ("CPU",)


def supports(tensor: Tensor) -> bool:
    """Whether the operations here take a tensor of this device and dtype."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# Gated activation and norms: what computes the operators


def _gated(x: Tensor, activation: str) -> Tensor:
    x = x.contiguous()
    y = fake_gated(x, activation)
    kernels.gated(x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], activation, y.numel(), torch.get_num_threads())
    return y


def _gated_gradient(gradient: Tensor, x: Tensor, activation: str) -> Tensor:
    gradient, x = gradient.contiguous(), x.contiguous()
    x_gradient = torch.empty_like(x)
    kernels.gated_gradient(
        gradient.data_ptr(),
        x.data_ptr(),
        x_gradient.data_ptr(),
        DTYPES[x.dtype],
        activation,
        gradient.numel(),
        torch.get_num_threads(),
    )
    return x_gradient


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    x, weight = x.contiguous(), weight.float().contiguous()
    y = torch.empty_like(x, dtype=dtype)
    _call_norm(None, None, x, weight, y, epsilon, 0.0, None)
    return y


def _add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    residual, branch, weight = residual.contiguous(), branch.contiguous(), weight.float().contiguous()
    total, y = torch.empty_like(residual), torch.empty_like(residual, dtype=dtype)
    _call_norm(residual, branch, total, weight, y, epsilon, p, seed)
    return total, y


def _call_norm(
    residual: Tensor | None,
    branch: Tensor | None,
    total: Tensor,
    weight: Tensor,
    y: Tensor,
    epsilon: float,
    p: float,
    seed: Tensor | None,
) -> None:
    kernels.rms_norm(
        _address(residual),
        _address(branch),
        total.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        DTYPES[total.dtype],
        DTYPES[y.dtype],
        *rows_and_width(total),
        epsilon,
        p,
        _address(seed),
        torch.get_num_threads(),
    )


def _rms_norm_gradient(
    more: Tensor | None, gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, x, weight = gradient.contiguous(), x.contiguous(), weight.float().contiguous()
    more = None if more is None else more.contiguous()
    x_gradient, weight_gradient = torch.empty_like(x), torch.empty_like(weight)
    kernels.rms_norm_gradient(
        _address(more),
        gradient.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        x_gradient.data_ptr(),
        weight_gradient.data_ptr(),
        DTYPES[x.dtype],
        DTYPES[gradient.dtype],
        *rows_and_width(x),
        epsilon,
        torch.get_num_threads(),
    )
    branch_gradient = x.new_empty(0) if seed is None else _dropout(x_gradient, seed, p, None)
    return x_gradient, branch_gradient, weight_gradient


def _dropout(x: Tensor, seed: Tensor, p: float, residual: Tensor | None) -> Tensor:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    kernels.dropout(
        _address(residual),
        x.data_ptr(),
        y.data_ptr(),
        DTYPES[x.dtype],
        *rows_and_width(x),
        p,
        seed.data_ptr(),
        torch.get_num_threads(),
    )
    return y


define_operators(
    "",
    KEYS,
    gated=_gated,
    gated_gradient=_gated_gradient,
    rms_norm=_rms_norm,
    add_rms_norm=_add_rms_norm,
    rms_norm_gradient=_rms_norm_gradient,
)
FUNCTIONS = ElementwiseFunctions("", supports, DTYPES, lambda device: seed())
gated_activation = FUNCTIONS.gated_activation
rms_norm = FUNCTIONS.rms_norm
rms_norm_beside = FUNCTIONS.rms_norm_beside
add_rms_norm = FUNCTIONS.add_rms_norm


# Dropout


define(
    "dropout(Tensor x, Tensor seed, float p, Tensor? residual) -> Tensor",
    _dropout,
    lambda x, seed, p, residual: x.new_empty(x.shape),
    KEYS,
)


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p, ctx.added = p, residual is not None
        return torch.ops.megatron_t5.dropout(x, seed, p, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        (seed,) = ctx.saved_tensors
        dropped = torch.ops.megatron_t5.dropout(gradient, seed, ctx.p, None)
        return dropped, None, None, gradient if ctx.added else None


def dropout(x: Tensor, p: float, stream: int = 0) -> Tensor:
    """Each element 0 with probability `p`, to the nearest 2**-16, otherwise scaled so that its mean is kept.

    Args:
        x: Any shape.
        p: In `[0, 1)`. With 0 the result is `x` itself and nothing is drawn.
        stream: Tells ranks apart that draw the same seed and are to drop different places.
    """
    assert supports(x) and 0.0 <= p < 1.0, (x.dtype, p)
    return x if p == 0.0 else _Dropout.apply(x, seed(stream), p, None)


def dropout_add(residual: Tensor, x: Tensor, p: float) -> Tensor:
    """`residual + dropout(x, p)`, of equal shapes and dtypes."""
    assert supports(x) and 0.0 <= p < 1.0, (x.dtype, p)
    assert residual.shape == x.shape and residual.dtype == x.dtype, (residual.shape, x.shape)
    return residual + x if p == 0.0 else _Dropout.apply(x, seed(), p, residual)


# Head and loss: without autograd


def softmax_statistics(logits: Tensor, labels: Tensor, log_z: Tensor, label_logit: Tensor) -> None:
    """Log-partition function and label's logit of each row; no autograd.

    Args:
        logits: `[r, v]`, fp32 or bf16, contiguous.
        labels: int64 `[r]`; one outside `[0, v)` means no column.
        log_z: fp32 `[r]`, is overwritten with `logsumexp(logits)`.
        label_logit: fp32 `[r]`, is overwritten with `logits[label]`, 0 where there is no such column.
    """
    assert supports(logits), (logits.device, logits.dtype)
    check_rows(logits, labels, log_z, label_logit)
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


def logits_gradient_(logits: Tensor, labels: Tensor, log_z: Tensor, label_scale: Tensor, softmax_scale: Tensor) -> None:
    """Overwrites logits by `softmax_scale * exp(logits - log_z) - label_scale * onehot(labels)`; no autograd.

    Args:
        logits: `[r, v]`, fp32 or bf16, contiguous.
        labels: int64 `[r]`; one outside `[0, v)` means no column.
        log_z: fp32 `[r]`, the log-partition function, of all ranks where they divide the columns.
        label_scale: fp32 `[r]`.
        softmax_scale: fp32 `[r]`.
    """
    assert supports(logits), (logits.device, logits.dtype)
    check_rows(logits, labels, log_z, label_scale, softmax_scale)
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


# Gradient norm


def sum_of_squares(tensor: Tensor) -> float:
    """Sum of the squares of all elements, in fp32 within blocks and in fp64 over them; no autograd."""
    assert supports(tensor), (tensor.device, tensor.dtype)
    tensor = tensor.detach().contiguous()
    return kernels.sum_of_squares(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.numel(), torch.get_num_threads())
