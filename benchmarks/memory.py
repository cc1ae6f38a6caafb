"""Peak memory of a training step (forward, backward, AdamW) beside Hugging Face's and beside the planner's formula.

Each contender makes two steps in a fresh process. On CPUs its peak is the most that was resident (`VmHWM` of Linux)
less what was resident after the imports and before the model was built (`imports_gib`); on a GPU it is the most that
torch had allocated. `beyond_gib` is what a peak has beyond weights, gradients and the two moments of AdamW, 16 bytes a
parameter; `planned_beyond_gib` is what the planner (`--dry-run`) computes for that: activations and workspace.
`share_of_theirs` and `beyond_share_of_theirs` compare with the smaller of Hugging Face's two modes that keep all
activations, eager attention and SDPA. Those with checkpointing recompute whole layers and are there for information.

The C library's allocator, which either gives freed memory back or keeps it, is set for all alike; both are measured.
`time_to_keeping_all` is the time of a step that recomputes attention, over that of one that keeps everything: medians
of steps that alternate.

    python benchmarks/memory.py [--output benchmarks/results/memory.jsonl]
    python benchmarks/memory.py --markdown benchmarks/results/memory.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from report import machine, publish
from step_contender import Case
from step_processes import StepProcess, take_turns

GIB = 2**30
BYTES_OF_A_PARAMETER = 16  # weight, gradient and two moments in fp32
STEPS = 2

CONTENDERS: dict[str, dict[str, Any]] = {
    "ours": {"code": "ours"},
    "ours, selective recomputation": {"code": "ours", "recompute": "selective"},
    "ours compiled": {"code": "ours", "compiled": True},
    "Hugging Face eager": {"code": "theirs"},
    "Hugging Face SDPA": {"code": "theirs", "attention": "sdpa"},
    "Hugging Face compiled": {"code": "theirs", "compiled": True},
    "Hugging Face eager, checkpointing": {"code": "theirs", "recompute": "full"},
    "Hugging Face SDPA, checkpointing": {"code": "theirs", "attention": "sdpa", "recompute": "full"},
}
KEEPING, SELECTIVE = "ours", "ours, selective recomputation"
THEIRS = ("Hugging Face eager", "Hugging Face SDPA")


def measure(name: str, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of a contender, and what was measured with."""
    with StepProcess(name, case) as process:
        peak = process.ask(STEPS)["peak_bytes"]
        described = process.ask("describe")
        hello = process.hello
    fixed = BYTES_OF_A_PARAMETER * described["parameters"]
    row = {
        "preset": case.preset,
        "precision": case.precision,
        "contender": name,
        "code": case.code,
        "keeps_freed_memory": hello["keeps_freed_memory"],
        "peak_gib": round(peak / GIB, 3),
        "weights_gradients_and_state_gib": round(fixed / GIB, 3),
        "beyond_gib": round((peak - fixed) / GIB, 3),
        "imports_gib": round(hello["imports_bytes"] / GIB, 3),
        "parameters": described["parameters"],
        "batch": [case.rows, case.encoder_length, case.decoder_length],
        "threads": case.threads,
    }
    if case.code == "ours":
        row["planned_beyond_gib"] = round(described["planned_bytes"] / GIB, 3)
    return row, described


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one shape, precision and allocator, with the shares of the smaller of Hugging Face's plain modes."""
    plain = [row for row in rows if row["contender"] in THEIRS]
    if not plain:
        return rows
    smallest = min(plain, key=lambda row: row["peak_gib"])
    return [
        row
        | {
            "share_of_theirs": round(row["peak_gib"] / smallest["peak_gib"], 4),
            "beyond_share_of_theirs": round(row["beyond_gib"] / smallest["beyond_gib"], 4),
        }
        for row in rows
    ]


def time_of_recomputation(base: Case, rounds: int) -> float:
    """Time of a step that recomputes attention over that of one that keeps all; medians of alternating steps."""
    with (
        StepProcess(KEEPING, replace(base, **CONTENDERS[KEEPING])) as keeping,
        StepProcess(SELECTIVE, replace(base, **CONTENDERS[SELECTIVE])) as selective,
    ):
        processes = {KEEPING: keeping, SELECTIVE: selective}
        take_turns(processes, rounds=1, steps=STEPS)
        answers = take_turns(processes, rounds, steps=1)
    medians = {name: statistics.median(answer["seconds"] for answer in of_name) for name, of_name in answers.items()}
    return medians[SELECTIVE] / medians[KEEPING]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people; where a peer with the same allocator needs less, that is said."""
    lines = [
        "| model | precision | freed memory | | peak, GiB | beyond¹ | planned | of HF's | beyond, of HF's | time² |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        planned, ratio = row.get("planned_beyond_gib"), row.get("time_to_keeping_all")
        share, beyond_share = row.get("share_of_theirs"), row.get("beyond_share_of_theirs")
        loses = row["code"] == "ours" and share is not None and share > 1
        cells = [
            row["preset"],
            row["precision"],
            "kept" if row["keeps_freed_memory"] else "given back",
            row["contender"],
            f"{row['peak_gib']:.2f}",
            f"{row['beyond_gib']:.2f}",
            "" if planned is None else f"{planned:.2f}",
            "" if share is None else f"{share:.2f}" + ", **Hugging Face wins**" * loses,
            "" if beyond_share is None else f"{beyond_share:.2f}",
            "" if ratio is None else f"{ratio:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = "¹ Beyond 16 bytes a parameter: weights, gradients, moments. ² Of a step, over the one that keeps all."
    return "\n".join([*lines, "", notes])


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows to this file too")
    parser.add_argument("--markdown", type=Path, help="print the table of this file of rows and measure nothing")
    parser.add_argument("--preset", nargs="+", default=["mt5-small", "t5-v1_1-base"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--batch", nargs=3, type=int, default=[8, 512, 114], help="rows, encoder and decoder tokens")
    parser.add_argument("--allocator", nargs="+", default=["keep", "default"], choices=["keep", "default"])
    parser.add_argument("--rounds", type=int, default=7, help="of steps with and without recomputation; 0: none")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    """Measure, print, and save when asked."""
    options = parse_options()
    if options.markdown is not None:
        print(table([json.loads(line) for line in options.markdown.read_text().splitlines()]))
        return
    rows: list[dict[str, Any]] = []
    for preset, precision, allocator in product(options.preset, options.precision, options.allocator):
        base = Case(
            preset, precision, *options.batch, threads=options.threads, code="ours",
            keeps_freed_memory=allocator == "keep", same_weights=False,
        )  # fmt: skip
        of_case = []
        for name in options.contenders:
            row, described = measure(name, replace(base, **CONTENDERS[name]))
            print(f"{preset} {precision} {allocator} {name}: {row['peak_gib']} GiB", file=sys.stderr)
            if name == SELECTIVE and options.rounds:
                row["time_to_keeping_all"] = round(time_of_recomputation(base, options.rounds), 4)
            of_case.append(row)
        rows += compared(of_case)
    publish(
        rows, options.output, "memory", torch=described["torch"], transformers=described["transformers"],
        gpu=described["gpu"], machine=machine(), command=shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
    )  # fmt: skip
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
