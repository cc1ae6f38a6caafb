"""Feed-forward blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.tensor_parallel import TensorParallel
from megatron.core.transformer.mlp import MLP


def build(activation: Any, backend: Any) -> MLP:
    config = ModelConfig(encoder_num_layers=1, hidden_size=16, num_attention_heads=2, activation_function=activation)
    with torch.device("meta"):
        return MLP(config, ComputeConfig(activation_backend=backend), 1, TensorParallel())


def test_kernels_of_gates_are_refused_without_gates() -> None:
    message = "--activation-backend cpu computes gated activations, not --activation-function relu; use"
    with pytest.raises(UserError, match=message):
        build("relu", "cpu")
    for activation, backend in (("relu", "auto"), ("relu", "torch"), ("gated-gelu", "cpu")):
        build(activation, backend)
