"""Kernels of NVIDIA's apex: Adam over many tensors, RMSNorm, weight gradients that are added up within their product.

Only its compiled extensions are needed, and `apex.normalization` for the norm. All tensors stay ours, so parameters,
optimizer state and checkpoints are the same as without it. Each `check_*` says what a flag needs before a run starts;
apex itself is imported when a kernel is called. `gradient_accumulation` uses the last of them.

Shapes: r rows, i input features, o output features, h hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core.errors import UserError
from megatron.core.extensions.packages import installed

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


def has_weight_gradient_kernel() -> bool:
    """Whether `add_weight_gradient` can be called."""
    return installed("fused_weight_gradient_mlp_cuda")


def add_weight_gradient(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    """`total += gradient^T x`, within the product.

    Args:
        x: `[r, i]`, contiguous; bf16, fp16 or fp32.
        gradient: `[r, o]`, contiguous, in the dtype of `x`.
        total: `[o, i]`, contiguous, fp32.
    """
    import fused_weight_gradient_mlp_cuda

    fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, gradient, total)
