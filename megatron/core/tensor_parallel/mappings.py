"""How activations enter and leave the parts of the model that tensor-parallel ranks divide: collectives with gradients.

Each function is the identity on one side of the backward pass: what a rank's part of a product needs in the forward
pass and what its gradient needs in the backward pass are each other's transposes.

| forward | backward | where |
|---|---|---|
| identity | all-reduce | replicated input of a column-parallel product |
| all-reduce | identity | output of a row-parallel product |
| all-gather | reduce-scatter | sequence shards into a column-parallel product |
| reduce-scatter | all-gather | output of a row-parallel product to sequence shards |
| all-gather | own part | shards to a result that every rank uses alike |
| own part | all-gather | a replicated tensor to shards |

The collectives are out of place: a gradient may be held by somebody else, such as the hooks of a split backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Before torch 2.13 these had other names, which it deprecates.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks of `group`, without a gradient."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The ranks' parts joined along `dim`, without a gradient: `[b, s', h]` to `[b, s, h]` for dimension 1."""
    dim %= x.ndim
    parts = x.new_empty(group.size(), *x.shape)  # [tp, b, s', h]
    _all_gather_single(parts.view(-1), x.contiguous().view(-1), group=group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part along `dim` of the sum over the ranks, without a gradient: `[b, s, h]` to `[b, s', h]`."""
    dim %= x.ndim
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()  # [tp, b, s', h]
    own = torch.empty_like(parts[0])
    _reduce_scatter_single(own.view(-1), parts.view(-1), group=group)
    return own


def own_part(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of a replicated `x` along `dim`, without a gradient."""
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup, partial_gradient: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.partial_gradient = dim, group, partial_gradient
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        backward = reduce_scatter if ctx.partial_gradient else own_part
        return backward(grad, ctx.dim, ctx.group), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.dim, ctx.group), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return own_part(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.dim, ctx.group), None, None


def copy_to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` as it is; its gradient is the sum of the ranks' gradients."""
    result: Tensor = _Copy.apply(x, group)
    return result


def reduce_from_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks; the gradient passes as it is, equal on all of them."""
    result: Tensor = _Reduce.apply(x, group)
    return result


def gather_for_product(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The ranks' parts joined along `dim`; the ranks' gradients are summed, and each takes its part."""
    result: Tensor = _Gather.apply(x, dim, group, True)
    return result


def gather_for_all(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The ranks' parts joined along `dim`, for what all ranks do alike; each takes its part of the gradient."""
    result: Tensor = _Gather.apply(x, dim, group, False)
    return result


def reduce_scatter_from_ranks(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part along `dim` of the sum over the ranks; the gradient is gathered."""
    result: Tensor = _ReduceScatter.apply(x, dim, group)
    return result


def split_among_ranks(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part along `dim` of a replicated `x`; the gradient is gathered."""
    result: Tensor = _Split.apply(x, dim, group)
    return result
