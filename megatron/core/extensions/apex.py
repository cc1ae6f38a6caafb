"""Kernels of NVIDIA's apex: Adam over many tensors, RMSNorm, weight gradients that are added up within their product.

Only its compiled extensions are needed, and `apex.normalization` for the norm. All tensors stay ours, so parameters,
optimizer state and checkpoints are the same as without it. Each `check_*` says what a flag needs before a run starts;
apex itself is imported when a kernel is called.

Shapes: r rows, i input features, o output features, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.config import ComputeConfig
from megatron.core.errors import UserError
from megatron.core.extensions.packages import installed
from megatron.core.parameters import local_tensor

# That the kernels run on; tests add the CPU, where a double computes.
DEVICES = {"cuda"}
NORM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Numbers of a tensor that one block of the Adam kernel updates: apex's own.
CHUNK_SIZE = 2048 * 32
DECOUPLED_WEIGHT_DECAY = 1
CORRECT_BIAS = 1


def _require(setting: str, device: torch.device, extensions: Sequence[str], otherwise: str) -> None:
    """Raise `UserError` where the kernels of `extensions` cannot run."""
    if device.type not in DEVICES:
        raise UserError(f"{setting} needs a GPU, and this run is on {device.type}; {otherwise}")
    for extension in extensions:
        if not installed(extension):
            raise UserError(
                f"{setting} needs NVIDIA's apex, of which {extension} is not installed; {otherwise}, or build apex in "
                "a checkout of github.com/NVIDIA/apex: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install "
                "--no-build-isolation ."
            )


# Adam


def check_adam(device: torch.device) -> None:
    """Raise `UserError` when `adam` cannot run here."""
    _require("--optimizer-backend apex", device, ["amp_C"], "use --optimizer-backend torch")


def adam(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    step_count: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One step of AdamW, in place; nothing waits for the GPU.

    The kernel has the betas in fp32, so that `1 - beta2` is 5e-5 off for 0.999: the second moments are as much larger
    than torch's, and so are their bias corrections.

    Args:
        parameters: fp32, contiguous, less than 2^31 numbers each.
        gradients: Of the same shapes; divided by `divisor` afterwards.
        exp_avg: First moments.
        exp_avg_sq: Second moments.
        step_count: Number of this step, from 1; 0-dimensional.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times the learning rate.
        divisor: Of the gradients, 0-dimensional.
        skip: 0-dimensional bool: change nothing.
    """
    import amp_C

    assert all(p.dtype == torch.float32 and p.numel() < 2**31 for p in parameters)
    device = parameters[0].device
    do_nothing = torch.zeros(1, dtype=torch.int32, device=device) if skip is None else skip.to(torch.int32)
    scale = torch.ones(1, device=device) if divisor is None else divisor.double().reciprocal().float()
    amp_C.multi_tensor_adam_capturable(
        CHUNK_SIZE,
        do_nothing,
        [gradients, parameters, exp_avg, exp_avg_sq],
        torch.full((1,), lr, dtype=torch.float32, device=device),
        *betas,
        eps,
        step_count.to(torch.int32),
        DECOUPLED_WEIGHT_DECAY,
        CORRECT_BIAS,
        weight_decay,
        scale,
    )


# RMSNorm


def check_norm(device: torch.device) -> None:
    """Raise `UserError` when `rms_norm` cannot run here."""
    _require("--norm-backend apex", device, ["apex", "fused_layer_norm_cuda"], "use --norm-backend torch")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm, whose weight multiplies after the cast back from fp32, as in T5X; compiles.

    Args:
        x: `[..., h]`, one of `NORM_DTYPES`.
        weight: `[h]`, any floating dtype.
        epsilon: Added to the mean square.
        dtype: Of the result.
    """
    from apex.normalization import fused_layer_norm

    result: Tensor = fused_layer_norm.fused_rms_norm_affine(x, weight.to(x.dtype), list(weight.shape), epsilon)
    return result.to(dtype)


# Weight gradients


def check_gradient_accumulation_fusion(compute: ComputeConfig, device: torch.device, gathers_parameters: bool) -> None:
    """Raise `UserError` for a run that `accumulating_linear` does not fit.

    Neither do pipeline schedules that put the gradients of weights off, which are refused for any product that computes
    them at once.

    Args:
        compute: The run's.
        device: Where the products run.
        gathers_parameters: Whether FSDP2 holds the parameters, which reduces gradients of its own.
    """
    flag, otherwise = "--gradient-accumulation-fusion", "remove the flag"
    others = {
        "--compile": compute.compile,
        "--cuda-graphs": compute.cuda_graphs,
        "--fp8-format": compute.fp8_format is not None,
        "--transformer-impl transformer_engine": compute.transformer_impl != "local",
        "--data-parallel-sharding-strategy other than no_shard": gathers_parameters,
    }
    for other, given in others.items():
        if given:
            raise UserError(f"{flag} does not go with {other}; {otherwise}")
    _require(flag, device, ["fused_weight_gradient_mlp_cuda"], otherwise)


def accumulating_linear(parameter: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """`x W^T (+ b)` of bf16 or fp16, whose backward pass adds the weight's gradient to the parameter's in fp32.

    There is no gradient in the dtype of `x`, no cast of it and no addition in a pass of its own. What has been
    accumulated so far goes to the kernel and comes back as this pass's gradient: autograd takes it without a copy, and
    whatever waits for a parameter's gradient to be whole is told as always.

    Args:
        parameter: Gives the fp32 parameter, plain or a DTensor, whose local part is the weight of every call.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return F.linear(x, weight.to(x.dtype), bias)
        product: Tensor = _AccumulatingLinear.apply(x, weight, parameter)
        return product if bias is None else product + bias

    return linear


class _AccumulatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parameter: Callable[[], Tensor]) -> Tensor:
        assert weight.dtype == torch.float32
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.parameter = parameter
        return F.linear(x, cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        import fused_weight_gradient_mlp_cuda as kernels

        x, cast = ctx.saved_tensors
        x_gradient = gradient @ cast if ctx.needs_input_grad[0] else None
        total = _take_gradient(ctx.parameter())  # [o, i]
        if total is None:
            total = torch.zeros_like(cast, dtype=torch.float32)
        kernels.wgrad_gemm_accum_fp32(x.flatten(0, -2).contiguous(), gradient.flatten(0, -2).contiguous(), total)
        return x_gradient, total, None


def _take_gradient(parameter: Tensor) -> Tensor | None:
    """This rank's part of what has been accumulated, which is no longer the parameter's."""
    gradient = parameter.grad
    if gradient is None:
        return None
    parameter.grad = None
    return local_tensor(gradient).contiguous()
