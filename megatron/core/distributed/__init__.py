"""Data parallelism, gradient norm and clipping."""

from megatron.core.distributed.data_parallel import DataParallel, ShardingStrategy, default_sharding_strategy
from megatron.core.distributed.flat_all_reduce import all_reduce_gradients_
from megatron.core.distributed.gradient_reduction import GradientReduction
from megatron.core.distributed.gradients import (
    GradientNorm,
    global_grad_norm,
    gradient_divisor,
    measure_gradients,
    sum_replicated_gradients_,
)
from megatron.core.distributed.shared_parameters import SharedParameters

__all__ = [
    "DataParallel",
    "GradientNorm",
    "GradientReduction",
    "ShardingStrategy",
    "SharedParameters",
    "all_reduce_gradients_",
    "default_sharding_strategy",
    "global_grad_norm",
    "gradient_divisor",
    "measure_gradients",
    "sum_replicated_gradients_",
]
