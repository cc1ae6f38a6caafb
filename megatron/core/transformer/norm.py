"""Normalisation over the hidden dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.extensions import cpu_elementwise
from megatron.core.parameters import Init, ParamSpec, local_tensor
from megatron.core.transformer.elementwise import add_dropout
from megatron.core.transformer.precision import compute_dtype

ONES = ParamSpec(("embed",), Init("constant", (1.0,)), weight_decay=False)
ZEROS = ParamSpec(("embed",), Init("constant", (0.0,)), weight_decay=False)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight`: no mean, no bias (Zhang and Sennrich 2019), as T5 has it.

    The statistics are fp32 whatever the dtype of `x`.

    Args:
        hidden_size: Width of the input.
        epsilon: Added to the mean square.
        output_dtype: Dtype of the result; that of the input if not given.
    """

    def __init__(self, hidden_size: int, epsilon: float, output_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.parameter_specs = {"weight": ONES}
        self.epsilon = epsilon
        self.output_dtype = output_dtype

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`."""
        weight, dtype = local_tensor(self.weight), self.output_dtype or x.dtype
        if self._on_cpu(x, dtype):
            return cpu_elementwise.rms_norm(x, weight, self.epsilon, dtype)
        # The weight multiplies after the cast back, as in T5X.
        return (F.rms_norm(x, self.weight.shape, eps=self.epsilon) * weight.to(x.dtype)).to(dtype)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` and its norm, `[..., h]` each, for where both go on."""
        dtype = self.output_dtype or x.dtype
        if self._on_cpu(x, dtype):
            return cpu_elementwise.rms_norm_beside(x, local_tensor(self.weight), self.epsilon, dtype)
        return x, self(x)

    def add(self, residual: Tensor, branch: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """`residual + dropout(branch, p)` and its norm, `[..., h]` each."""
        dtype = self.output_dtype or residual.dtype
        if self._on_cpu(residual, dtype) and branch.dtype == residual.dtype:
            weight = local_tensor(self.weight)
            return cpu_elementwise.add_rms_norm(residual, branch, weight, self.epsilon, dtype, p)
        total = add_dropout(residual, branch, p)
        return total, self(total)

    def _on_cpu(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether there is one operator for it."""
        return cpu_elementwise.supports(x) and cpu_elementwise.supports(self.weight) and dtype in cpu_elementwise.DTYPES


class LayerNorm(nn.Module):
    """Layer normalisation with weight and bias, an option that T5 does not use; arguments as of `RMSNorm`."""

    def __init__(self, hidden_size: int, epsilon: float, output_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.parameter_specs = {"weight": ONES, "bias": ZEROS}
        self.epsilon = epsilon
        self.output_dtype = output_dtype

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`."""
        weight, bias = local_tensor(self.weight).to(x.dtype), local_tensor(self.bias).to(x.dtype)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.epsilon).to(self.output_dtype or x.dtype)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` and its norm, `[..., h]` each, for where both go on."""
        return x, self(x)

    def add(self, residual: Tensor, branch: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """`residual + dropout(branch, p)` and its norm, `[..., h]` each."""
        total = add_dropout(residual, branch, p)
        return total, self(total)


def build_norm(config: ModelConfig, compute: ComputeConfig) -> RMSNorm | LayerNorm:
    """The normalisation that `--normalization` names, from the residual stream to the dtype of matrix products."""
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    return norm(config.hidden_size, config.norm_epsilon, compute_dtype(compute))
