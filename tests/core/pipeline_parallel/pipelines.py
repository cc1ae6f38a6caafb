"""Small T5 pipelines for tests: plans, batches, the stages of a rank, and the single process they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron.core.config import ComputeConfig, ModelConfig, ParallelConfig
from megatron.core.distributed import DataParallel, SharedParameters, sum_replicated_gradients_
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_sharding import shard_t5
from megatron.core.models.T5.t5_stage import T5Stage
from megatron.core.models.T5.t5_units import Units
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import initialize_parameters
from megatron.core.pipeline_parallel.runtime import Pipeline
from megatron.core.pipeline_parallel.schedules import stage_ranks
from megatron.core.tensor_parallel import TensorParallel

Z_LOSS_WEIGHT = 1e-2
FACTOR = torch.tensor(0.25)
STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "interleaved-zb": 2, "zbv": 2, "dualpipev": 2}


def model_config(**options: Any) -> ModelConfig:
    options = {"encoder_num_layers": 3, "decoder_num_layers": 2} | options
    return ModelConfig(
        hidden_size=16, num_attention_heads=2, kv_channels=6, ffn_hidden_size=24, vocab_size=61,
        make_vocab_size_divisible_by=1, relative_attention_num_buckets=8, **options,
    )  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """A plan with stages of about equally many units."""

    schedule: str
    num_ranks: int
    stages_per_rank: int
    units: range

    @property
    def stages(self) -> list[range]:
        num_stages = self.num_ranks * self.stages_per_rank
        cuts = [round(len(self.units) * stage / num_stages) for stage in range(num_stages + 1)]
        return [self.units[start:end] for start, end in pairwise(cuts)]

    def stages_of(self, rank: int) -> list[int]:
        ranks = stage_ranks(self.schedule, self.num_ranks, self.stages_per_rank)
        return [stage for stage, owner in enumerate(ranks) if owner == rank]


def equal_cut(schedule: str, config: ModelConfig, context: ParallelContext, stages_per_rank: int | None = None) -> Cut:
    number = STAGES_PER_RANK[schedule] if stages_per_rank is None else stages_per_rank
    return Cut(schedule, context.pp_size, number, Units.of(config).all)


def make_batch(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Odd lengths, which sequence parallelism pads, and some padding in every other row."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(1, 61, (rows, length), generator=generator, dtype=torch.int32)

    labels, mask = ids(5), torch.ones(rows, 9, dtype=torch.bool)
    labels[::2, -2:] = -100
    mask[::2, -3:] = False
    return {"encoder_input_ids": ids(9), "decoder_input_ids": ids(5), "labels": labels, "encoder_mask": mask}


class Reference:
    """One process: sums of the losses, losses and gradients."""

    def __init__(self, config: ModelConfig, batch: dict[str, torch.Tensor], compute: ComputeConfig | None = None):
        with torch.device("meta"):
            model = T5Model(config, compute, Z_LOSS_WEIGHT)
        losses = materialize(model)(**batch).loss
        (losses.total * FACTOR).backward()
        self.sums = torch.stack([losses.cross_entropy.sum(), losses.z_loss.sum()])
        self.cross_entropy = losses.cross_entropy
        self.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}


class Ranks:
    """The stages of this rank with everything that belongs to a step."""

    def __init__(
        self,
        context: ParallelContext,
        config: ModelConfig,
        plan: Cut,
        num_microbatches: int,
        *,
        compute: ComputeConfig | None = None,
        strategy: Any = "no_shard",
        sequence_parallel: bool = False,
    ):
        compute = compute or ComputeConfig()
        parallel = ParallelConfig(
            tensor_model_parallel_size=context.tp_size, sequence_parallel=sequence_parallel and context.tp_size > 1
        )
        self.context = context
        self.tensor_parallel = TensorParallel.of(context, parallel)
        indices = plan.stages_of(context.pp_rank)
        with torch.device("meta"):
            self.stages = [
                T5Stage(config, compute, Z_LOSS_WEIGHT, plan.stages[index], self.tensor_parallel) for index in indices
            ]
        for stage in self.stages:
            shard_t5(stage, context)
        self.data_parallel = [DataParallel(stage, context, compute, stage.blocks, strategy) for stage in self.stages]
        for stage in self.stages:
            materialize(stage)
        self.shared = SharedParameters(self.stages, indices, context)
        self.parameters = self.shared.parameters
        self.pipeline = Pipeline(self.stages, plan, context, num_microbatches)

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sums of the losses over all ranks."""
        for p in self.parameters:
            p.parameter.grad = None
        sums = self.pipeline.forward_backward(batch, FACTOR)
        for data_parallel in self.data_parallel:
            data_parallel.reduce_gradients()
        if self.tensor_parallel.sequence_parallel:
            sum_replicated_gradients_(self.parameters, self.context)
        self.shared.sum_gradients_()
        if self.context.tp_rank:
            sums.zero_()
        torch.distributed.all_reduce(sums)
        return sums

    def gradients(self) -> list[tuple[str, torch.Tensor]]:
        """Whole gradients by name, those of all copies."""
        return [(p.name, whole(p.parameter.grad)) for p in self.parameters]


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; rows that pad the vocabulary for the ranks must be zero."""
    assert not found[len(expected) :].any()
    return ((found[: len(expected)] - expected).norm() / expected.norm()).item()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def materialize(model: Any) -> Any:
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=3)
    return model
