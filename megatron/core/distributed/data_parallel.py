"""Data parallelism: replicas whose gradients are summed once a step for small models, FSDP2 for large ones.

Gradients are summed over the ranks, not averaged: the loss is already divided by the global number of target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron.core.config import ComputeConfig
from megatron.core.distributed.gradient_reduction import GradientReduction
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor

ShardingStrategy = Literal["no_shard", "optim", "optim_grads", "optim_grads_params"]

# Up to this many bytes of fp32 parameters, replicas are faster than shards and their memory does not matter.
REPLICATE_BELOW_MIB = 256
# FSDP2 pays a fixed cost a unit and step, so consecutive blocks share a unit until it holds this much.
MIN_UNIT_MIB = 16


def default_sharding_strategy(parameter_bytes: int) -> ShardingStrategy:
    """What suits ranks that hold `parameter_bytes` of fp32 parameters: `no_shard` for small ones, else `optim_grads`.

    All pipeline ranks must use the same strategy, since they may share parameters: give the largest rank's size.
    """
    return "no_shard" if parameter_bytes < REPLICATE_BELOW_MIB * 2**20 else "optim_grads"


class DataParallel:
    """Makes the data-parallel ranks compute one step of a model, or of one stage of it, together.

    Construct it before the parameters are materialised (the meta device is fine), after tensor parallelism has divided
    them, and before the optimizer is built. Call `set_gradient_sync(last)` before each microbatch (not under a pipeline
    schedule, which does so itself) and `reduce_gradients()` after the last backward of a step.

    * `no_shard`: every rank keeps all parameters and optimizer state, as a single process does. Gradients are summed in
      buckets within the last backward.
    * `optim` (ZeRO-1): parameters and optimizer state are sharded with FSDP2. All parameters are gathered once a step
      and all gradients reduced once, together, at the end of its last backward: the fewest and largest collectives.
    * `optim_grads` (ZeRO-2): gradients are reduced layer by layer within the last backward. Parameters are gathered
      layer by layer, and once a step too.
    * `optim_grads_params` (ZeRO-3): parameters of blocks are released after each use and gathered again for the
      backward pass. What is outside them is in use to the end of the forward pass and from the start of the backward
      pass, so it is gathered once a microbatch. Not for the split backward pass of torch's zero-bubble schedules, which
      then loses gradients; ours (`core.pipeline_parallel.runtime`) does not.

    Args:
        model: The model or stage; sharded in place.
        context: The layout. A single data-parallel rank needs nothing done.
        compute: Precision; with bf16 or fp16, shards are gathered in it and gradients reduced in fp32.
        blocks: The repeated layers in the order in which they run; what is not in them forms the outermost unit.
        strategy: One of the above. Default: by the size of `model`.

    Attributes:
        unit_bytes: Of each FSDP2 unit, its parameters in fp32 before they are sharded; empty for replicas.
        overlaps: Whether replicas sum gradients while the last backward goes on, or all of them after it; to be changed
            between steps only, and alike on all ranks.
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
        self.strategy: ShardingStrategy = strategy or default_sharding_strategy(parameter_bytes(model))
        self.unit_bytes: list[int] = []
        self.overlaps = True
        self._reduction: GradientReduction | None = None
        if context.dp_size > 1 and self.strategy != "no_shard":
            self._shard(compute, blocks)

    def _shard(self, compute: ComputeConfig, blocks: Sequence[nn.Module]) -> None:
        assert self.context.mesh is not None
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if compute.bf16 else torch.float16 if compute.fp16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the model decides what is computed in fp32
        )
        layers = [] if self.strategy == "optim" else group_blocks(blocks, MIN_UNIT_MIB * 2**20)
        self.unit_bytes = [sum(map(parameter_bytes, unit)) for unit in layers]
        self.unit_bytes.append(parameter_bytes(self.model) - sum(self.unit_bytes))
        root: list[nn.Module] = [self.model]
        for unit in [*layers, root]:
            released = self.strategy == "optim_grads_params" and unit is not root
            fully_shard(
                unit,
                mesh=self.context.mesh["dp"],
                reshard_after_forward=released,
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
        elif self.overlaps and (reduction := self._reduction_of_replicas()) is not None and enabled:
            reduction.start()

    def reduce_gradients(self) -> None:
        """Finish the sum of the gradients over the ranks, after the last backward of a step.

        FSDP2 has done it in the backward pass. Replicas wait here for what that has begun, and sum the rest.
        """
        if (reduction := self._reduction_of_replicas()) is not None:
            reduction.finish()

    def reshard(self) -> None:
        """Release the gathered parameters after forward passes that no backward pass follows, which would do it.

        They would hold memory, and the next forward pass would take them for the present ones.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _reduction_of_replicas(self) -> GradientReduction | None:
        """Made when it is first needed: materialising a model replaces its parameters."""
        group = self.context.dp_group
        if self._reduction is None and self.strategy == "no_shard" and group is not None and group.size() > 1:
            self._reduction = GradientReduction(self.model.parameters(), group)
        return self._reduction


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
        size += parameter_bytes(block)
    if len(groups) > 1 and size < min_bytes:
        last = groups.pop()
        groups[-1].extend(last)
    return groups


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of the parts of the parameters that this rank holds, in fp32."""
    return sum(4 * local_tensor(parameter.detach()).numel() for parameter in module.parameters())
