"""The product of linear layers, in the dtype of their input whatever the dtype in which weights are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.extensions import cpu_linear, gpu_linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, cast: Tensor | None = None) -> Tensor:
    """`x W^T + b`.

    Args:
        x: `[..., i]`.
        weight: `[o, i]`, any floating dtype; its gradient has that too.
        bias: `[o]`, in the dtype of `x`.
        cast: An fp32 weight in the dtype of `x`, if there is one already; the gradient is not rounded to it then.
    """
    if cast is not None:
        return gpu_linear.linear(x, weight, bias, cast)
    if cpu_linear.supports(x, weight) and torch.is_grad_enabled() and weight.requires_grad:
        product = cpu_linear.linear(x, weight)
        return product if bias is None else product + bias
    return F.linear(x, weight.to(x.dtype), bias)


def weight_gradient(gradient: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Gradient of the weight `[o, i]` from that of the product `[..., o]` and `x` `[..., i]`.

    Args:
        gradient: In the dtype of `x`.
        x: The product's input.
        dtype: Of the result: fp32, or that of `x`, which it is if not given.
    """
    if cpu_linear.supports(x, gradient.flatten(0, -2).T):
        return cpu_linear.weight_gradient(gradient, x, dtype or x.dtype)
    if dtype not in (None, x.dtype):
        return gpu_linear.weight_gradient(gradient, x)
    return gradient.flatten(0, -2).T @ x.flatten(0, -2)
