"""The model of a run, divided among the ranks, and the passes of one step over it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megatron.core.compilation import compile_layers
from megatron.core.datasets.loader import TensorBatch
from megatron.core.distributed import (
    DataParallel,
    ShardingStrategy,
    SharedParameters,
    default_sharding_strategy,
    sum_replicated_gradients_,
)
from megatron.core.inference.loading import build_inference_model
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_pipeline import StagePlan, choose_plan
from megatron.core.models.T5.t5_sharding import shard_t5
from megatron.core.models.T5.t5_stage import T5Stage
from megatron.core.models.T5.t5_units import Units
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import initialize_parameters, local_tensor, model_parameters
from megatron.core.tensor_parallel import TensorParallel
from megatron.core.transformer.precision import compute_dtype
from megatron.training.backends import check_backends
from megatron.training.config import RunConfig
from megatron.training.cuda_graphs import DeviceGraph, GraphedMicrobatches
from megatron.training.linear_products import cached_products, cast_weights, has_products, install_products

if TYPE_CHECKING:
    from megatron.core.pipeline_parallel.runtime import Pipeline


def plan_stages(
    config: RunConfig, context: ParallelContext, encoder_length: int, decoder_length: int, num_microbatches: int
) -> StagePlan | None:
    """The stages of the pipeline, the same on all ranks; None without one.

    Args:
        config: The run.
        context: The layout.
        encoder_length: Tokens of an encoder row.
        decoder_length: Tokens of a decoder row.
        num_microbatches: Microbatches of a step on each data-parallel rank.
    """
    if context.pp_size == 1:
        return None
    return context.on_main(
        lambda: choose_plan(
            config.model, config.parallel, encoder_length, decoder_length, num_microbatches,
            recompute_granularity=config.compute.recompute_granularity, compiled=config.compute.compile,
            own_products=has_products(config.compute),
        )
    )  # fmt: skip


def sharding_strategy(config: RunConfig) -> ShardingStrategy:
    """What data-parallel ranks divide: as configured, or by the size of a rank's share; the same on all ranks."""
    given = config.parallel.data_parallel_sharding_strategy
    if given is not None:
        return given
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in T5Model(config.model).parameters())
    parallel = config.parallel
    num_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return default_sharding_strategy(4 * num_parameters // num_ranks)


def build_stages(
    config: RunConfig,
    context: ParallelContext,
    plan: StagePlan | None,
    tensor_parallel: TensorParallel,
    strategy: ShardingStrategy | None = None,
) -> tuple[list[T5Model], list[DataParallel]]:
    """The stages of this rank on the meta device, divided over tensor- and data-parallel ranks.

    Without a pipeline there is one "stage", the whole model. `strategy` is that of `sharding_strategy` if not given.
    """
    strategy = strategy or sharding_strategy(config)
    z_loss_weight = config.optimizer.z_loss_weight
    stages: list[T5Model] = []
    with torch.device("meta"):
        if plan is None:
            stages = [T5Model(config.model, config.compute, z_loss_weight, tensor_parallel=tensor_parallel)]
        else:
            units = [plan.stages[index] for index in plan.stages_of(context.pp_rank)]
            stages = [T5Stage(config.model, config.compute, z_loss_weight, u, tensor_parallel) for u in units]
    for stage in stages:
        shard_t5(stage, context)
        if config.compute.compile:
            compile_layers(stage.blocks)
    data_parallel = [DataParallel(stage, context, config.compute, stage.blocks, strategy) for stage in stages]
    return stages, data_parallel


class DistributedModel:
    """What this rank holds of the model, with its initial values, and one step's passes over all ranks' parts.

    Args:
        config: The run.
        context: The layout.
        plan: The stages, of `plan_stages`.
        num_microbatches: Microbatches of a step on each data-parallel rank.

    Attributes:
        stages: The modules of this rank.
        parameters: All its parameters, pipeline copies marked.
        shared: The parameters that several stages hold; None without a pipeline.
        has_loss: Whether losses are computed on this rank.
        counts_loss: Whether this rank's losses count: tensor-parallel ranks compute the same ones.
    """

    def __init__(
        self, config: RunConfig, context: ParallelContext, plan: StagePlan | None, num_microbatches: int
    ) -> None:
        self.context = context
        self.plan = plan
        strategy = sharding_strategy(config)
        check_backends(config, context, strategy)
        self.tensor_parallel = TensorParallel.of(context, config.parallel)
        self.stages, self.data_parallel = build_stages(config, context, plan, self.tensor_parallel, strategy)
        install_products(self.stages, config, context)
        for stage in self.stages:
            stage.to_empty(device=context.device)
            initialize_parameters(stage, config.training.seed)
        self.cast_weights = cast_weights(self.stages, config, context)
        self.shared: SharedParameters | None = None
        self.pipeline: Pipeline | None = None
        if plan is None:
            self.parameters = model_parameters(self.stages)
        else:
            self.shared = SharedParameters(self.stages, plan.stages_of(context.pp_rank), context)
            self.parameters = self.shared.parameters
            from megatron.core.pipeline_parallel.runtime import Pipeline  # torch's imports its compiler

            self.pipeline = Pipeline(self.stages, plan, context, num_microbatches)
        self.num_microbatches = num_microbatches
        self.graphs: GraphedMicrobatches | None = None
        if config.compute.cuda_graphs:
            parameters = [p.parameter for p in self.parameters]
            self.graphs = GraphedMicrobatches(self._microbatch, parameters, DeviceGraph(context.device))
        # Weights that FSDP2 releases after each use would have whole copies in FP8.
        released = context.dp_size > 1 and strategy == "optim_grads_params"
        keeps = num_microbatches > 1 and not released and not config.compute.cuda_graphs
        self.fp8_weights = cached_products(self.stages) if keeps else []
        head = Units.of(config.model).head
        self.has_loss = any(head in stage.units for stage in self.stages)
        self.counts_loss = self.has_loss and context.tp_rank == 0
        self.has_dropout = config.model.hidden_dropout > 0 or config.model.attention_dropout > 0
        self.seed = config.training.seed

    def num_parameters(self) -> int:
        """Parameters of the whole model, copies counted once; all ranks call it together."""
        count = torch.tensor(sum(p.shape.numel() for p in self.parameters if not p.is_copy))
        if self.pipeline is not None:
            count = count.to(self.context.device)
            torch.distributed.all_reduce(count, group=self.context.pp_group)
        return int(count)

    def seed_dropout(self, step: int) -> None:
        """Make dropout masks a function of (seed, step, rank), so that resuming needs no generator state."""
        if self.has_dropout:
            key = f"{self.seed}/{step}/{self.context.dp_rank}/{self.context.pp_rank}"
            self.tensor_parallel.seed_dropout(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little"))

    def forward_backward(
        self, batch: TensorBatch, factor: torch.Tensor, interrupted: Callable[[], bool] = lambda: False
    ) -> torch.Tensor | None:
        """Gradients of `factor` x the summed loss of a step, left unreduced on each rank.

        Args:
            batch: All microbatches of this data-parallel rank, `[num_microbatches * b, ...]`.
            factor: 0-dimensional; the loss scale over the global number of target tokens.
            interrupted: Asked between microbatches, on all ranks together, whether to give up; same answer on all. A
                pipeline, whose microbatches overlap, does not ask.

        Returns:
            Sums of cross-entropy and z-loss, float64 `[2]`; zeros where there is no loss. None when it was given up,
            with whatever gradients there are by then.
        """
        self.cast_weights.refresh()
        for product in self.fp8_weights:
            product.begin_step()
        if self.pipeline is not None:
            return self.pipeline.forward_backward(batch.inputs(), factor)
        if self.graphs is not None:
            self.graphs.begin_step()
        compute = self.graphs or self._microbatch
        totals = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        microbatches = batch.split(self.num_microbatches)
        for number, microbatch in enumerate(microbatches):
            if number > 0 and interrupted():
                return None
            self.data_parallel[0].set_gradient_sync(number == len(microbatches) - 1)
            totals += compute(microbatch, factor)
        return totals

    def _microbatch(self, microbatch: TensorBatch, factor: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradients of one microbatch without a pipeline; returns its loss sums `[2]`."""
        losses = self.stages[0](**microbatch.inputs()).loss
        (losses.total * factor).backward()
        return torch.stack([losses.cross_entropy.sum(), losses.z_loss.sum()])

    def overlap_reduction(self, enabled: bool) -> None:
        """Let replicas sum gradients within the last backward pass of a step, as they do unless told, or after it.

        A pass that is captured is never the last one.
        """
        for data_parallel in self.data_parallel:
            data_parallel.overlaps = enabled and self.graphs is None

    def finish_gradients(self) -> None:
        """Sum the gradients over everything that has a part in them; then every rank has what its update needs."""
        for data_parallel in self.data_parallel:
            data_parallel.reduce_gradients()
        if self.tensor_parallel.sequence_parallel:
            sum_replicated_gradients_(self.parameters, self.context)
        if self.shared is not None:
            self.shared.sum_gradients_()

    @torch.no_grad()
    def token_losses(self, batch: TensorBatch) -> torch.Tensor | None:
        """Cross-entropy of every target token `[rows, t]`, None on a rank without losses; all ranks call it together.

        `batch` holds `evaluation_microbatches` microbatches.
        """
        self.cast_weights.refresh()
        losses: torch.Tensor | None
        if self.pipeline is not None:
            losses = self.pipeline.evaluate(batch.inputs())
        else:
            losses = self.stages[0](**batch.inputs()).loss.cross_entropy
        for data_parallel in self.data_parallel:
            data_parallel.reshard()
        return losses

    @property
    def evaluation_microbatches(self) -> int:
        """Microbatches of one call of `token_losses`: a pipeline needs as many as in training."""
        return 1 if self.pipeline is None else self.num_microbatches

    def train_mode(self, training: bool) -> None:
        """Switch dropout on or off."""
        for stage in self.stages:
            nn.Module.train(stage, training)


@torch.no_grad()
def inference_copy(model: DistributedModel, config: RunConfig, context: ParallelContext) -> T5Model:
    """What `load_model` would make of a checkpoint: the model in the dtype it is computed in, whole on each dp rank.

    Decoding reads every weight once a token, and through methods that FSDP2 does not see. All ranks call it together.
    """
    assert model.pipeline is None
    dtype = compute_dtype(config.compute) or torch.float32
    copy = build_inference_model(config.model, dtype, context)
    sources = {parameter.name: parameter.parameter for parameter in model.parameters}
    for name, target in copy.named_parameters():
        local_tensor(target).copy_(_gathered_over_dp(sources[name]))
    return copy


def _gathered_over_dp(parameter: torch.Tensor) -> torch.Tensor:
    """This tensor-parallel rank's part of `parameter`, whatever FSDP2 has divided further."""
    if not isinstance(parameter, DTensor):
        return parameter
    names = parameter.device_mesh.mesh_dim_names
    assert names is not None
    placements = [
        Replicate() if name == "dp" else placement for name, placement in zip(names, parameter.placements, strict=True)
    ]
    return parameter.redistribute(placements=placements).to_local()
