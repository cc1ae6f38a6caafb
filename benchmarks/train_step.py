"""Time of a training step (forward, backward, AdamW) beside Hugging Face's, and beside its matrix products alone.

Contenders, each in a process of its own: the floor (the step's matrix products at their real shapes and nothing else,
`step_floor.py`); this project's step, eager and with `--compile`; the T5 of `transformers` with eager attention and
with SDPA, each also compiled. In bf16 all of them keep fp32 weights and compute in bf16 (theirs under autocast); rows
with `trains_differently` have bf16 weights and optimizer state, which this project does not offer. Weights, batch
(random words, no padding, no dropout), hyperparameters and number of threads are the same, and the C library keeps
freed memory in all of them (`--allocator default`: in none). Before anything is timed, the losses of the first steps
have to agree; otherwise the exit status is 1.

The contenders make their steps in turns, one at a time, in another order each round; a row is the median of its rounds.
As many processes live at a time as memory allows; further ones follow in another group, with the floor again, and
`share_of_floor` is that of the floor in the same group. With a GPU everything runs on it, several steps a turn, and
rows have its peak memory and the utilisation (MFU) by the vendor's figure.

    python benchmarks/train_step.py [--output benchmarks/results/train_step.jsonl]
    python benchmarks/train_step.py --max-cpu-isa AVX512_CORE_BF16     the same machine without AMX
    python benchmarks/train_step.py --loop                             the trainer beside the bare step
    python benchmarks/train_step.py --markdown benchmarks/results/train_step.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from report import machine, publish
from step_contender import Case
from step_loop import loop_rows
from step_processes import StepProcess, available_bytes, take_turns
from step_table import markdown

# How much of a loss the contenders may differ in before the first step, and before those after it. Steps amplify
# rounding: AdamW's first one moves every weight by the learning rate, in the direction of the gradient's sign. Steps
# with bf16 weights are other steps.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (3e-4, 4e-3)}
PURE_TOLERANCE = 2**-7  # with bf16 weights the loss itself is a bf16 number, whose neighbours are that far apart
CHECKED_STEPS = 3
# A process is added when this many times the largest so far is free: theirs need more than ours.
HEADROOM = 1.8

CONTENDERS: dict[str, dict[str, Any]] = {
    "ours": {"code": "ours"},
    "ours compiled": {"code": "ours", "compiled": True},
    "Hugging Face eager": {"code": "theirs"},
    "Hugging Face SDPA": {"code": "theirs", "attention": "sdpa"},
    "Hugging Face compiled": {"code": "theirs", "compiled": True},
    "Hugging Face SDPA compiled": {"code": "theirs", "attention": "sdpa", "compiled": True},
    "Hugging Face bf16 weights": {"code": "theirs", "pure": True},
    "Hugging Face bf16 weights compiled": {"code": "theirs", "pure": True, "compiled": True},
}


def check_losses(name: str, case: Case, losses: Sequence[float], reference: Sequence[float]) -> None:
    """Losses before each of the first steps against those of the first contender.

    Raises:
        SystemExit: They differ.
    """
    first, later = (PURE_TOLERANCE, math.inf) if case.pure else TOLERANCES[case.precision]
    for number, (loss, expected) in enumerate(zip(losses, reference, strict=True)):
        difference = abs(loss - expected) / expected
        if not difference <= (first if number == 0 else later):
            raise SystemExit(
                f"error: {case.preset} {case.precision}: before step {number + 1} the loss of {name} is {loss:.6f}, "
                f"but {expected:.6f} with the first contender ({difference:.1e}); there is nothing to compare"
            )


class Group:
    """Contenders that live at the same time, warmed up and checked, with a floor of their own."""

    def __init__(self, base: Case, options: argparse.Namespace, stack: ExitStack) -> None:
        self.base, self.options, self.stack = base, options, stack
        self.processes: dict[str, StepProcess] = {}
        self.first_steps: dict[str, dict[str, Any]] = {}
        self.largest_bytes = 0
        self.add("floor", replace(base, code="floor"))
        self.described = self.processes["floor"].ask("describe")

    def has_room(self) -> bool:
        """Whether one more process fits; the first contender always does."""
        contenders = len(self.processes) - 1
        if contenders == 0:
            return True
        if self.options.at_a_time is not None:
            return contenders < self.options.at_a_time
        available = available_bytes()
        return self.described["gpu"] is not None or available is None or available > HEADROOM * self.largest_bytes

    def add(self, name: str, case: Case) -> list[float]:
        """Start one and let it make its first steps; the losses before them."""
        process = self.stack.enter_context(StepProcess(name, case, self.options.max_cpu_isa))
        began = time.perf_counter()
        answer = process.ask(CHECKED_STEPS)
        print(f"{name}: first steps {time.perf_counter() - began:.1f} s {answer['losses']}", file=sys.stderr)
        self.processes[name], self.first_steps[name] = process, answer
        self.largest_bytes = max(self.largest_bytes, answer["peak_bytes"] + process.hello["imports_bytes"])
        return answer["losses"]

    def rows(self, number: int) -> list[dict[str, Any]]:
        """Let them take turns; a row of each."""
        steps = self.options.steps or (10 if self.described["gpu"] else 1)
        answers = take_turns(self.processes, self.options.rounds, steps)
        floor_s = statistics.median(answer["seconds"] for answer in answers["floor"])
        return [
            self._row(name, [answer["seconds"] for answer in of_name], of_name[-1], floor_s)
            | {"group": number, "rounds": self.options.rounds, "steps_of_a_turn": steps}
            for name, of_name in answers.items()
        ]

    def _row(self, name: str, seconds: list[float], last: dict[str, Any], floor_s: float) -> dict[str, Any]:
        process, median_s = self.processes[name], statistics.median(seconds)
        case, described = process.case, self.described
        tflops = described["flops"] / median_s / 1e12
        row = {
            "preset": case.preset,
            "precision": case.precision,
            "contender": name,
            "code": case.code,
            "trains_differently": case.pure,
            "step_ms": round(1e3 * median_s, 1),
            "step_ms_range": [round(1e3 * end(seconds), 1) for end in (min, max)],
            "share_of_floor": round(floor_s / median_s, 4),
            "tokens_per_s": round(case.tokens / median_s, 1),
            "tflops": round(tflops, 4),
            "page_faults_of_a_step": last["page_faults"],
            "peak_memory_gib": round(last["peak_bytes"] / 2**30, 3),
            "keeps_freed_memory": process.hello["keeps_freed_memory"],
            "first_losses": self.first_steps[name]["losses"],
            "first_steps_s": round(CHECKED_STEPS * self.first_steps[name]["seconds"], 1),
            "batch": [case.rows, case.encoder_length, case.decoder_length],
            "threads": case.threads,
            "parameters": described["parameters"],
            "teraflop_of_a_step": round(described["flops"] / 1e12, 4),
        }
        peak = peak_tflops(described["gpu"])
        if peak is not None and case.precision == "bf16":
            row["mfu"] = round(tflops / peak, 4)
        return row


def peak_tflops(gpu: str | None) -> float | None:
    """Dense bf16 peak of a GPU, if the trainer knows it."""
    from megatron.training.metrics import PEAK_TFLOPS

    return next((peak for part, peak in PEAK_TFLOPS.items() if gpu is not None and part in gpu), None)


def measure(base: Case, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one shape in one precision, and what was measured with."""
    waiting = {
        name: replace(base, **fields)
        for name, fields in CONTENDERS.items()
        if name in options.contenders and (base.precision == "bf16" or not fields.get("pure"))
    }
    rows: list[dict[str, Any]] = []
    reference: list[float] | None = None
    number = 0
    while waiting:
        with ExitStack() as stack:
            group = Group(base, options, stack)
            while waiting and group.has_room():
                name = next(iter(waiting))
                losses = group.add(name, waiting[name])
                reference = reference or losses
                check_losses(name, waiting.pop(name), losses, reference)
            print(f"{base.preset} {base.precision}: {', '.join(group.processes)}", file=sys.stderr)
            rows += group.rows(number)
        number += 1
    return rows, group.described


def best(rows: list[dict[str, Any]]) -> str:
    """The fastest contender of some rows, by its share of the floor."""
    name: str = max(rows, key=lambda row: row["share_of_floor"])["contender"]
    return name


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one shape and precision, with the best of both sides named."""
    sides = {code: [row for row in rows if row["code"] == code] for code in ("ours", "theirs")}
    alike = [row for row in sides["theirs"] if not row["trains_differently"]]
    names = {"best_of_ours": sides["ours"], "best_of_theirs": alike}
    return [row | {key: best(of_side) for key, of_side in names.items() if of_side} for row in rows]


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows to this file too")
    parser.add_argument("--markdown", type=Path, help="print the table of this file of rows and measure nothing")
    parser.add_argument("--preset", nargs="+", default=["t5-v1_1-small", "t5-v1_1-base", "mt5-small"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--batch", nargs=3, type=int, default=[8, 512, 114], help="rows, encoder and decoder tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="steps of a turn; default 1, on a GPU 10")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--at-a-time", type=int, help="contenders that live at a time; default: by free memory")
    parser.add_argument("--allocator", default="keep", choices=["keep", "default"], help="what becomes of freed memory")
    parser.add_argument("--max-cpu-isa", help="ONEDNN_MAX_CPU_ISA of all contenders, e.g. AVX512_CORE_BF16: no AMX")
    parser.add_argument("--loop", action="store_true", help="compare the trainer with the bare step instead")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and save when asked."""
    options = parse_options()
    if options.markdown is not None:
        print(markdown([json.loads(line) for line in options.markdown.read_text().splitlines()]))
        return
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    for preset, precision in product(options.preset, options.precision):
        base = Case(
            preset, precision, *options.batch, threads=options.threads, code="ours",
            keeps_freed_memory=options.allocator == "keep",
        )  # fmt: skip
        if options.loop:
            of_case, described = loop_rows(base, options.rounds, options.max_cpu_isa)
        else:
            of_case, described = measure(base, options)
            of_case = compared(of_case)
        rows += of_case
    publish(
        rows, options.output, "train_step", torch=described["torch"], transformers=described["transformers"],
        gpu=described["gpu"], tf32=described["tf32"], max_cpu_isa=options.max_cpu_isa, machine=machine(),
        load_average=round(load, 2),  # above zero, others used the machine when this began
        command=shlex.join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
    )  # fmt: skip
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
