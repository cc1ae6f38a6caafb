"""Normalisation over the hidden dimension."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.extensions import torch_elementwise
from megatron.core.extensions.elementwise import Implementations, choose_norm
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
        implementations: What computes it; those of `auto` if not given.
    """

    def __init__(
        self,
        hidden_size: int,
        epsilon: float,
        output_dtype: torch.dtype | None = None,
        implementations: Implementations | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.parameter_specs = {"weight": ONES}
        self.epsilon = epsilon
        self.output_dtype = output_dtype
        self.implementations = choose_norm(ComputeConfig()) if implementations is None else implementations

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`."""
        weight, dtype = local_tensor(self.weight), self.output_dtype or x.dtype
        module = self.implementations.module(x, weight, dtype=dtype)
        normed: Tensor = module.rms_norm(x, weight, self.epsilon, dtype)
        return normed

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` and its norm, `[..., h]` each, for where both go on."""
        weight, dtype = local_tensor(self.weight), self.output_dtype or x.dtype
        if (kernel := self.implementations.kernel(x, weight, dtype=dtype)) is None:
            return x, self(x)
        both: tuple[Tensor, Tensor] = kernel.rms_norm_beside(x, weight, self.epsilon, dtype)
        return both

    def add(self, residual: Tensor, branch: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """`residual + dropout(branch, p)` and its norm, `[..., h]` each."""
        weight, dtype = local_tensor(self.weight), self.output_dtype or residual.dtype
        kernel = self.implementations.kernel(residual, weight, dtype=dtype)
        if kernel is None or branch.dtype != residual.dtype:
            total = add_dropout(residual, branch, p)
            return total, self(total)
        both: tuple[Tensor, Tensor] = kernel.add_rms_norm(residual, branch, weight, self.epsilon, dtype, p)
        return both


class LayerNorm(nn.Module):
    """Layer normalisation with weight and bias, an option that T5 does not use; arguments as of `RMSNorm`.

    Its implementation is a module with a function `layer_norm`, by default torch's.
    """

    def __init__(
        self,
        hidden_size: int,
        epsilon: float,
        output_dtype: torch.dtype | None = None,
        implementation: ModuleType = torch_elementwise,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.parameter_specs = {"weight": ONES, "bias": ZEROS}
        self.epsilon = epsilon
        self.output_dtype = output_dtype
        self.implementation = implementation

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`."""
        weight, bias, dtype = local_tensor(self.weight), local_tensor(self.bias), self.output_dtype or x.dtype
        normed: Tensor = self.implementation.layer_norm(x, weight, bias, self.epsilon, dtype)
        return normed

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` and its norm, `[..., h]` each, for where both go on."""
        return x, self(x)

    def add(self, residual: Tensor, branch: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """`residual + dropout(branch, p)` and its norm, `[..., h]` each."""
        total = add_dropout(residual, branch, p)
        return total, self(total)


def build_norm(config: ModelConfig, compute: ComputeConfig) -> RMSNorm | LayerNorm:
    """The normalisation that `--normalization` names, from the residual stream to the dtype of matrix products.

    Raises:
        UserError: `--norm-backend` does not compute it.
    """
    size, epsilon, dtype = config.hidden_size, config.norm_epsilon, compute_dtype(compute)
    implementations = choose_norm(compute)
    if config.normalization == "RMSNorm":
        return RMSNorm(size, epsilon, dtype, implementations)
    module = implementations.plain
    if module is None or not hasattr(module, "layer_norm"):
        raise UserError(
            f"{implementations.setting} computes RMSNorm, not --normalization {config.normalization}; "
            "use --norm-backend auto"
        )
    return LayerNorm(size, epsilon, dtype, module)
