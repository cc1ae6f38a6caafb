"""Simulates a step of a pipeline: the stages, the share of the step that ranks are busy, the activations they hold.

It needs no data, no processes and no GPU. Costs are the FLOPs of each layer, or, with --measure, times measured here.

    python tools/simulate_pipeline.py --preset t5-v1_1-xxl --pipeline-model-parallel-size 8 --num-microbatches 32
        [--pipeline-schedule zbv] [--png timeline.png]
"""

import argparse
from pathlib import Path
from typing import get_args, get_type_hints

import torch

from megatron.core.config import ComputeConfig, ModelConfig, ParallelConfig, flag_name
from megatron.core.errors import UserError
from megatron.core.models.T5.t5_measured_costs import measured_unit_costs
from megatron.core.models.T5.t5_pipeline import StagePlan, choose_plan, message_elements, simulate_plan
from megatron.core.models.T5.t5_presets import PRESETS
from megatron.core.pipeline_parallel.drawing import draw_timelines
from megatron.core.pipeline_parallel.simulator import Link, Timeline
from megatron.training.arguments import Parser, run_command_line

POSITIVE = (
    "num_microbatches", "micro_batch_size", "encoder_seq_length", "decoder_seq_length", "tflops", "link_gbytes_per_s",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The flags; those of `pretrain_t5.py` have its names."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [flags]")
    add = parser.add_argument
    add("--preset", required=True, choices=PRESETS, metavar="NAME", help="published size, e.g. t5-v1_1-xxl")
    add("--encoder-num-layers", type=int, help="in place of the preset's")
    add("--decoder-num-layers", type=int, help="in place of the preset's")
    add("--encoder-seq-length", type=int, default=512, help="tokens of an encoder row (512)")
    add("--decoder-seq-length", type=int, default=114, help="tokens of a decoder row (114)")
    add("--pipeline-model-parallel-size", type=int, required=True, metavar="P", help="pipeline ranks")
    add("--num-microbatches", type=int, required=True, metavar="M", help="microbatches a step on a rank")
    schedules = get_args(get_type_hints(ParallelConfig)["pipeline_schedule"])
    add("--pipeline-schedule", default="auto", choices=schedules, help="auto (the default): the best of all")
    add("--num-virtual-stages-per-pipeline-rank", type=int, metavar="V", help="stages on each rank")
    add("--pipeline-layout", metavar="TEXT", help="stages by hand, see docs/pipeline.md")
    add("--recompute-granularity", choices=["full", "selective"], help="full: a backward pass repeats the forward one")
    add("--measure", action="store_true", help="measure the cost of layers on this machine (GPU if there is one)")
    add("--micro-batch-size", type=int, default=1, help="sequences of a microbatch (1)")
    add("--bf16", action="store_true", help="measure in bf16; messages of 2 bytes a number instead of 4")
    add("--tflops", type=float, help="TFLOP/s that a rank reaches; gives times in ms, and a meaning to the link")
    add("--link-gbytes-per-s", type=float, default=float("inf"), help="speed of messages between ranks (infinite)")
    add("--link-latency-us", type=float, default=0.0, help="time of an empty message (0)")
    add("--png", type=Path, metavar="FILE", help="draw the step")
    arguments: argparse.Namespace = parser.parse_args()
    for name in POSITIVE:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"{flag_name(name)} is {value:g}; it must be greater than 0")
    if not arguments.link_latency_us >= 0:
        raise UserError(f"--link-latency-us is {arguments.link_latency_us:g}; it must not be less than 0")
    in_seconds = arguments.measure or arguments.tflops is not None
    if arguments.measure and arguments.tflops is not None:
        raise UserError("--measure and --tflops both give the time of a layer; remove one")
    if not in_seconds and (arguments.link_latency_us or arguments.link_gbytes_per_s != float("inf")):
        raise UserError("--link-* flags need times to compare with; add --tflops or --measure")
    return arguments


def plan_and_simulate(arguments: argparse.Namespace) -> tuple[StagePlan, Timeline, str]:
    """The stages, the step, and the unit of its times (none for shares)."""
    fields = dict(PRESETS[arguments.preset])
    for name in ("encoder_num_layers", "decoder_num_layers"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)
    config = ModelConfig(**fields)  # type: ignore[arg-type]
    parallel = ParallelConfig(
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        pipeline_schedule=arguments.pipeline_schedule,
        num_virtual_stages_per_pipeline_rank=arguments.num_virtual_stages_per_pipeline_rank,
        pipeline_layout=arguments.pipeline_layout,
    )
    if parallel.pipeline_model_parallel_size == 1:
        raise UserError("--pipeline-model-parallel-size is 1; a pipeline needs at least 2")
    lengths = arguments.encoder_seq_length, arguments.decoder_seq_length
    costs, seconds_per_cost = None, 1.0
    if arguments.measure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        compute = ComputeConfig(bf16=arguments.bf16)
        costs = measured_unit_costs(config, compute, *lengths, arguments.micro_batch_size, device)
        seconds_per_cost = 1e-9
    elif arguments.tflops is not None:
        seconds_per_cost = arguments.micro_batch_size / (arguments.tflops * 1e12)
    plan = choose_plan(
        config, parallel, *lengths, arguments.num_microbatches,
        recompute_granularity=arguments.recompute_granularity, costs=costs,
    )  # fmt: skip
    link = Link(arguments.link_latency_us * 1e-6, arguments.link_gbytes_per_s * 1e9)
    bytes_each = arguments.micro_batch_size * (2 if arguments.bf16 else 4)
    messages = message_elements(config, plan.stages, *lengths)[:-1]
    milliseconds = 1e3 if seconds_per_cost != 1.0 else 1.0
    timeline = simulate_plan(
        plan,
        arguments.num_microbatches,
        seconds_per_flop=milliseconds * seconds_per_cost,
        recompute=arguments.recompute_granularity == "full",
        transfer_times=[milliseconds * link.seconds(elements * bytes_each) for elements in messages],
    )
    return plan, timeline, "ms" if milliseconds != 1.0 else ""


def main() -> None:
    """Print the stage table and what the simulation says of each rank."""
    arguments = parse_arguments()
    plan, timeline, unit = plan_and_simulate(arguments)
    print(plan.describe())
    print(f"\n{'rank':>4}  {'busy':>6}  activations held at most, in microbatches of the whole model (by cost)")
    for rank, (busy, held) in enumerate(zip(timeline.busy_fractions, timeline.peaks_in_flight, strict=True)):
        print(f"{rank:>4}  {busy:6.1%}  {held:.2f}")
    step = f", the step takes {timeline.makespan:.1f} {unit}" if unit else ""
    print(f"\nranks are busy {timeline.busy_fraction:.1%} of the step on average{step}")
    if arguments.png:
        title = f"{arguments.preset}, {plan.schedule}, {arguments.num_microbatches} microbatches"
        draw_timelines([(title, timeline)], arguments.png, unit=unit)
        print(f"wrote {arguments.png}")


if __name__ == "__main__":
    run_command_line(main)
