"""`--gradient-accumulation-fusion`: weight gradients added to the sum over microbatches within their product.

What autograd does otherwise is a product rounded to bf16, its cast to fp32 and an addition, each a pass over memory of
the weights' size. cuBLAS adds a product of bf16 to an fp32 matrix at once: through apex's kernel, as in Megatron-LM,
where that is installed, else through torch's `addmm`, which has the same since 2.10.

Shapes: r rows, i input features, o output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.config import ComputeConfig
from megatron.core.errors import UserError
from megatron.core.extensions import apex, gpu_linear
from megatron.core.parameters import local_tensor


def check(compute: ComputeConfig, device: torch.device, gathers_parameters: bool) -> None:
    """Raise `UserError` for a run that `accumulating_linear` does not fit.

    Neither do pipeline schedules that put the gradients of weights off, which are refused for any product that computes
    them at once.

    Args:
        compute: The run's.
        device: Where the products run.
        gathers_parameters: Whether FSDP2 holds the parameters, which reduces gradients of its own.
    """
    others = {
        "--compile": compute.compile,
        "--cuda-graphs": compute.cuda_graphs,
        "--fp8-format": compute.fp8_format is not None,
        "--transformer-impl transformer_engine": compute.transformer_impl != "local",
        "--data-parallel-sharding-strategy other than no_shard": gathers_parameters,
    }
    for other, given in others.items():
        if given:
            raise UserError(f"--gradient-accumulation-fusion does not go with {other}; remove one of them")
    if device.type not in apex.DEVICES:
        raise UserError(f"--gradient-accumulation-fusion needs a GPU, and this run is on {device.type}; remove it")


def accumulating_linear(parameter: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """`x W^T (+ b)`, whose backward pass adds the weight's gradient to the parameter's in fp32.

    What has been accumulated so far goes to the kernel and comes back as this pass's gradient: autograd takes it
    without a copy, and whatever waits for a parameter's gradient to be whole is told as always.

    Args:
        parameter: Gives the fp32 parameter, plain or a DTensor, whose local part is the weight of every call.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, cast: Tensor | None = None) -> Tensor:
        if cast is None:
            cast = weight.detach().to(x.dtype)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return F.linear(x, cast, bias)
        product: Tensor = _AccumulatingLinear.apply(x, weight, cast, parameter)
        return product if bias is None else product + bias

    return linear


class _AccumulatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cast: Tensor, parameter: Callable[[], Tensor]) -> Tensor:
        assert weight.dtype == torch.float32 and cast.dtype == x.dtype
        ctx.save_for_backward(x, cast)
        ctx.parameter = parameter
        return F.linear(x, cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, cast = ctx.saved_tensors
        x_gradient = gradient @ cast if ctx.needs_input_grad[0] else None
        total = _take_gradient(ctx.parameter())
        return x_gradient, _added(total, x.flatten(0, -2), gradient.flatten(0, -2)), None, None


def _take_gradient(parameter: Tensor) -> Tensor | None:
    """This rank's part of what has been accumulated, which is no longer the parameter's."""
    gradient = parameter.grad
    if gradient is None:
        return None
    parameter.grad = None
    return local_tensor(gradient).contiguous()


def _added(total: Tensor | None, x: Tensor, gradient: Tensor) -> Tensor:
    """`total + gradient^T x` of fp32 `[o, i]`, `[r, i]` and `[r, o]`, in the memory of `total` if there is one."""
    if apex.has_weight_gradient_kernel():
        if total is None:
            total = x.new_zeros(gradient.shape[1], x.shape[1], dtype=torch.float32)
        apex.add_weight_gradient(x.contiguous(), gradient.contiguous(), total)
        return total
    if total is None:
        return gpu_linear.weight_gradient(gradient, x)
    return torch.addmm(total, gradient.T, x, out_dtype=torch.float32, out=total)
