"""Elementwise operations of the model on GPUs, each one pass over memory, forward and backward, by Triton kernels.

The same functions as those of `cpu_elementwise`. Arithmetic is fp32; a result is rounded once when it is stored, but
for the norm, whose weight multiplies in the input's precision, as in T5X. What a backward pass needs is computed again
from the inputs. The bits are the same in every run on the same GPU.

They are operators `torch.ops.megatron_t5.triton_*`, which torch.compile takes as they are. With `TRITON_INTERPRET=1`
in the environment the kernels run on CPUs, slowly, for tests.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron.core.extensions.fused_elementwise import (
    ElementwiseFunctions,
    check_rows,
    define,
    define_operators,
    fake_gated,
    rows_and_width,
)
from megatron.core.extensions.triton_interpreter import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PREFIX, KEYS = "triton_", ("CUDA", "CPU")
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


def _warps(block: int) -> int:
    """Of 32 threads, each of which has eight numbers if the block is large enough, and more if it is very large."""
    return min(16, max(1, block // 256))


# Gated activation


def _gated(x: Tensor, activation: str) -> Tensor:
    x = x.contiguous()
    y = fake_gated(x, activation)
    if y.numel():
        grid = (-(-y.numel() // UNITS_BLOCK),)
        _launch(_kernels().gated, grid, x.device, x, y, y.numel(), GELU=activation == "gelu", BLOCK=UNITS_BLOCK)
    return y


def _gated_gradient(gradient: Tensor, x: Tensor, activation: str) -> Tensor:
    gradient, x = gradient.contiguous(), x.contiguous()
    x_gradient, units = torch.empty_like(x), gradient.numel()
    if units:
        grid, gelu = (-(-units // UNITS_BLOCK),), activation == "gelu"
        kernel = _kernels().gated_gradient
        _launch(kernel, grid, x.device, gradient, x, x_gradient, units, GELU=gelu, BLOCK=UNITS_BLOCK)
    return x_gradient


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
    rows, width = rows_and_width(total)
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
    rows, width = rows_and_width(x)
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


define_operators(
    PREFIX,
    KEYS,
    gated=_gated,
    gated_gradient=_gated_gradient,
    rms_norm=_rms_norm,
    add_rms_norm=_add_rms_norm,
    rms_norm_gradient=_rms_norm_gradient,
)


def _draw_seed(device: torch.device) -> Tensor:
    """On the device, so that the host does not wait for it."""
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


FUNCTIONS = ElementwiseFunctions(PREFIX, supports, DTYPES, _draw_seed)
gated_activation = FUNCTIONS.gated_activation
rms_norm = FUNCTIONS.rms_norm
rms_norm_beside = FUNCTIONS.rms_norm_beside
add_rms_norm = FUNCTIONS.add_rms_norm


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


define(
    f"{PREFIX}softmax_statistics(Tensor logits, Tensor labels, Tensor(a!) log_z, Tensor(b!) label_logit) -> ()",
    _softmax_statistics,
    lambda logits, labels, log_z, label_logit: None,
    KEYS,
)
define(
    f"{PREFIX}logits_gradient_(Tensor(a!) logits, Tensor labels, Tensor log_z, Tensor label_scale,"
    " Tensor softmax_scale) -> ()",
    _logits_gradient,
    lambda logits, labels, log_z, label_scale, softmax_scale: None,
    KEYS,
)


def softmax_statistics(logits: Tensor, labels: Tensor, log_z: Tensor, label_logit: Tensor) -> None:
    """Log-partition function and label's logit of each row; no autograd.

    Args:
        logits: `[r, v]`, fp32, bf16 or fp16, contiguous.
        labels: int64 `[r]`; one outside `[0, v)` means no column.
        log_z: fp32 `[r]`, is overwritten with `logsumexp(logits)`.
        label_logit: fp32 `[r]`, is overwritten with `logits[label]`, 0 where there is no such column.
    """
    assert supports(logits), (logits.device, logits.dtype)
    check_rows(logits, labels, log_z, label_logit)
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
    assert supports(logits), (logits.device, logits.dtype)
    check_rows(logits, labels, log_z, label_scale, softmax_scale)
    torch.ops.megatron_t5.triton_logits_gradient_(logits, labels, log_z, label_scale, softmax_scale)
