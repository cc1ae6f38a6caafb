"""Normalisation over the hidden dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.parameters import Init, ParamSpec

ONES = ParamSpec(("embed",), Init("constant", (1.0,)), weight_decay=False)
ZEROS = ParamSpec(("embed",), Init("constant", (0.0,)), weight_decay=False)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight`: no mean, no bias (Zhang and Sennrich 2019), as T5 has it.

    The statistics are fp32 whatever the dtype of `x`; the weight multiplies after the cast back, as in T5X.
    """

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.parameter_specs = {"weight": ONES}
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`."""
        return F.rms_norm(x, self.weight.shape, eps=self.epsilon) * self.weight.to(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation with weight and bias, an option that T5 does not use."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.parameter_specs = {"weight": ONES, "bias": ZEROS}
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.epsilon)


def build_norm(config: ModelConfig) -> nn.Module:
    """The normalisation that `--normalization` names."""
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    return norm(config.hidden_size, config.norm_epsilon)
