"""Linear layers of fp32 weights in bf16 or fp16 on GPUs: one cast a step, and weight gradients straight to fp32.

Autograd alone casts a weight in each microbatch (6 bytes a number), writes its gradient in 16 bits, casts that and adds
it to the sum over microbatches (20 bytes). Here the cast weight comes from outside, made once a step, and the product
that gives the gradient is not rounded before it is written: 16 bytes are left, and 4 in the first microbatch. The
gradient is the more exact one of the two.

Shapes: r rows, i input features, o output features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

DEVICES = ("cuda",)

LIBRARY = torch.library.Library("megatron_t5", "FRAGMENT")
LIBRARY.define("float_weight_gradient(Tensor gradient, Tensor x) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, cast: Tensor) -> Tensor:
    """`x W^T (+ b)`.

    Args:
        x: `[..., i]`.
        weight: fp32 `[o, i]`; it gets the gradient, and is not read.
        bias: `[o]`, in the dtype of `x`.
        cast: The weight in the dtype of `x`.
    """
    assert cast.dtype == x.dtype and weight.dtype == torch.float32, (x.dtype, cast.dtype, weight.dtype)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, cast, bias)
    product: Tensor = _Linear.apply(x, weight, cast, bias)
    return product


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient^T x` of `[..., o]` and `[..., i]`: fp32 `[o, i]`, of which no summand was rounded.

    An operator of its own, which torch.compile leaves as it is: inductor has compiled products with another dtype than
    their factors' wrongly (pytorch issue 163880).
    """
    result: Tensor = torch.ops.megatron_t5.float_weight_gradient(gradient, x)
    return result


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cast: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, cast)
        return F.linear(x, cast, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None]:
        x, cast = ctx.saved_tensors
        x_gradient = gradient @ cast if ctx.needs_input_grad[0] else None
        bias_gradient = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return x_gradient, weight_gradient(gradient, x), None, bias_gradient


def _on_gpu(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.mm(gradient.flatten(0, -2).T, x.flatten(0, -2), out_dtype=torch.float32)


def _on_cpu(gradient: Tensor, x: Tensor) -> Tensor:
    """The same for tests: products of 16-bit numbers are exact in fp32."""
    return gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()


LIBRARY.impl("float_weight_gradient", _on_gpu, "CUDA")
LIBRARY.impl("float_weight_gradient", _on_cpu, "CPU")
torch.library.register_fake(
    "megatron_t5::float_weight_gradient",
    lambda gradient, x: x.new_empty(gradient.shape[-1], x.shape[-1], dtype=torch.float32),
    lib=LIBRARY,
)
