"""The product of linear layers, in the dtype of their input whatever the dtype in which weights are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.extensions import cpu_linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`.

    Args:
        x: `[..., i]`.
        weight: `[o, i]`, any floating dtype; its gradient has that too.
        bias: `[o]`, in the dtype of `x`.
    """
    if cpu_linear.supports(x, weight) and torch.is_grad_enabled() and weight.requires_grad:
        product = cpu_linear.linear(x, weight)
        return product if bias is None else product + bias
    return F.linear(x, weight.to(x.dtype), bias)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight `[o, i]`, in the dtype of `x`, from that of the product `[..., o]` and `x` `[..., i]`."""
    if cpu_linear.supports(x, gradient.flatten(0, -2).T):
        return cpu_linear.weight_gradient(gradient, x, x.dtype)
    return gradient.flatten(0, -2).T @ x.flatten(0, -2)
