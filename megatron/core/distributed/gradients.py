"""Norm of all gradients and clipping, counted once over all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor

from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor

CLIP_EPSILON = 1e-6  # as in Megatron-LM and torch


@torch.no_grad()
def global_grad_norm(parameters: Iterable[torch.Tensor], context: ParallelContext) -> torch.Tensor:
    """Euclidean norm of the gradients of all `parameters` on all ranks: 0-dimensional float64, the same on every rank.

    Sharded gradients are summed over the data-parallel ranks with one all-reduce; replicated ones count once.
    Parameters without a gradient count as zero. Non-finite gradients give a non-finite norm.
    """
    sharded: list[torch.Tensor] = []
    replicated: list[torch.Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (sharded if isinstance(parameter.grad, DTensor) else replicated).append(local_tensor(parameter.grad))
    total = _sum_of_squares(sharded, context.device)
    if context.dp_size > 1 and sharded:
        all_reduce(total, group=context.dp_group)
    return (total + _sum_of_squares(replicated, context.device)).sqrt()


def _sum_of_squares(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


@torch.no_grad()
def clip_gradients_(parameters: Iterable[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale all gradients in place by `max_norm / norm` if `norm`, of `global_grad_norm`, is larger than `max_norm`.

    Without a copy to the host when the gradients are on a GPU. A non-finite norm must have been dealt with before.
    """
    if norm.device.type == "cpu" and norm <= max_norm:
        return
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    coefficient = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
    torch._foreach_mul_(gradients, coefficient.to(gradients[0].dtype))
