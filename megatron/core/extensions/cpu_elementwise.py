"""Elementwise operations of the model on CPUs, each one pass over memory, forward and backward.

Arithmetic is fp32 and is rounded once, when a result is stored. The results do not depend on the number of threads.
`supports` says which tensors they take; others are for torch's own operations.

Those with a gradient are autograd functions over operators `torch.ops.megatron_t5.*`, which torch.compile takes as they
are. (An operator with registered autograd does the same; a call of it takes about twice as long.) What a backward pass
needs is computed again from the inputs: no activation is kept but these, dropout keeps eight bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# The kernels resolve OpenMP's symbols in the runtime that torch has loaded by now: one pool of threads, not two.
from megatron.core.extensions import elementwise_kernels as kernels
from megatron.core.extensions.seeds import seed

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LIBRARY = torch.library.Library("megatron_t5", "FRAGMENT")


def supports(tensor: Tensor) -> bool:
    """Whether the operations here take a tensor of this device and dtype."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines an operator of `torch.ops.megatron_t5`; `fake` gives the shapes and dtypes of its results."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"megatron_t5::{name}", fake, lib=LIBRARY)


def _rows(x: Tensor) -> tuple[int, int]:
    """Rows and width of a tensor seen as a matrix."""
    return (x.numel() // x.shape[-1] if x.shape[-1] else 0), x.shape[-1]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# Gated activation


def _gated(x: Tensor, activation: str) -> Tensor:
    x = x.contiguous()
    y = _gated_fake(x, activation)
    kernels.gated(x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], activation, y.numel(), torch.get_num_threads())
    return y


def _gated_fake(x: Tensor, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


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


def _gated_gradient_fake(gradient: Tensor, x: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape)


_define("gated(Tensor x, str activation) -> Tensor", _gated, _gated_fake)
_define("gated_gradient(Tensor gradient, Tensor x, str activation) -> Tensor", _gated_gradient, _gated_gradient_fake)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return torch.ops.megatron_t5.gated(x, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.ops.megatron_t5.gated_gradient(gradient, *ctx.saved_tensors, ctx.activation), None


def gated_activation(x: Tensor, kind: str) -> Tensor:
    """`activation(gate) * up` where gate and up lie side by side.

    Args:
        x: `[..., 2 f]`, `(unit, gate|up)` along the last dimension.
        kind: `gated-gelu` (its tanh form) or `gated-silu`.

    Returns:
        `[..., f]`.
    """
    assert supports(x) and x.shape[-1] % 2 == 0 and kind in ("gated-gelu", "gated-silu"), (x.dtype, x.shape, kind)
    return _Gated.apply(x, kind.removeprefix("gated-"))


# Dropout


def _dropout(x: Tensor, seed: Tensor, p: float, residual: Tensor | None) -> Tensor:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    kernels.dropout(
        _address(residual),
        x.data_ptr(),
        y.data_ptr(),
        DTYPES[x.dtype],
        *_rows(x),
        p,
        seed.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _dropout_fake(x: Tensor, seed: Tensor, p: float, residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


_define("dropout(Tensor x, Tensor seed, float p, Tensor? residual) -> Tensor", _dropout, _dropout_fake)


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


# Normalisation


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    x, weight = x.contiguous(), weight.float().contiguous()
    y = torch.empty_like(x, dtype=dtype)
    _call_norm(None, None, x, weight, y, epsilon, 0.0, None)
    return y


def _rms_norm_fake(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    residual, branch, weight = residual.contiguous(), branch.contiguous(), weight.float().contiguous()
    total, y = torch.empty_like(residual), torch.empty_like(residual, dtype=dtype)
    _call_norm(residual, branch, total, weight, y, epsilon, p, seed)
    return total, y


def _add_rms_norm_fake(
    residual: Tensor, branch: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape, dtype=dtype)


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
        *_rows(total),
        epsilon,
        p,
        _address(seed),
        torch.get_num_threads(),
    )


def _rms_norm_gradient(
    more: Tensor | None, gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
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
        *_rows(x),
        epsilon,
        torch.get_num_threads(),
    )
    return x_gradient, weight_gradient


def _rms_norm_gradient_fake(
    more: Tensor | None, gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


_define("rms_norm(Tensor x, Tensor weight, float epsilon, ScalarType dtype) -> Tensor", _rms_norm, _rms_norm_fake)
_define(
    "add_rms_norm(Tensor residual, Tensor branch, Tensor weight, float epsilon, ScalarType dtype, float p,"
    " Tensor? seed) -> (Tensor, Tensor)",
    _add_rms_norm,
    _add_rms_norm_fake,
)
_define(
    "rms_norm_gradient(Tensor? more, Tensor gradient, Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    _rms_norm_gradient,
    _rms_norm_gradient_fake,
)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return torch.ops.megatron_t5.rms_norm(x, weight, epsilon, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        x_gradient, weight_gradient = torch.ops.megatron_t5.rms_norm_gradient(None, gradient, x, weight, ctx.epsilon)
        return x_gradient, weight_gradient.to(weight.dtype), None, None


class _RMSNormBeside(Function):
    """The norm and its input, whose two gradients are then one pass instead of two and a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return x.view_as(x), torch.ops.megatron_t5.rms_norm(x, weight, epsilon, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, also: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        x_gradient, weight_gradient = torch.ops.megatron_t5.rms_norm_gradient(also, gradient, x, weight, ctx.epsilon)
        return x_gradient, weight_gradient.to(weight.dtype), None, None


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor,
        weight: Tensor,
        epsilon: float,
        dtype: torch.dtype,
        p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        total, y = torch.ops.megatron_t5.add_rms_norm(residual, branch, weight, epsilon, dtype, p, seed)
        ctx.save_for_backward(total, weight, seed)
        ctx.epsilon, ctx.p = epsilon, p
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_gradient: Tensor, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, seed = ctx.saved_tensors
        gradient, weight_gradient = torch.ops.megatron_t5.rms_norm_gradient(
            total_gradient, y_gradient, total, weight, ctx.epsilon
        )
        branch = gradient if seed is None else torch.ops.megatron_t5.dropout(gradient, seed, ctx.p, None)
        return gradient, branch, weight_gradient.to(weight.dtype), None, None, None, None


def _check_norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    assert supports(x) and supports(weight) and dtype in DTYPES, (x.dtype, weight.dtype, dtype)
    assert weight.shape == x.shape[-1:], (weight.shape, x.shape)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, output_dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension.

    Args:
        x: `[..., h]`.
        weight: `[h]`; its gradient is summed in fp32.
        epsilon: Added to the mean square.
        output_dtype: fp32 or bf16; that of `x` if not given.
    """
    dtype = output_dtype or x.dtype
    _check_norm(x, weight, dtype)
    return _RMSNorm.apply(x, weight, epsilon, dtype)


def rms_norm_beside(
    x: Tensor, weight: Tensor, epsilon: float, output_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`x` itself and `rms_norm(x, ...)`, for where both are used."""
    dtype = output_dtype or x.dtype
    _check_norm(x, weight, dtype)
    return _RMSNormBeside.apply(x, weight, epsilon, dtype)


def add_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    epsilon: float,
    output_dtype: torch.dtype | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`total = residual + dropout(branch, p)` and `rms_norm(total, weight, epsilon, output_dtype)`.

    Args:
        residual: `[..., h]`.
        branch: Of the same shape and dtype.
        weight: As of `rms_norm`.
        epsilon: As of `rms_norm`.
        output_dtype: Dtype of the norm; that of `residual` if not given.
        p: As of `dropout`.

    Returns:
        The sum, in the dtype of `residual`, and its norm; both `[..., h]`.
    """
    dtype = output_dtype or residual.dtype
    _check_norm(residual, weight, dtype)
    assert branch.shape == residual.shape and branch.dtype == residual.dtype, (branch.shape, residual.shape)
    assert 0.0 <= p < 1.0, p
    return _AddRMSNorm.apply(residual, branch, weight, epsilon, dtype, p, seed() if p > 0.0 else None)


# Head and loss: without autograd


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


# Gradient norm


def sum_of_squares(tensor: Tensor) -> float:
    """Sum of the squares of all elements, in fp32 within blocks and in fp64 over them; no autograd."""
    assert supports(tensor), (tensor.device, tensor.dtype)
    tensor = tensor.detach().contiguous()
    return kernels.sum_of_squares(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.numel(), torch.get_num_threads())
