"""Costs of the model's units measured on a device, where FLOPs alone do not tell (short rows, narrow layers)."""

from __future__ import annotations

import statistics
import time

import torch

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.models.T5.t5_stage import T5Stage
from megatron.core.models.T5.t5_units import Units
from megatron.core.parameters import initialize_parameters


def measured_unit_costs(
    config: ModelConfig,
    compute: ComputeConfig,
    encoder_length: int,
    decoder_length: int,
    micro_batch: int,
    device: torch.device,
    *,
    repetitions: int = 5,
) -> list[int]:
    """Nanoseconds of each unit's forward pass over a microbatch, taken as a third of forward and backward, `[U]`.

    One layer of each stack stands for all. The median of `repetitions` after a first, untimed one.
    """
    units = Units.of(config)
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        drawn = torch.randint(0, config.vocab_size or 1, (micro_batch, length), generator=generator)
        return drawn.to(device)

    batch = {"encoder_input_ids": ids(encoder_length), "decoder_input_ids": ids(decoder_length)}
    batch["labels"] = ids(decoder_length)
    costs = {}
    for unit in units.all:
        if unit not in (*units.encoder_layers[1:], *units.decoder_layers[1:]):
            costs[unit] = _nanoseconds(config, compute, unit, batch, device, repetitions)
    costs |= dict.fromkeys(units.encoder_layers, costs[units.encoder_layers[0]])
    costs |= dict.fromkeys(units.decoder_layers, costs[units.decoder_layers[0]])
    return [costs[unit] for unit in units.all]


def _nanoseconds(
    config: ModelConfig,
    compute: ComputeConfig,
    unit: int,
    batch: dict[str, torch.Tensor],
    device: torch.device,
    repetitions: int,
) -> int:
    """A third of the time of a stage with this unit alone."""
    with torch.device("meta"):
        stage = T5Stage(config, compute, units=range(unit, unit + 1))
    stage.to_empty(device=device)
    initialize_parameters(stage, seed=0)
    shapes, _ = stage.messages(**batch)
    received = [torch.randn(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=True) for tensor in shapes]
    times = []
    for _ in range(1 + repetitions):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter_ns()
        outputs = stage(*received, **batch)
        torch.stack([output.float().sum() for output in outputs]).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter_ns() - start)
    return max(1, int(statistics.median(times[1:])) // 3)
