"""Gradients of a step, after the data-parallel sum: replicas under sequence parallelism, the norm, clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.distributed import all_reduce

from megatron.core.distributed.flat_all_reduce import all_reduce_gradients_
from megatron.core.extensions import cpu_elementwise
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ModelParameter, counted_here, local_tensor, sharded_axes

CLIP_EPSILON = 1e-6  # as in Megatron-LM and torch


def sum_replicated_gradients_(parameters: Sequence[ModelParameter], context: ParallelContext) -> None:
    """Sum the gradients of tensor-parallel replicas over tp, in one all-reduce: what sequence parallelism needs.

    Each tensor-parallel rank has seen a part of the sequence only, and so have its norm weights, row biases and
    position tables. Without sequence parallelism their gradients are whole on every rank; then do not call it.
    """
    replicated = [p.parameter for p in parameters if "tp" not in sharded_axes(p.parameter)]
    all_reduce_gradients_(replicated, context.tp_group)


class GradientNorm(NamedTuple):
    """Of the gradients of a step.

    Attributes:
        total: Euclidean norm of the gradients of the whole model: 0-dimensional float64, the same bits on every rank.
        squares: Sums of squares of this rank's parts of gradients, loss scale included, float64 `[g]`; not finite
            where the gradient is not.
        indices: Which parameters those are, g of them.
    """

    total: torch.Tensor
    squares: torch.Tensor
    indices: list[int]


def global_grad_norm(
    parameters: Sequence[ModelParameter],
    context: ParallelContext,
    loss_scale: float = 1.0,
    loss_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """`total` of `measure_gradients`."""
    return measure_gradients(parameters, context, loss_scale, loss_sums).total


@torch.no_grad()
def measure_gradients(
    parameters: Sequence[ModelParameter],
    context: ParallelContext,
    loss_scale: float = 1.0,
    loss_sums: torch.Tensor | None = None,
) -> GradientNorm:
    """Norms of the gradients, without waiting for a GPU.

    One all-reduce over all ranks; a shard counts where it lies, replicas and copies of shared parameters count once.
    Parameters without a gradient count as zero. A gradient that is not finite, on any rank and even where it does not
    count, gives a norm that is not finite, and so does a loss: a step is good or bad for all ranks alike.

    Args:
        parameters: What this rank holds.
        context: The layout.
        loss_scale: Factor by which the gradients are too large; the norm is that of the gradients without it.
        loss_sums: The step's losses on this rank, of any shape.
    """
    counted: list[int] = []
    others: list[int] = []
    for index, p in enumerate(parameters):
        if p.parameter.grad is not None:
            counts = counted_here(p.parameter, context) and not p.is_copy
            (counted if counts else others).append(index)
    indices = counted + others if context.world_size > 1 else counted
    gradients = [gradient for i in indices if (gradient := parameters[i].parameter.grad) is not None]
    squares = _sums_of_squares(list(map(local_tensor, gradients)), context.device)
    total = _sum(squares[: len(counted)])
    if loss_sums is not None:
        total += 0.0 * loss_sums.sum()  # zero, or nan when it is not finite
    if context.world_size > 1:
        total += 0.0 * _sum(squares[len(counted) :])
        all_reduce(total)
    return GradientNorm(total.sqrt() / loss_scale, squares, indices)


def _sums_of_squares(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Of each tensor: float64 `[g]`."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if all(map(cpu_elementwise.supports, tensors)):
        return torch.tensor(list(map(cpu_elementwise.sum_of_squares, tensors)), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(tensors)).double().square()


def _sum(squares: torch.Tensor) -> torch.Tensor:
    """0-dimensional float64 of `[g]`; on CPUs rounded once."""
    if squares.is_cpu:
        return torch.tensor(math.fsum(squares.tolist()), dtype=torch.float64)
    return squares.sum()


@torch.no_grad()
def gradient_divisor(norm: torch.Tensor, max_norm: float, loss_scale: float = 1.0) -> torch.Tensor | None:
    """What the optimizer divides all gradients by, to take out the loss scale and clip them; None: by nothing.

    Without a copy to the host when the gradients are on a GPU. Of a norm that is not finite it means nothing: such a
    step is to be skipped.

    Args:
        norm: Of the gradients without the loss scale, as `global_grad_norm` returns it.
        max_norm: The gradients are scaled to it when `norm` is larger; 0 leaves them as they are.
        loss_scale: Factor by which the gradients are too large.
    """
    clips = max_norm > 0 and (norm.device.type != "cpu" or bool(norm > max_norm))
    if not clips:
        return None if loss_scale == 1.0 else torch.full_like(norm, loss_scale)
    return loss_scale * ((norm + CLIP_EPSILON) / max_norm).clamp(min=1.0)
