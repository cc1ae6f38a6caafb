"""Share of a step that pipeline ranks are busy: T5 as cut here, each schedule, against encoder and decoder apart.

The usual way to put an encoder-decoder on a pipeline gives some ranks encoder layers and the others decoder layers, one
stage a rank, under 1F1B. Both are simulated, from the action lists that torch's schedules execute, with the analytic
FLOPs of each stage (backward twice the forward) and without communication. Prints one JSON object a row; a table in
Markdown with --markdown.

    python benchmarks/pipeline_schedules.py [--output benchmarks/results/pipeline_schedules.jsonl] [--png FILE]
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from megatron.core.config import ModelConfig, ParallelConfig
from megatron.core.models.T5.t5_pipeline import StagePlan, choose_plan, parse_layout, simulate_plan, unit_costs
from megatron.core.models.T5.t5_presets import PRESETS
from megatron.core.models.T5.t5_units import Units
from megatron.core.pipeline_parallel.drawing import draw_timelines
from megatron.core.pipeline_parallel.simulator import Timeline

PRESET, ENCODER_LENGTH, DECODER_LENGTH = "t5-v1_1-xxl", 512, 114
RANKS, MICROBATCHES = 8, 32
OURS = [
    ("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("interleaved", 3), ("interleaved", 4), ("zbv", 2),
    ("interleaved-zb", 2), ("interleaved-zb", 3), ("interleaved-zb", 4), ("dualpipev", 2),
]  # fmt: skip
DRAWN = ["1f1b, stacks apart, best split", "interleaved, 4 a rank", "zbv, 2 a rank", "interleaved-zb, 4 a rank"]


def apart(config: ModelConfig, encoder_ranks: int) -> StagePlan:
    """1F1B with the encoder on the first ranks, the decoder on the others, as even as layers go; the best of these."""
    units, costs = Units.of(config), unit_costs(config, ENCODER_LENGTH, DECODER_LENGTH)
    plans = []
    for encoder in even_counts(config.encoder_num_layers, encoder_ranks):
        for decoder in even_counts(config.decoder_num_layers, RANKS - encoder_ranks):
            layout = "|".join([f"E{count}" for count in encoder] + [f"D{count}" for count in decoder])
            stages = parse_layout(units, layout)
            plans.append(StagePlan(units, "1f1b", RANKS, stages, tuple(costs)))
    return min(plans, key=lambda plan: simulate_plan(plan, MICROBATCHES).makespan)


def even_counts(layers: int, ranks: int) -> list[list[int]]:
    """Every way of giving each rank its share of the layers, rounded up or down."""
    least, more = divmod(layers, ranks)
    return [[least + (rank in chosen) for rank in range(ranks)] for chosen in combinations(range(ranks), more)]


def contenders() -> list[tuple[str, StagePlan]]:
    """Name and plan of each row."""
    config = ModelConfig(**PRESETS[PRESET])  # type: ignore[arg-type]
    splits = [apart(config, encoder_ranks) for encoder_ranks in range(1, RANKS)]
    best = min(splits, key=lambda plan: simulate_plan(plan, MICROBATCHES).makespan)
    plans = [
        ("1f1b, stacks apart, half and half", apart(config, RANKS // 2)),
        ("1f1b, stacks apart, best split", best),
    ]
    for schedule, stages_per_rank in OURS:
        parallel = ParallelConfig(
            pipeline_model_parallel_size=RANKS,
            pipeline_schedule=schedule,  # type: ignore[arg-type]
            num_virtual_stages_per_pipeline_rank=stages_per_rank,
        )
        plan = choose_plan(config, parallel, ENCODER_LENGTH, DECODER_LENGTH, MICROBATCHES)
        plans.append((schedule if stages_per_rank == 1 else f"{schedule}, {stages_per_rank} a rank", plan))
    auto = ParallelConfig(pipeline_model_parallel_size=RANKS)
    plans.append(("auto", choose_plan(config, auto, ENCODER_LENGTH, DECODER_LENGTH, MICROBATCHES)))
    return plans


def row(name: str, plan: StagePlan, timeline: Timeline, reference: Timeline) -> dict[str, Any]:
    """The figures of a contender."""
    loads = [sum(plan.costs[stage] for stage in plan.stages_of(rank)) for rank in range(RANKS)]
    return {
        "contender": name,
        "schedule": plan.schedule,
        "stages_per_rank": plan.stages_per_rank,
        "busy_fraction": round(timeline.busy_fraction, 4),
        "step_time_relative": round(timeline.makespan / reference.makespan, 4),
        "bound_by_busiest_rank": round(sum(loads) / RANKS / max(loads), 4),
        "peak_in_flight_microbatches": round(max(timeline.peaks_in_flight), 2),
        "layout": plan.layout,
        "preset": PRESET,
        "encoder_length": ENCODER_LENGTH,
        "decoder_length": DECODER_LENGTH,
        "pipeline_ranks": RANKS,
        "microbatches": MICROBATCHES,
        "torch": torch.__version__.split("+")[0],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the documentation."""
    lines = [
        "| schedule, stages a rank | busy | step time | bound | in flight | layout |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for entry in rows:
        layout = entry["layout"].replace("|", "\\|")
        lines.append(
            f"| {entry['contender']} | {entry['busy_fraction']:.3f} | {entry['step_time_relative']:.3f} | "
            f"{entry['bound_by_busiest_rank']:.3f} | {entry['peak_in_flight_microbatches']:.2f} | `{layout}` |"
        )
    return "\n".join(lines)


def main() -> None:
    """Simulate every contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the rows")
    parser.add_argument("--markdown", action="store_true", help="print a table instead of rows")
    parser.add_argument("--png", type=Path, help="picture of some of the steps to write")
    arguments = parser.parse_args()
    timelines = [(name, plan, simulate_plan(plan, MICROBATCHES)) for name, plan in contenders()]
    rows = [row(name, plan, timeline, timelines[0][2]) for name, plan, timeline in timelines]
    print(markdown(rows) if arguments.markdown else "\n".join(map(json.dumps, rows)))
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    if arguments.png:
        draw_timelines([(name, timeline) for name, _, timeline in timelines if name in DRAWN], arguments.png)


if __name__ == "__main__":
    main()
