"""Data parallelism, gradient norm and clipping."""

from megatron.core.distributed.data_parallel import (
    ShardingStrategy,
    reduce_gradients,
    set_gradient_sync,
    shard_data_parallel,
)
from megatron.core.distributed.gradients import clip_gradients, global_grad_norm

__all__ = [
    "ShardingStrategy",
    "clip_gradients",
    "global_grad_norm",
    "reduce_gradients",
    "set_gradient_sync",
    "shard_data_parallel",
]
