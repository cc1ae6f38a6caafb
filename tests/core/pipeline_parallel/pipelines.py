"""Small T5 pipelines for tests: cuts, batches, modules of a rank, gradients by global name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_stage import T5Stage
from megatron.core.models.T5.t5_units import Units
from megatron.core.parameters import initialize_parameters, local_tensor
from megatron.core.pipeline_parallel.schedules import stage_ranks

SEED = 3
Z_LOSS_WEIGHT = 1e-2


@dataclass(frozen=True)
class Cut:
    """A plan: the schedule and the first unit of each stage but the first."""

    schedule: str
    num_ranks: int
    cuts: tuple[int, ...]
    units: range

    @property
    def stages(self):
        starts = [0, *self.cuts]
        return [self.units[a:b] for a, b in zip(starts, [*self.cuts, len(self.units)], strict=True)]

    def stages_of(self, rank):
        ranks = stage_ranks(self.schedule, self.num_ranks, len(self.stages) // self.num_ranks)
        return [stage for stage, owner in enumerate(ranks) if owner == rank]


def equal_cut(schedule, num_ranks, stages_per_rank, config):
    units = Units.of(config).all
    num_stages = num_ranks * stages_per_rank
    cuts = [round(len(units) * s / num_stages) for s in range(1, num_stages)]
    return Cut(schedule, num_ranks, tuple(cuts), units)


def model_config(**options):
    options = {"encoder_num_layers": 3, "decoder_num_layers": 2} | options
    return ModelConfig(
        hidden_size=16, num_attention_heads=2, kv_channels=6, ffn_hidden_size=24, vocab_size=61,
        make_vocab_size_divisible_by=1, relative_attention_num_buckets=8, **options,
    )  # fmt: skip


def make_batch(rows, seed=0, encoder_length=9, decoder_length=5):
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(1, 61, (rows, length), generator=generator, dtype=torch.int32)

    labels = ids(decoder_length)
    labels[0, -2:] = -100
    return {"encoder_input_ids": ids(encoder_length), "decoder_input_ids": ids(decoder_length), "labels": labels}


def build(model_class, config, *units, compute=None):
    with torch.device("meta"):
        model = model_class(config, compute or ComputeConfig(), Z_LOSS_WEIGHT, *units)
    return materialize(model)


def materialize(model):
    model.to_empty(device="cpu")
    initialize_parameters(model, SEED)
    return model


def build_stages(config, plan, rank, compute=None):
    return [build(T5Stage, config, plan.stages[index], compute=compute) for index in plan.stages_of(rank)]


def reference(config, batch, factor, compute=None):
    """Sums of the losses and all gradients of one process."""
    model = build(T5Model, config, compute=compute)
    losses = model(**batch).loss
    sums = torch.stack([losses.cross_entropy.sum(), losses.z_loss.sum()])
    (sums.sum() * factor).backward()
    return sums.detach(), {name: p.grad for name, p in model.named_parameters()}, losses.cross_entropy.detach()


def largest_difference(parameters, expected):
    """Largest ||difference|| / ||expected|| of the gradients of this rank's whole (not divided) parameters."""
    differences = {}
    for p in parameters:
        found, wanted = local_tensor(p.parameter.grad), expected[p.name]
        differences[p.name] = ((found - wanted).norm() / wanted.norm()).item()
    return max(differences.items(), key=lambda item: item[1])
