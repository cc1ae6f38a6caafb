"""Products that give the gradients of weights, put off until a schedule has time for them.

Zero-bubble schedules (Qi et al. 2023) run the backward pass of a stage in two parts: gradients of the input, for which
the stage before waits, and gradients of the weights, for which nobody does until the end of the step. Here the first
part is the ordinary backward pass, from which the linear layers leave out their weights' products, and the second part
is those products. So nothing is computed twice, whatever else is in the graph: fused attention, recomputed layers,
collectives, parameters that FSDP2 has released in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron.core.tensor_parallel.products import weight_gradient

LinearFunction: TypeAlias = Callable[..., Tensor]  # input, weight, maybe bias, maybe the weight in the input's dtype


class DeferredWeightGradients:
    """Collects the products of the backward passes of the layers whose linear function is `linear`."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor, GradientEdge, torch.dtype]] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, cast: Tensor | None = None) -> Tensor:
        """As `products.linear`, with the weight's gradient put off.

        Args:
            x: `[..., in_features]`.
            weight: `[out_features, in_features]`, a parameter or made from one by views and casts, any floating dtype.
            bias: `[out_features]`; its gradient is not put off.
            cast: As of `products.linear`.
        """
        if cast is None:
            weight = cast = weight.to(x.dtype)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return F.linear(x, cast, bias)
        result: Tensor = _Linear.apply(x, weight, cast, bias, self, get_gradient_edge(weight))
        return result

    def put_off(self, x: Tensor, gradient: Tensor, weight: GradientEdge, dtype: torch.dtype) -> None:
        """Remember a product: the input and the output's gradient of a linear layer, and where the result goes."""
        self._pending.append((x, gradient, weight, dtype))

    def take(self) -> Callable[[], None]:
        """What has been put off since the last call, as a function that computes it and adds it to the gradients."""
        pending, self._pending = self._pending, []

        def compute() -> None:
            pending.reverse()
            while pending:  # each input is freed with its product
                x, gradient, weight, dtype = pending.pop()
                product = weight_gradient(gradient, x, dtype)  # [out_features, in_features]
                # Through the cast or view that made the weight, to the parameter.
                torch.autograd.backward((weight,), (product,))

        return compute


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        cast: Tensor,
        bias: Tensor | None,
        deferred: DeferredWeightGradients,
        weight_edge: GradientEdge,
    ) -> Tensor:
        ctx.save_for_backward(x, cast)
        ctx.deferred, ctx.weight_edge, ctx.weight_dtype = deferred, weight_edge, weight.dtype
        return F.linear(x, cast, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        x, cast = ctx.saved_tensors
        ctx.deferred.put_off(x.detach(), gradient.detach(), ctx.weight_edge, ctx.weight_dtype)
        x_gradient = gradient @ cast if ctx.needs_input_grad[0] else None
        bias_gradient = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return x_gradient, None, None, bias_gradient, None, None
