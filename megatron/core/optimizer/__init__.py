"""Optimizers and learning-rate schedules."""

from torch import nn

from megatron.core.config import OptimizerConfig
from megatron.core.optimizer.adafactor import Adafactor
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.adamw_scale import AdamWScale
from megatron.core.optimizer.base import Optimizer
from megatron.core.optimizer.schedules import LearningRateSchedule
from megatron.core.parallel_state import ParallelContext

__all__ = ["Adafactor", "AdamW", "AdamWScale", "LearningRateSchedule", "Optimizer", "build_optimizer"]

OPTIMIZERS = {"adamw": AdamW, "adamw-scale": AdamWScale, "adafactor": Adafactor}


def build_optimizer(config: OptimizerConfig, model: nn.Module, context: ParallelContext) -> Optimizer:
    """The optimizer that `config` names, for a model whose parameters are materialised and already sharded."""
    return OPTIMIZERS[config.optimizer](config, model, context)
