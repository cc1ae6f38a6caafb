"""Initial distributions of matrices: T5X's variance scaling, or one standard deviation for all (Megatron-LM's way)."""

from __future__ import annotations

from megatron.core.config import ModelConfig
from megatron.core.parameters import Init


def matrix_init(config: ModelConfig, *stds: float, truncated: bool = False) -> Init:
    """Normal distribution of logical matrices.

    Args:
        config: `init_method_std` replaces all of `stds` when it is set.
        stds: T5X's standard deviation of each logical matrix.
        truncated: Cut at two standard deviations, as T5X does in the feed-forward block and the head.
    """
    if config.init_method_std is not None:
        return Init("normal", (config.init_method_std,) * len(stds))
    return Init("truncated_normal" if truncated else "normal", stds)


def residual_output_init(config: ModelConfig, std: float, num_layers: int, *, truncated: bool = False) -> Init:
    """Distribution of a matrix that writes into the residual stream of a stack of `num_layers` layers.

    With `init_method_std` its standard deviation is divided by sqrt(2 num_layers), as in GPT-2 and Megatron-LM.
    """
    if config.init_method_std is not None:
        return Init("normal", (config.init_method_std / (2 * num_layers) ** 0.5,))
    return matrix_init(config, std, truncated=truncated)
