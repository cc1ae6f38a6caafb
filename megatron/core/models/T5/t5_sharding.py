"""Which mesh axis divides which logical axis of the model's parameters."""

from __future__ import annotations

from torch import nn

from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import shard_parameters

# Logical axes (`ParamSpec.axes`) that are not listed ("embed", "positions", "buckets") are whole on every rank.
MESH_AXIS = {"vocab": "tp", "heads": "tp", "mlp": "tp"}


def shard_t5(model: nn.Module, context: ParallelContext) -> None:
    """Divide the parameters of `model`, on the meta device, among the tensor-parallel ranks; nothing for a single one.

    Build `model` with `TensorParallel.of` the same layout, and give it to `DataParallel` afterwards.
    """
    if context.tp_size > 1:
        assert context.mesh is not None
        shard_parameters(model, context.mesh["tp"], MESH_AXIS)
