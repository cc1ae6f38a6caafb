"""Other products for the linear layers of the blocks: Transformer Engine's, and FP8; and 16-bit copies of weights.

Embeddings, the head and attention scores never take part in FP8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.distributed.fsdp import FSDPModule

from megatron.core.config import ComputeConfig
from megatron.core.errors import UserError
from megatron.core.extensions import gpu_linear, gradient_accumulation, torchao_fp8, transformer_engine
from megatron.core.extensions.fp8 import check_fp8
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_pipeline import SCHEDULES
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor
from megatron.core.tensor_parallel import Linear
from megatron.core.transformer.precision import compute_dtype
from megatron.training.config import RunConfig


def check_products(config: RunConfig, device: torch.device) -> None:
    """Raise `UserError` for layers or FP8 that this run cannot have, before there is a model."""
    transformer_engine.check(config.compute, config.parallel, device)
    check_fp8(config.compute, config.model, config.parallel.tensor_model_parallel_size, device)
    if config.compute.fp8_format is not None and config.compute.transformer_impl == "local":
        torchao_fp8.check(config.compute)
    delayed = config.compute.fp8_format is not None and config.compute.fp8_recipe == "delayed"
    if delayed and config.training.check_determinism_interval is not None:
        raise UserError(
            "--check-determinism-interval does not go with --fp8-recipe delayed, whose scales change from one "
            "computation of a step to the next; remove one of them"
        )
    schedule = config.parallel.pipeline_schedule
    if has_products(config.compute) and schedule != "auto" and SCHEDULES[schedule].splits_backward:
        raise UserError(
            f"--pipeline-schedule {schedule} puts weight gradients off, which does not go with --fp8-format, "
            "--transformer-impl transformer_engine or --gradient-accumulation-fusion; use interleaved or auto"
        )


def has_products(compute: ComputeConfig) -> bool:
    """Whether linear layers get a product of their own, which computes weight gradients at once."""
    return (
        compute.transformer_impl == "transformer_engine"
        or compute.fp8_format is not None
        or compute.gradient_accumulation_fusion
    )


def install_products(stages: Sequence[T5Model], config: RunConfig, context: ParallelContext) -> None:
    """Give the linear layers of the stages their products."""
    compute = config.compute
    if not has_products(compute):
        return
    if compute.gradient_accumulation_fusion:
        gathers = any(isinstance(stage, FSDPModule) for stage in stages)
        gradient_accumulation.check(compute, context.device, gathers)
        for layer, _ in _linear_layers(stages, config):
            layer.product = gradient_accumulation.accumulating_linear(partial(getattr, layer, "weight"))
        return
    if compute.transformer_impl == "local":
        product = torchao_fp8.product(compute)  # one for all: layers that compute the same share compiled code
        for layer, in_fp8 in _linear_layers(stages, config):
            if in_fp8:
                layer.product = product
        return
    recipe = None
    if compute.fp8_format is not None:
        recipe = transformer_engine.Recipe(compute, context.dp_tp_group)
    for layer, in_fp8 in _linear_layers(stages, config):
        layer.product = transformer_engine.LinearProduct(recipe, in_fp8)
    if recipe is not None and recipe.remembers:
        for stage in stages:
            transformer_engine.PassRegion(recipe).attach(stage)


def cached_products(stages: Sequence[T5Model]) -> list[transformer_engine.LinearProduct]:
    """Those that can keep FP8 weights from one microbatch of a step to the next."""
    products = (layer.product for stage in stages for layer in stage.modules() if isinstance(layer, Linear))
    return [each for each in products if isinstance(each, transformer_engine.LinearProduct) and each.fp8]


class CastWeights:
    """16-bit copies of fp32 weights that this rank holds whole, for all passes until the weights change.

    They are no parameters and in no checkpoint. `refresh` comes before the passes that follow a change.

    Args:
        layers: Linear layers, each of which finds its copy in `cast`. Their weights are where they will stay.
        dtype: Of the copies.
    """

    def __init__(self, layers: Sequence[Linear], dtype: torch.dtype) -> None:
        self._layers = layers
        self._copies = [torch.empty_like(weight, dtype=dtype) for weight in self._weights()]
        for layer, copy in zip(layers, self._copies, strict=True):
            layer.cast = copy

    def _weights(self) -> list[torch.Tensor]:
        return [local_tensor(layer.weight.detach()) for layer in self._layers]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the copies equal to the weights, in place."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._weights())


def cast_weights(stages: Sequence[T5Model], config: RunConfig, context: ParallelContext) -> CastWeights:
    """Copies for the layers that are computed in 16 bits by torch on a GPU; none where FSDP2 holds the weights.

    FSDP2 gathers weights in 16 bits, and on CPUs the products cast them (`cpu_linear`).
    """
    dtype, layers = compute_dtype(config.compute), []
    gathers = any(isinstance(stage, FSDPModule) for stage in stages)
    if dtype is not None and context.device.type in gpu_linear.DEVICES and not gathers:
        takes_copies = config.compute.gradient_accumulation_fusion
        layers = [layer for layer, _ in _linear_layers(stages, config) if layer.product is None or takes_copies]
    return CastWeights(layers, dtype or torch.float32)


def _linear_layers(stages: Sequence[T5Model], config: RunConfig) -> Iterator[tuple[Linear, bool]]:
    """The linear layers of the blocks, and whether they are computed in FP8."""
    model, compute = config.model, config.compute
    for stage in stages:
        stacks = ((stage.encoder, model.encoder_num_layers), (stage.decoder, model.decoder_num_layers))
        for stack, num_layers in stacks:
            for number, block in stack.layers.items():
                at_an_end = int(number) in (0, num_layers - 1)
                in_fp8 = compute.fp8_format is not None and not (compute.first_last_layers_bf16 and at_an_end)
                for module in block.modules():
                    if isinstance(module, Linear):
                        yield module, in_fp8
