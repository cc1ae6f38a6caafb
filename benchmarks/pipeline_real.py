"""Step times of pipeline schedules on four real processes against the simulator's.

The processes run the runtime that trains (`Pipeline`: torch's schedules, gloo, split backward passes), but the work of
a stage is made slow on purpose: it sleeps for as long as the plan says its forward pass, its gradients of inputs and
its gradients of weights take, and computes next to nothing. So the order of the schedules does not depend on how many
cores the machine has. Rounds of all contenders alternate; medians are compared.

A pass costs something even without work: Python, a message, waking up. That is measured too, by steps of plain 1F1B
without sleep, and added to the simulator's costs; latency that does not hide behind work is not, and costs a few per
cent where there are most messages. Prints one JSON object a contender, and fails when two whose simulated times differ
by 2 % or more come out in the other order. On a machine with other work, run it with real-time priority:

    chrt -r 1 python benchmarks/pipeline_real.py [--output benchmarks/results/pipeline_real.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.config import ModelConfig, ParallelConfig
from megatron.core.models.T5.t5_pipeline import StagePlan, choose_plan, parse_layout, simulate_plan, unit_costs
from megatron.core.models.T5.t5_presets import PRESETS
from megatron.core.models.T5.t5_units import Units
from megatron.core.parallel_state import ParallelContext
from megatron.core.pipeline_parallel.runtime import Pipeline
from megatron.core.pipeline_parallel.simulator import StageCosts, step_simulator
from megatron.core.tensor_parallel import TensorParallel
from tests.distributed import run_distributed

PRESET, ENCODER_LENGTH, DECODER_LENGTH = "t5-v1_1-xl", 512, 114
RANKS, MICROBATCHES, WIDTH = 4, 8, 8
OURS = [
    ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("interleaved-zb", 2), ("zbv", 2),
    ("dualpipev", 2),
]  # fmt: skip


IDLE = "1f1b without work"
DISTINCT = 0.02  # share by which simulated times have to differ for their order to be compared


class _Sleep(torch.autograd.Function):
    """The identity, whose gradient takes some time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        time.sleep(ctx.backward_s)
        return gradient, None


class SlowStage(nn.Module):
    """One linear layer whose forward pass, input's gradient and weight's gradient take so many `seconds`."""

    def __init__(self, seconds: tuple[float, float, float], is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.forward_s, self.input_s, self.weight_s = seconds
        self.is_first, self.is_last = is_first, is_last
        self.tensor_parallel = TensorParallel()
        self.weight = nn.Parameter(torch.eye(WIDTH))
        self.weight.register_hook(self._weight_gradient)

    def _weight_gradient(self, gradient: Tensor | None) -> None:
        if gradient is not None:  # None in the first part of a split backward pass
            time.sleep(self.weight_s)

    def forward(self, *received: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        """`[b, WIDTH]` to the same, or to the two losses `[b]` and their sum `[1]`."""
        time.sleep(self.forward_s)
        hidden = self.tensor_parallel.linear(received[0] if received else inputs.requires_grad_(), self.weight)
        hidden = _Sleep.apply(hidden, self.input_s)
        if not self.is_last:
            return (hidden,)
        losses = hidden.detach().sum(dim=-1)
        return losses, torch.zeros_like(losses), hidden.sum()[None]

    def messages(self, *, inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `StageModule`."""
        hidden = inputs.detach().to("meta").requires_grad_()
        losses, total = hidden.detach().sum(dim=-1), hidden.sum()[None]
        return () if self.is_first else (hidden,), (losses, losses, total) if self.is_last else (hidden,)


def apart(config: ModelConfig) -> StagePlan:
    """1F1B with ranks of encoder layers only and ranks of decoder layers only: the best split."""
    units, costs = Units.of(config), unit_costs(config, ENCODER_LENGTH, DECODER_LENGTH)
    plans = []
    for ranks in range(1, RANKS):
        counts = [_even(config.encoder_num_layers, ranks), _even(config.decoder_num_layers, RANKS - ranks)]
        for encoder, decoder in product(*counts):
            layout = "|".join([f"E{count}" for count in encoder] + [f"D{count}" for count in decoder])
            stages = parse_layout(units, layout)
            plans.append(StagePlan(units, "1f1b", RANKS, stages, tuple(costs)))
    return min(plans, key=lambda plan: simulate_plan(plan, MICROBATCHES).makespan)


def _even(layers: int, ranks: int) -> list[list[int]]:
    """Every way of giving each rank its share of the layers, rounded up or down."""
    least, more = divmod(layers, ranks)
    return [[least + (rank in chosen) for rank in range(ranks)] for chosen in combinations(range(ranks), more)]


def contenders() -> dict[str, StagePlan]:
    """Plans by name."""
    config = ModelConfig(**PRESETS[PRESET])  # type: ignore[arg-type]
    plans = {"1f1b, stacks apart, best split": apart(config)}
    for schedule, stages_per_rank in OURS:
        parallel = ParallelConfig(
            pipeline_model_parallel_size=RANKS,
            pipeline_schedule=schedule,  # type: ignore[arg-type]
            num_virtual_stages_per_pipeline_rank=stages_per_rank,
        )
        name = schedule if stages_per_rank == 1 else f"{schedule}, {stages_per_rank} a rank"
        plans[name] = choose_plan(config, parallel, ENCODER_LENGTH, DECODER_LENGTH, MICROBATCHES)
    return plans


def measure(rank: int, plans: dict[str, StagePlan], seconds_per_flop: float, rounds: int) -> dict[str, list[float]]:
    """Step times of each plan, s; runs on every process."""
    context = ParallelContext.create(ParallelConfig(pipeline_model_parallel_size=RANKS), torch.device("cpu"))
    pipelines = {}
    for name, plan in [*plans.items(), (IDLE, plans["1f1b"])]:
        if name == IDLE:
            seconds_per_flop = 0.0
        last = len(plan.stages) - 1
        costs = plan.stage_costs(seconds_per_flop)
        seconds = list(zip(costs.forward, costs.backward_input, costs.backward_weight, strict=True))
        modules = [SlowStage(seconds[i], i == 0, i == last) for i in plan.stages_of(rank)]
        pipelines[name] = Pipeline(modules, plan, context, MICROBATCHES)
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):  # the first round warms up
        for name, pipeline in pipelines.items():
            dist.barrier()
            start = time.perf_counter()
            pipeline.forward_backward({"inputs": torch.ones(MICROBATCHES, WIDTH)}, torch.tensor(1.0))
            dist.barrier()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def run(forward_ms: float, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender, fastest simulated first."""
    plans = contenders()
    seconds_per_flop = forward_ms * 1e-3 / sum(next(iter(plans.values())).costs)
    times = run_distributed(measure, RANKS, plans, seconds_per_flop, rounds, timeout=600.0)[0]
    idle = step_simulator("1f1b", RANKS, 1, MICROBATCHES).timeline(StageCosts.from_forward([1.0] * RANKS, 1.0, 0.0))
    overhead_s = statistics.median(times[IDLE]) / idle.makespan  # of a forward or backward pass
    rows = []
    for name, plan in plans.items():
        work = plan.stage_costs(seconds_per_flop)
        simulator = step_simulator(plan.schedule, RANKS, plan.stages_per_rank, MICROBATCHES)
        passes = StageCosts(work.forward + overhead_s, work.backward_input + overhead_s, work.backward_weight)
        simulated = simulator.timeline(passes)
        measured = statistics.median(times[name])
        rows.append(
            {
                "contender": name,
                "simulated_s": round(simulated.makespan, 4),
                "measured_s": round(measured, 4),
                "measured_over_simulated": round(measured / simulated.makespan, 4),
                "simulated_without_overhead_s": round(simulator.timeline(work).makespan, 4),
                "overhead_ms": round(1e3 * overhead_s, 3),
                "layout": plan.layout,
                "preset": PRESET,
                "pipeline_ranks": RANKS,
                "microbatches": MICROBATCHES,
                "forward_ms": forward_ms,
                "rounds": rounds,
                "cpus": os.cpu_count(),
                "real_time_priority": hasattr(os, "SCHED_RR") and os.sched_getscheduler(0) == os.SCHED_RR,
                "machine": platform.machine(),
                "torch": torch.__version__.split("+")[0],
            }
        )
    return sorted(rows, key=lambda row: row["simulated_s"])


def contradictions(rows: list[dict[str, Any]], distinct: float = DISTINCT) -> list[str]:
    """Pairs whose simulated times differ by more than the share `distinct` and whose measured ones say the opposite."""
    return [
        f"{slow['contender']} came out faster than {fast['contender']}"
        for fast, slow in combinations(rows, 2)
        if slow["simulated_s"] > (1 + distinct) * fast["simulated_s"] and slow["measured_s"] < fast["measured_s"]
    ]


def main() -> None:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the rows")
    parser.add_argument("--forward-ms", type=float, default=300.0, help="forward pass of the whole model")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = run(arguments.forward_ms, arguments.rounds)
    print("\n".join(map(json.dumps, rows)))
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = contradictions(rows)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
