"""Whether the backends that a run asks for compute what it needs, before there is a model (docs/backends.md)."""

from __future__ import annotations

import torch

from megatron.core.config import ComputeConfig, DataConfig
from megatron.core.distributed import ShardingStrategy
from megatron.core.errors import UserError
from megatron.core.extensions import torchao_fp8, transformer_engine
from megatron.core.extensions.attention import AttentionRequest, attention_backend, choose_attention
from megatron.core.extensions.elementwise import (
    check_elementwise,
    choose_activation,
    choose_cross_entropy,
    choose_norm,
)
from megatron.core.extensions.packages import require
from megatron.core.parallel_state import ParallelContext
from megatron.core.transformer.precision import compute_dtype
from megatron.training.config import RunConfig
from megatron.training.cuda_graphs import check_cuda_graphs
from megatron.training.linear_products import check_products


def check_packages(compute: ComputeConfig) -> None:
    """Raise `UserError` for a package that a flag names and that is not there; before processes meet or data is read.

    What NVIDIA's packages need besides, such as a GPU, is for `check_backends` to say.
    """
    transformer_engine.check_package(compute)
    if compute.fp8_format is not None and compute.transformer_impl == "local":
        torchao_fp8.check(compute)
    if compute.attention_backend != "auto":
        package = attention_backend(compute.attention_backend).package
        if package is not None:
            require(f"--attention-backend {compute.attention_backend}", package, "use --attention-backend auto")
    choose_norm(compute)
    choose_activation(compute)
    choose_cross_entropy(compute.cross_entropy_backend)


def check_backends(config: RunConfig, context: ParallelContext, strategy: ShardingStrategy) -> None:
    """Raise `UserError` for a backend that cannot compute this run on this device.

    Args:
        config: The run.
        context: The layout.
        strategy: What data-parallel ranks divide.
    """
    check_attention(config, context.device)
    check_products(config, context.device)  # --transformer-impl chooses norms, too, and is to be named first
    check_elementwise(config.compute, context.device, compute_dtype(config.compute) or torch.float32)
    if config.compute.cuda_graphs:
        check_cuda_graphs(config, context, strategy)


def has_segments(data: DataConfig) -> bool:
    """Whether rows hold several samples, or padding."""
    return data.packing == "segments" or data.objective == "text-to-text"


def check_attention(config: RunConfig, device: torch.device) -> None:
    """Raise `UserError` for an attention backend that does not compute what the run needs."""
    model, parallel, compute = config.model, config.parallel, config.compute
    divided = parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel
    for has_diagonals in {model.position_embedding_type == "relative", False}:  # cross-attention has none
        request = AttentionRequest(
            device,
            compute_dtype(compute) or torch.float32,
            model.kv_channels,
            has_diagonals=has_diagonals,
            has_segments=has_segments(config.data),
            dropout=model.attention_dropout,
            compiled=compute.compile,
            divided=divided,
        )
        backend = choose_attention(compute.attention_backend, request)
        if reason := backend.refuses(request):
            raise UserError(f"--attention-backend {backend.name}, which is all that is left here, {reason}")
