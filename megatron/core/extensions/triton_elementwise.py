"""Elementwise operations of the model on GPUs, each one pass over memory, forward and backward, by Triton kernels.

The same functions as those of `cpu_elementwise`. Arithmetic is fp32; a result is rounded once when it is stored, but
for the norm, whose weight multiplies in the input's precision, as in T5X. What a backward pass needs is computed again
from the inputs. The bits are the same in every run on the same GPU.

They are operators `torch.ops.megatron_t5.triton_*`, which torch.compile takes as they are. With `TRITON_INTERPRET=1`
in the environment the kernels run on CPUs, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.core.extensions.triton_interpreter import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = torch.library.Library("megatron_t5", "FRAGMENT")
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
# Numbers of a row, units, or logits that a program handles at once.
NORM_BLOCK, UNITS_BLOCK, LOGITS_BLOCK = 4096, 1024, 4096


def supports(tensor: Tensor) -> bool:
    """Whether the operations here take a tensor of this device and dtype."""
    return tensor.device.type in DEVICES and tensor.dtype in DTYPES


@cache
def _kernels() -> ModuleType:
    """Those of norms and activations; importing them needs triton."""
    from megatron.core.extensions import triton_elementwise_kernels

    return triton_elementwise_kernels


@cache
def _loss_kernels() -> ModuleType:
    from megatron.core.extensions import triton_cross_entropy_kernels

    return triton_cross_entropy_kernels


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """On the tensors' device, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines an operator of `torch.ops.megatron_t5`; `fake` gives the shapes and dtypes of its results."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    for key in ("CUDA", "CPU"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"megatron_t5::{name}", fake, lib=LIBRARY)


def _rows(x: Tensor) -> tuple[int, int]:
    """Rows and width of a tensor seen as a matrix."""
    return (x.numel() // x.shape[-1] if x.shape[-1] else 0), x.shape[-1]


def _warps(block: int) -> int:
    """Of 32 threads, each of which has eight numbers if the block is large enough, and more if it is very large."""
    return min(16, max(1, block // 256))


# Gated activation


def _gated(x: Tensor, activation: str) -> Tensor:
    x = x.contiguous()
    y = _gated_fake(x, activation)
    if y.numel():
        grid = (-(-y.numel() // UNITS_BLOCK),)
        _launch(_kernels().gated, grid, x.device, x, y, y.numel(), GELU=activation == "gelu", BLOCK=UNITS_BLOCK)
    return y


def _gated_fake(x: Tensor, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _gated_gradient(gradient: Tensor, x: Tensor, activation: str) -> Tensor:
    gradient, x = gradient.contiguous(), x.contiguous()
    x_gradient, units = torch.empty_like(x), gradient.numel()
    if units:
        grid, gelu = (-(-units // UNITS_BLOCK),), activation == "gelu"
        kernel = _kernels().gated_gradient
        _launch(kernel, grid, x.device, gradient, x, x_gradient, units, GELU=gelu, BLOCK=UNITS_BLOCK)
    return x_gradient


_define("triton_gated(Tensor x, str activation) -> Tensor", _gated, _gated_fake)
_define(
    "triton_gated_gradient(Tensor gradient, Tensor x, str activation) -> Tensor",
    _gated_gradient,
    lambda gradient, x, activation: x.new_empty(x.shape),
)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return torch.ops.megatron_t5.triton_gated(x, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.ops.megatron_t5.triton_gated_gradient(gradient, *ctx.saved_tensors, ctx.activation), None


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


# Normalisation


def _norm_options(width: int) -> dict[str, Any]:
    """How the kernels of norms are launched for rows of a width."""
    whole = width <= _kernels().WHOLE_ROW
    block = max(16, 1 << (width - 1).bit_length()) if whole else NORM_BLOCK
    return {"WHOLE": whole, "WIDTH": width, "BLOCK": block, "num_warps": _warps(block)}


def _programs(rows: int, device: torch.device, num_warps: int) -> int:
    """Programs that sum gradients of the weight: as many as run at once, as each leaves a row of sums."""
    if device.type != "cuda":
        return min(rows, 4)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(rows, multiprocessors * max(1, 24 // num_warps))


def _norm(
    residual: Tensor | None,
    branch: Tensor | None,
    total: Tensor,
    weight: Tensor,
    y: Tensor,
    epsilon: float,
    p: float,
    seed: Tensor | None,
) -> None:
    """Norm of `total` to `y`, after the sum that `total` is if there is a branch."""
    rows, width = _rows(total)
    if not rows:
        return
    flags = {"ADD": branch is not None, "DROP": seed is not None}
    arguments = (residual, branch, total, weight, y, seed, epsilon, p, 1.0 / (1.0 - p))
    _launch(_kernels().rms_norm, (rows,), total.device, *arguments, **flags, **_norm_options(width))


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    _norm(None, None, x, weight, y, epsilon, 0.0, None)
    return y


def _add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    residual, branch, weight = residual.contiguous(), branch.contiguous(), weight.contiguous()
    total, y = torch.empty_like(residual), torch.empty_like(residual, dtype=dtype)
    _norm(residual, branch, total, weight, y, epsilon, p, seed)
    return total, y


def _rms_norm_gradient(
    more: Tensor | None, gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, x, weight = gradient.contiguous(), x.contiguous(), weight.contiguous()
    more = None if more is None else more.contiguous()
    rows, width = _rows(x)
    x_gradient = torch.empty_like(x)
    branch_gradient = x.new_empty(0) if seed is None else torch.empty_like(x)
    if not rows:
        return x_gradient, branch_gradient, weight.new_zeros(weight.shape, dtype=torch.float32)
    options = _norm_options(width)
    programs = _programs(rows, x.device, options["num_warps"])
    start = torch.empty if options["WHOLE"] else torch.zeros
    partial = start((programs, width), dtype=torch.float32, device=x.device)
    flags = {"MORE": more is not None, "DROP": seed is not None}
    arguments = (more, gradient, x, weight, x_gradient, branch_gradient, partial, seed, rows, epsilon, p)
    kernel = _kernels().rms_norm_gradient
    _launch(kernel, (programs,), x.device, *arguments, 1.0 / (1.0 - p), **flags, **options)
    return x_gradient, branch_gradient, partial.sum(0)


def _rms_norm_gradient_fake(
    more: Tensor | None, gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    branch_gradient = x.new_empty(0 if seed is None else x.shape)
    return x.new_empty(x.shape), branch_gradient, weight.new_empty(weight.shape, dtype=torch.float32)


_define(
    "triton_rms_norm(Tensor x, Tensor weight, float epsilon, ScalarType dtype) -> Tensor",
    _rms_norm,
    lambda x, weight, epsilon, dtype: x.new_empty(x.shape, dtype=dtype),
)
_define(
    "triton_add_rms_norm(Tensor residual, Tensor branch, Tensor weight, float epsilon, ScalarType dtype, float p,"
    " Tensor? seed) -> (Tensor, Tensor)",
    _add_rms_norm,
    lambda residual, branch, weight, epsilon, dtype, p, seed: (
        residual.new_empty(residual.shape),
        residual.new_empty(residual.shape, dtype=dtype),
    ),
)
_define(
    "triton_rms_norm_gradient(Tensor? more, Tensor gradient, Tensor x, Tensor weight, float epsilon, float p,"
    " Tensor? seed) -> (Tensor, Tensor, Tensor)",
    _rms_norm_gradient,
    _rms_norm_gradient_fake,
)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return torch.ops.megatron_t5.triton_rms_norm(x, weight, epsilon, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        operator = torch.ops.megatron_t5.triton_rms_norm_gradient
        x_gradient, _, weight_gradient = operator(None, gradient, x, weight, ctx.epsilon, 0.0, None)
        return x_gradient, weight_gradient.to(weight.dtype), None, None


class _RMSNormBeside(Function):
    """The norm and its input, whose two gradients are then one pass instead of two and a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return x.view_as(x), torch.ops.megatron_t5.triton_rms_norm(x, weight, epsilon, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, also: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        operator = torch.ops.megatron_t5.triton_rms_norm_gradient
        x_gradient, _, weight_gradient = operator(also, gradient, x, weight, ctx.epsilon, 0.0, None)
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
        total, y = torch.ops.megatron_t5.triton_add_rms_norm(residual, branch, weight, epsilon, dtype, p, seed)
        ctx.save_for_backward(total, weight, seed)
        ctx.epsilon, ctx.p = epsilon, p
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_gradient: Tensor, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, seed = ctx.saved_tensors
        operator = torch.ops.megatron_t5.triton_rms_norm_gradient
        gradient, branch, weight_gradient = operator(
            total_gradient, y_gradient, total, weight, ctx.epsilon, ctx.p, seed
        )
        branch = gradient if seed is None else branch
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
        output_dtype: fp32, bf16 or fp16; that of `x` if not given.
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
        p: Probability of dropout, in `[0, 1)`. The seed is drawn from torch's default generator of the device, so
            that what restores its state for a recomputation drops the same, and the host does not wait for it.

    Returns:
        The sum, in the dtype of `residual`, and its norm; both `[..., h]`.
    """
    dtype = output_dtype or residual.dtype
    _check_norm(residual, weight, dtype)
    assert branch.shape == residual.shape and branch.dtype == residual.dtype, (branch.shape, residual.shape)
    assert 0.0 <= p < 1.0, p
    seed = torch.randint(2**62, (), dtype=torch.int64, device=residual.device) if p > 0.0 else None
    return _AddRMSNorm.apply(residual, branch, weight, epsilon, dtype, p, seed)


# Head and loss: without autograd


def _softmax_statistics(logits: Tensor, labels: Tensor, log_z: Tensor, label_logit: Tensor) -> None:
    rows, width = logits.shape
    if rows:
        arguments = (logits, labels, log_z, label_logit)
        kernel = _loss_kernels().softmax_statistics
        _launch(kernel, (rows,), logits.device, *arguments, WIDTH=width, BLOCK=LOGITS_BLOCK, num_warps=8)


def _logits_gradient(logits: Tensor, labels: Tensor, log_z: Tensor, label_scale: Tensor, softmax_scale: Tensor) -> None:
    rows, width = logits.shape
    if rows:
        grid = (rows, -(-width // LOGITS_BLOCK))
        arguments = (logits, labels, log_z, label_scale, softmax_scale)
        kernel = _loss_kernels().logits_gradient
        _launch(kernel, grid, logits.device, *arguments, WIDTH=width, BLOCK=LOGITS_BLOCK, num_warps=8)


_define(
    "triton_softmax_statistics(Tensor logits, Tensor labels, Tensor(a!) log_z, Tensor(b!) label_logit) -> ()",
    _softmax_statistics,
    lambda logits, labels, log_z, label_logit: None,
)
_define(
    "triton_logits_gradient_(Tensor(a!) logits, Tensor labels, Tensor log_z, Tensor label_scale,"
    " Tensor softmax_scale) -> ()",
    _logits_gradient,
    lambda logits, labels, log_z, label_scale, softmax_scale: None,
)


def _check_rows(logits: Tensor, labels: Tensor, *per_row: Tensor) -> None:
    assert supports(logits) and logits.ndim == 2 and logits.is_contiguous(), (logits.dtype, logits.shape)
    assert labels.dtype == torch.int64
    for tensor in (labels, *per_row):
        assert tensor.shape == logits.shape[:1] and tensor.is_contiguous(), (tensor.shape, logits.shape)
    assert all(tensor.dtype == torch.float32 for tensor in per_row)


def softmax_statistics(logits: Tensor, labels: Tensor, log_z: Tensor, label_logit: Tensor) -> None:
    """Log-partition function and label's logit of each row; no autograd.

    Args:
        logits: `[r, v]`, fp32, bf16 or fp16, contiguous.
        labels: int64 `[r]`; one outside `[0, v)` means no column.
        log_z: fp32 `[r]`, is overwritten with `logsumexp(logits)`.
        label_logit: fp32 `[r]`, is overwritten with `logits[label]`, 0 where there is no such column.
    """
    _check_rows(logits, labels, log_z, label_logit)
    torch.ops.megatron_t5.triton_softmax_statistics(logits, labels, log_z, label_logit)


def logits_gradient_(logits: Tensor, labels: Tensor, log_z: Tensor, label_scale: Tensor, softmax_scale: Tensor) -> None:
    """Overwrites logits by `softmax_scale * exp(logits - log_z) - label_scale * onehot(labels)`; no autograd.

    Args:
        logits: `[r, v]`, fp32, bf16 or fp16, contiguous.
        labels: int64 `[r]`; one outside `[0, v)` means no column.
        log_z: fp32 `[r]`, the log-partition function, of all ranks where they divide the columns.
        label_scale: fp32 `[r]`.
        softmax_scale: fp32 `[r]`.
    """
    _check_rows(logits, labels, log_z, label_scale, softmax_scale)
    torch.ops.megatron_t5.triton_logits_gradient_(logits, labels, log_z, label_scale, softmax_scale)
