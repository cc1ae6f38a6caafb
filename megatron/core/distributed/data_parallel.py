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

from megatron.core.config import ComputeConfig
from megatron.core.parallel_state import ParallelContext

ShardingStrategy = Literal["no_shard", "optim_grads", "optim_grads_params"]

# Up to this many bytes of fp32 parameters, replicas are faster than shards and their memory does not matter.
REPLICATE_BELOW_MIB = 256
# FSDP2 pays a fixed cost a unit and step, so consecutive blocks share a unit until it holds this much.
MIN_UNIT_MIB = 16
# Replicas sum their gradients in buffers of at most this size, or that of the largest gradient.
BUFFER_MIB = 64


class DataParallel:
    """Makes the data-parallel ranks compute one step together.

    Construct it before the parameters are materialised (the meta device is fine) and before the optimizer is built.
    Call `set_gradient_sync(last)` before each microbatch and `reduce_gradients()` after the last backward of a step.

    * `no_shard`: every rank keeps all parameters and optimizer state, as a single process does.
    * `optim_grads` (ZeRO-2): parameters, gradients and optimizer state are sharded with FSDP2; parameters stay
      gathered between the forward and the backward pass.
    * `optim_grads_params` (ZeRO-3): parameters are gathered again for the backward pass.

    Args:
        model: The model; sharded in place.
        context: The layout. A single data-parallel rank needs nothing done.
        compute: Precision; with bf16, shards are gathered in bf16 and gradients reduced in fp32.
        blocks: The repeated layers in the order in which they run; what is not in them forms the outermost unit.
        strategy: One of the above. Default: `no_shard` for models below `REPLICATE_BELOW_MIB`, else `optim_grads`.
    """

    def __init__(
        self,
        model: nn.Module,
        context: ParallelContext,
        compute: ComputeConfig,
        blocks: Sequence[nn.Module] = (),
        strategy: ShardingStrategy | None = None,
    ) -> None:
        self.model = model
        self.context = context
        small = _parameter_bytes(model) < REPLICATE_BELOW_MIB * 2**20
        self.strategy: ShardingStrategy = strategy or ("no_shard" if small else "optim_grads")
        if context.dp_size > 1 and self.strategy != "no_shard":
            self._shard(compute, blocks)

    def _shard(self, compute: ComputeConfig, blocks: Sequence[nn.Module]) -> None:
        assert self.context.mesh is not None
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if compute.bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the model decides what is computed in fp32
        )
        for unit in [*group_blocks(blocks, MIN_UNIT_MIB * 2**20), [self.model]]:
            fully_shard(
                unit,
                mesh=self.context.mesh["dp"],
                reshard_after_forward=self.strategy == "optim_grads_params",
                mp_policy=policy,
            )
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor

    def set_gradient_sync(self, enabled: bool) -> None:
        """Say, before each microbatch, whether it is the last of the step.

        Before the last one, each rank accumulates its own gradients in fp32 and nothing is reduced.
        """
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(enabled)
            # Parameters do not change between the microbatches of a step, so they need not be gathered again.
            self.model.set_reshard_after_backward(enabled or self.strategy == "optim_grads_params")

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Finish the sum of the gradients over the ranks, after the last backward of a step.

        FSDP2 has done it in the backward pass. Gradients of replicas are copied into buffers, which are summed in one
        all-reduce each and then serve as the gradients. A parameter without a gradient must be so on all ranks.
        """
        if self.context.dp_size == 1 or isinstance(self.model, FSDPModule):
            return
        with_gradient = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        for bucket in _buckets(with_gradient, BUFFER_MIB * 2**20):
            buffer = torch.cat([parameter.grad.flatten() for parameter in bucket])  # type: ignore[union-attr]
            all_reduce(buffer, group=self.context.dp_group)
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
