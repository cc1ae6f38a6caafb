"""Optimizers, loss scaling and learning-rate schedules."""

from collections.abc import Sequence

from megatron.core.config import OptimizerConfig
from megatron.core.errors import UserError
from megatron.core.optimizer.adafactor import Adafactor
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.adamw_scale import AdamWScale
from megatron.core.optimizer.base import Optimizer, Synchronize
from megatron.core.optimizer.loss_scaler import LossScaler
from megatron.core.optimizer.schedules import LearningRateSchedule
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ModelParameter

__all__ = [
    "Adafactor",
    "AdamW",
    "AdamWScale",
    "LearningRateSchedule",
    "LossScaler",
    "Optimizer",
    "Synchronize",
    "build_optimizer",
]

OPTIMIZERS = {"adamw": AdamW, "adamw-scale": AdamWScale, "adafactor": Adafactor}


def build_optimizer(
    config: OptimizerConfig,
    parameters: Sequence[ModelParameter],
    context: ParallelContext,
    synchronize: Synchronize | None = None,
) -> Optimizer:
    """The optimizer that `config` names, for `parameters` that are materialised and already sharded.

    `synchronize` is needed when other pipeline ranks hold copies of shared parameters (see `Synchronize`).
    """
    if config.optimizer == "adafactor" and config.optimizer_backend != "torch":
        raise UserError(
            f"--optimizer-backend {config.optimizer_backend} has no adafactor; use --optimizer-backend torch, or "
            "--optimizer adamw or adamw-scale"
        )
    return OPTIMIZERS[config.optimizer](config, parameters, context, synchronize)
