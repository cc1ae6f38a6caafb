"""Data parallelism: replicas with one all-reduce a step for small models, FSDP2 for large ones.

Gradients are summed over the ranks, not averaged: the loss is already divided by the global number of target tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn
from torch.distributed import all_reduce
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron.core.config import ComputeConfig
from megatron.core.parallel_state import ParallelContext

ShardingStrategy = Literal["no_shard", "optim_grads", "optim_grads_params"]

# Up to this many bytes of fp32 parameters, replicas are faster than shards and their memory does not matter.
REPLICATE_BELOW_MIB = 256
# FSDP2 pays a fixed cost a unit and step, so consecutive blocks share a unit until it holds this much.
MIN_UNIT_MIB = 16
# Replicas sum their gradients in buffers of at most this size, or that of the largest gradient.
BUFFER_MIB = 64


def shard_data_parallel(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    context: ParallelContext,
    compute: ComputeConfig,
    strategy: ShardingStrategy | None = None,
) -> None:
    """Prepare `model`, in place, for training on the data-parallel ranks.

    Call it before the parameters are materialised (the meta device is fine) and before the optimizer is built.

    * `no_shard`: every rank keeps all parameters and optimizer state, as a single process does.
    * `optim_grads` (ZeRO-2): parameters, gradients and optimizer state are sharded with FSDP2; parameters stay
      gathered between the forward and the backward pass.
    * `optim_grads_params` (ZeRO-3): parameters are gathered again for the backward pass.

    Args:
        model: The model.
        blocks: The repeated layers in the order in which they run; what is not in them forms the outermost unit.
        context: The layout. A single data-parallel rank needs nothing done.
        compute: Precision; with bf16, shards are gathered in bf16 and gradients reduced in fp32.
        strategy: One of the above. Default: `no_shard` for models below `REPLICATE_BELOW_MIB`, else `optim_grads`.
    """
    if strategy is None:
        strategy = "no_shard" if _parameter_bytes(model) < REPLICATE_BELOW_MIB * 2**20 else "optim_grads"
    if context.dp_size == 1 or strategy == "no_shard":
        return
    assert context.mesh is not None
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if compute.bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the model decides what is computed in fp32
    )
    reshard = strategy == "optim_grads_params"
    for unit in [*group_blocks(blocks, MIN_UNIT_MIB * 2**20), model]:
        fully_shard(unit, mesh=context.mesh["dp"], reshard_after_forward=reshard, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Say, before each microbatch, whether it is the last of the step.

    Before the last one, each rank accumulates its own gradients in fp32 and nothing is communicated.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


@torch.no_grad()
def reduce_gradients(parameters: Iterable[nn.Parameter], context: ParallelContext) -> None:
    """Finish the sum of the gradients over the ranks, after the last backward of a step.

    FSDP2 has done it in the backward pass. Gradients of replicas are copied into fp32 buffers, which are summed in one
    all-reduce each and then serve as the gradients. All ranks must have gradients for the same parameters.
    """
    if context.dp_size == 1:
        return
    with_gradient = [p for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    for bucket in _buckets(with_gradient, BUFFER_MIB * 2**20):
        buffer = torch.cat([p.grad.flatten() for p in bucket])  # type: ignore[union-attr]
        all_reduce(buffer, group=context.dp_group)
        for parameter, piece in zip(bucket, buffer.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = piece.view_as(parameter)


def _buckets(parameters: Iterable[nn.Parameter], max_bytes: int) -> list[list[nn.Parameter]]:
    """Consecutive parameters, joined as long as they fit into `max_bytes`."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if parameter.nbytes > room:
            buckets.append([])
            room = max_bytes
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets


def group_blocks(blocks: Sequence[nn.Module], min_bytes: int) -> list[list[nn.Module]]:
    """Consecutive blocks, joined until each group holds at least `min_bytes` of fp32 parameters.

    A last group that is too small joins the one before.
    """
    groups: list[list[nn.Module]] = []
    size = min_bytes
    for block in blocks:
        if size >= min_bytes:
            groups.append([])
            size = 0
        groups[-1].append(block)
        size += _parameter_bytes(block)
    if len(groups) > 1 and size < min_bytes:
        last = groups.pop()
        groups[-1].extend(last)
    return groups


def _parameter_bytes(module: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in module.parameters())
