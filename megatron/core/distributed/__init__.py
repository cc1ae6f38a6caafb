"""Data parallelism, gradient norm and clipping."""

from megatron.core.distributed.data_parallel import DataParallel, ShardingStrategy
from megatron.core.distributed.gradients import clip_gradients_, global_grad_norm

__all__ = ["DataParallel", "ShardingStrategy", "clip_gradients_", "global_grad_norm"]
