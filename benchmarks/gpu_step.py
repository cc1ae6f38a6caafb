"""The whole training step on one GPU, in bf16: this project by backends and options beside Hugging Face's T5.

Forward and backward passes over the microbatches of a step and AdamW's fused kernel, weights in fp32, products in bf16
(theirs under autocast; rows with `trains_differently` have bf16 weights and optimizer state), on the same weights and
the same batches of random words, without padding and dropout. A step's floor, its matrix products alone, lives beside
the contenders of a model and makes steps in turns with each: `share_of_floor` has been measured against it at the same
time. Each contender is a process of its own, so that one that fails or runs out of memory costs no other's row, and a
row is written as soon as it is there. Times are the GPU's own (CUDA events), medians of turns after the first steps,
which compile. The losses of the first steps are compared with those of the first contender; with one that differs the
exit status is 1. MFU is by the model's own matrix products (`t5_flops`: attention scores in full, recomputation not
counted) and the vendor's dense bf16 peak.

    python benchmarks/gpu_step.py --output gpu-results/step.jsonl                  base, large and xl at 512/114
    python benchmarks/gpu_step.py --preset t5-v1_1-xl --contenders fp8             only contenders with that in the name
    python benchmarks/gpu_step.py --markdown gpu-results/step.jsonl                the table of the rows
    python benchmarks/gpu_step.py --device cpu --tiny                              that all of it runs, anywhere
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
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from report import Rows, machine
from step_contender import Case
from step_processes import StepProcess, take_turns

CHECKED_STEPS = 3
# How much of a loss contenders may differ in before the first step, and before those after it: AdamW's first step moves
# every weight by the learning rate in the direction of its gradient's sign, whatever rounding has made of it.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (1e-3, 6e-3), "fp8": (1e-2, 3e-2), "bf16 weights": (2**-7, math.inf)}
# A contender is not begun when fewer seconds than this are left of --minutes, or than the slowest has taken.
LEAST_SECONDS = 60.0


@dataclass(frozen=True)
class Contender:
    """What makes the step.

    Attributes:
        case: Fields of `step_contender.Case`.
        package: Without which it cannot run.
        kind: What its losses are compared by: a key of `TOLERANCES`, None: by the precision.
        times_rows: Rows of its microbatches by those of the others; the step stays the same.
    """

    case: dict[str, Any]
    package: str | None = None
    kind: str | None = None
    times_rows: float = 1.0

    def of(self, base: Case) -> Case:
        """Its case, on the batch of `base`."""
        rows = max(1, int(base.rows * self.times_rows))
        microbatches = max(1, base.step_rows // rows)
        return replace(base, rows=base.step_rows // microbatches, microbatches=microbatches, **self.case)


def _ours(*flags: str, compiled: bool = False, package: str | None = None, kind: str | None = None) -> Contender:
    return Contender({"code": "ours", "compiled": compiled, "our_flags": flags}, package, kind)


ELEMENTWISE = [f"--{part}-backend" for part in ("norm", "activation", "cross-entropy")]
TRITON_ELEMENTWISE = [word for flag in ELEMENTWISE for word in (flag, "triton")]
TORCH_ELEMENTWISE = [word for flag in ELEMENTWISE for word in (flag, "torch")]
FP8 = ("--fp8-format", "e4m3")
TE = ("--transformer-impl", "transformer_engine")

# In the order of what is wanted first: time may run out.
CONTENDERS: dict[str, Contender] = {
    "ours compiled": _ours(compiled=True),
    "Hugging Face SDPA compiled": Contender({"code": "theirs", "attention": "sdpa", "compiled": True}, "transformers"),
    "ours": _ours(),
    "ours compiled, sdpa": _ours("--attention-backend", "sdpa", compiled=True),
    "ours fp8 torchao compiled": _ours(*FP8, compiled=True, package="torchao", kind="fp8"),
    "ours compiled, CUDA graphs": _ours("--cuda-graphs", compiled=True),
    "ours, accumulation fusion": _ours("--gradient-accumulation-fusion"),
    "ours, CUDA graphs": _ours("--cuda-graphs"),
    # For a GPU that has room for more, or too little for theirs.
    "ours compiled, twice the rows": Contender({"code": "ours", "compiled": True}, times_rows=2.0),
    "Hugging Face SDPA compiled, half the rows": Contender(
        {"code": "theirs", "attention": "sdpa", "compiled": True}, "transformers", times_rows=0.5
    ),
    "Hugging Face SDPA": Contender({"code": "theirs", "attention": "sdpa"}, "transformers"),
    "ours compiled, Triton elementwise": _ours(*TRITON_ELEMENTWISE, compiled=True, package="triton"),
    "ours compiled, torch elementwise": _ours(*TORCH_ELEMENTWISE, compiled=True),
    "ours, torch elementwise": _ours(*TORCH_ELEMENTWISE),
    "ours compiled, flex": _ours("--attention-backend", "flex", compiled=True),
    "ours Transformer Engine": _ours(*TE, package="transformer_engine"),
    "ours fp8 Transformer Engine": _ours(
        *TE, "--fp8-format", "hybrid", "--fp8-recipe", "delayed", package="transformer_engine", kind="fp8"
    ),
    "Hugging Face bf16 weights compiled": Contender(
        {"code": "theirs", "attention": "sdpa", "compiled": True, "pure": True}, "transformers", "bf16 weights"
    ),
}


@dataclass(frozen=True)
class Size:
    """Rows of a microbatch on a GPU of 80 GB and on one of 140 GB, and microbatches of a step.

    Several microbatches keep the share of AdamW, which streams 28 bytes and more a parameter, to what it is in training
    runs with their hundreds of rows.
    """

    rows_80: int
    rows_140: int
    microbatches: int


# Activations of 512/114 in bf16 without recomputation, by `t5_memory`: base 16.6 GiB for 64 rows, large 23.2 for 32, xl
# 15.7 for 8 and 26.1 for 16 (beside 42.5 GiB of weights, gradients and moments).
SIZES = {"t5-v1_1-base": Size(64, 128, 2), "t5-v1_1-large": Size(32, 64, 2), "t5-v1_1-xl": Size(8, 16, 8)}
LARGE_GPU_GIB = 120
# What this project wants: model FLOPs utilisation of its best, how much faster than the best of Hugging Face, and FP8
# than bf16.
MFU_AIMS = {"t5-v1_1-base": 0.40, "t5-v1_1-large": 0.50, "t5-v1_1-xl": 0.55}
RATIO_AIM, FP8_AIM, FP8_PRESET = 1.5, 1.25, "t5-v1_1-xl"
TINY = [
    "--encoder-num-layers", "1", "--decoder-num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2",
    "--kv-channels", "16", "--ffn-hidden-size", "32", "--vocab-size", "128",
]  # fmt: skip


class Budget:
    """Time that is left; None: as much as is needed."""

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._needed = LEAST_SECONDS

    def is_spent(self) -> bool:
        """Whether the next contender might not end in time."""
        return self._end - time.monotonic() < self._needed

    def took(self, seconds: float) -> None:
        """A contender has taken so long."""
        self._needed = max(self._needed, seconds)


def differences(losses: list[float], reference: list[float]) -> list[float]:
    """Relative differences of losses from the first contender's."""
    return [abs(loss - expected) / abs(expected) for loss, expected in zip(losses, reference, strict=True)]


def agree(found: list[float], kind: str) -> bool:
    """Whether relative differences of the first losses are within what the kind of arithmetic explains."""
    first, later = TOLERANCES[kind]
    return all(difference <= (later if step else first) for step, difference in enumerate(found))


class Preset:
    """The contenders of one model, and the floor that lives as long as they are measured."""

    def __init__(self, base: Case, options: argparse.Namespace, stack: ExitStack) -> None:
        self.base, self.options = base, options
        self.floor = stack.enter_context(StepProcess("floor", replace(base, code="floor")))
        self.floor.ask(CHECKED_STEPS)
        self.described = self.floor.ask("describe")
        self.reference: list[float] | None = None

    def row(self, name: str) -> dict[str, Any]:
        """What came of one contender: its times, or why there are none."""
        contender = CONTENDERS[name]
        case = contender.of(self.base)
        row = {
            "preset": case.preset, "precision": case.precision, "contender": name, "code": case.code,
            "flags": [*case.our_flags, *(["--compile"] if case.compiled else [])],
            "trains_differently": case.pure, "fp8": contender.kind == "fp8",
            "batch": [case.rows, case.encoder_length, case.decoder_length], "microbatches": case.microbatches,
            "gpu": self.described["gpu"], "torch": self.described["torch"],
        }  # fmt: skip
        if contender.package is not None and find_spec(contender.package) is None:
            return row | {"skipped": f"the package {contender.package} is not installed"}
        began = time.monotonic()
        try:
            with StepProcess(name, case) as process:
                first = process.ask(CHECKED_STEPS)
                row["start_and_first_steps_s"] = round(time.monotonic() - began, 1)
                names = {"floor": self.floor, name: process}
                answers = take_turns(names, self.options.rounds, self.options.steps)
        except SystemExit as failure:  # the last lines of what the process has said
            return row | {"failed": _reason(str(failure))}
        return row | self._measured(contender, case, first, {key: answers[key] for key in names})

    def _measured(
        self, contender: Contender, case: Case, first: dict[str, Any], answers: dict[str, list[dict[str, Any]]]
    ) -> dict[str, Any]:
        floor_s, seconds = ([answer["seconds"] for answer in of_name] for of_name in answers.values())
        median_s, losses = statistics.median(seconds), first["losses"]
        self.reference = self.reference or losses
        found = differences(losses, self.reference)
        tflops, peak = self.described["flops"] / median_s / 1e12, peak_tflops(self.described["gpu"])
        return {
            "step_ms": round(1e3 * median_s, 3),
            "step_ms_range": [round(1e3 * end(seconds), 3) for end in (min, max)],
            "floor_ms": round(1e3 * statistics.median(floor_s), 3),
            "share_of_floor": round(statistics.median(floor_s) / median_s, 4),
            "sequences_per_s": round(case.step_rows / median_s, 2),
            "tokens_per_s": round(case.tokens / median_s, 1),
            "tflops": round(tflops, 3),
            "mfu": None if peak is None else round(tflops / peak, 4),
            "peak_memory_gib": round(max(a["peak_bytes"] for a in list(answers.values())[1]) / 2**30, 2),
            "first_losses": losses,
            "loss_differences": [float(f"{difference:.2g}") for difference in found],
            "losses_agree": agree(found, contender.kind or case.precision),
            "rounds": self.options.rounds,
            "steps_of_a_turn": self.options.steps,
            "parameters": self.described["parameters"],
            "teraflop_of_a_step": round(self.described["flops"] / 1e12, 3),
        }


def _reason(message: str) -> str:
    """The line of a process's last words that says most."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line for line in lines[:-1] if "Error" in line or line.startswith("error:")]
    return (told or lines[:-1] or lines)[-1][:500]


def peak_tflops(gpu: str | None) -> float | None:
    """Dense bf16 peak of a GPU, if the trainer knows it."""
    from megatron.training.metrics import PEAK_TFLOPS

    return next((peak for part, peak in PEAK_TFLOPS.items() if gpu is not None and part in gpu), None)


def memory_gib() -> float:
    """Of the GPU; 0 without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def base_case(preset: str, options: argparse.Namespace) -> Case:
    """What all contenders of a model have in common."""
    size = SIZES.get(preset, Size(8, 8, 1))
    rows = size.rows_140 if memory_gib() > LARGE_GPU_GIB else size.rows_80
    if options.tiny:
        return Case(preset, options.precision, 2, 16, 8, options.threads, "ours", microbatches=2, model_flags=TINY)
    return Case(
        preset, options.precision, options.rows or rows, *options.lengths, threads=options.threads, code="ours",
        microbatches=options.microbatches or size.microbatches, recompute=options.recompute,
    )  # fmt: skip


def chosen(parts: list[str]) -> list[str]:
    """Contenders that are named, or have one of the other parts in their names."""
    named = {part for part in parts if part in CONTENDERS}
    others = [part.lower() for part in parts if part not in named]
    return [name for name in CONTENDERS if name in named or any(part in name.lower() for part in others)]


def measure(options: argparse.Namespace, publish: Any) -> list[dict[str, Any]]:
    """All rows, each given to `publish` as soon as it is there."""
    rows: list[dict[str, Any]] = []
    budget = Budget(options.minutes)
    wanted = chosen(options.contenders)
    for preset in options.preset:
        if budget.is_spent():
            print(f"{preset}: no time is left", file=sys.stderr)
            continue
        with ExitStack() as stack:
            contenders = Preset(base_case(preset, options), options, stack)
            for name in wanted:
                if budget.is_spent():
                    print(f"{preset}: no time is left for {name}", file=sys.stderr)
                    continue
                began = time.monotonic()
                rows.append(contenders.row(name))
                budget.took(time.monotonic() - began)
                publish(rows[-1])
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each contender, and below what is wanted of each model and what there is of it."""
    titles = ["model", "contender", "rows", "step, ms", "floor", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "losses"]
    lines = [titles, ["---", "---", *["--:"] * (len(titles) - 3), "---"]]
    for row in rows:
        rows_of_step = f"{row['microbatches']} x {row['batch'][0]}"
        head = [row["preset"], row["contender"] + ("¹" if row["trains_differently"] else ""), rows_of_step]
        if "step_ms" not in row:
            reason = row.get("skipped") or row["failed"]
            lines.append([*head, *[""] * (len(titles) - 4), reason.replace("|", "/")])
            continue
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append([
            *head, f"{row['step_ms']:,.1f}", f"{row['share_of_floor']:.2f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['tflops']:,.0f}", mfu, f"{row['peak_memory_gib']:.1f}",
            "agree" if row["losses_agree"] else f"**differ: {row['loss_differences']}**",
        ])  # fmt: skip
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = ["¹ Weights and optimizer state in bf16, too: trains differently."]
    presets = dict.fromkeys(row["preset"] for row in rows)
    return "\n\n".join([table, *notes, *filter(None, (against_aims(preset, rows) for preset in presets))])


def against_aims(preset: str, rows: list[dict[str, Any]]) -> str:
    """Our best of a model beside what is wanted of it; empty when there is nothing to say."""
    alike = [row for row in rows if row["preset"] == preset and not row["trains_differently"]]
    good = [row for row in alike if row.get("losses_agree")]

    def fastest(code: str, fp8: bool) -> dict[str, Any] | None:
        of_code = [row for row in good if row["code"] == code and row["fp8"] == fp8]
        return max(of_code, key=lambda row: row["tokens_per_s"], default=None)

    ours, theirs, fp8 = fastest("ours", False), fastest("theirs", False), fastest("ours", True)
    if ours is None:
        return ""
    parts = [f"{preset}: best of ours is {ours['contender']}"]
    if ours["mfu"] is not None and preset in MFU_AIMS:
        parts.append(f"MFU {ours['mfu']:.1%} (aim {MFU_AIMS[preset]:.0%})")
    if theirs is not None:
        ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
        parts.append(f"{ratio:.2f} x {theirs['contender']} (aim {RATIO_AIM})")
    if fp8 is not None:
        aim = f" (aim {FP8_AIM})" if preset == FP8_PRESET else ""
        parts.append(f"{fp8['contender']} {fp8['tokens_per_s'] / ours['tokens_per_s']:.2f} x bf16{aim}")
    return ", ".join(parts)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="append each row to this file")
    parser.add_argument("--markdown", type=Path, help="print the table of this file of rows and measure nothing")
    parser.add_argument("--preset", nargs="+", default=list(SIZES))
    parser.add_argument("--contenders", nargs="+", default=[""], help="names, or parts of names")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--lengths", nargs=2, type=int, default=[512, 114], help="encoder and decoder tokens of a row")
    parser.add_argument("--rows", type=int, help="rows of a microbatch; default by model and memory of the GPU")
    parser.add_argument("--microbatches", type=int, help="microbatches of a step; default by model")
    parser.add_argument("--recompute", choices=["selective"], help="--recompute-granularity of ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--minutes", type=float, help="begin no contender that might not end within so many")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a model of one layer: a check of this program itself")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, and save when asked."""
    options = parse_options()
    if options.markdown is not None:
        print(markdown([json.loads(line) for line in options.markdown.read_text(encoding="utf-8").splitlines()]))
        return
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the contenders, too
    setting = {
        "benchmark": "gpu_step", "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine(),
        "command": shlex.join(["python", "benchmarks/gpu_step.py", *sys.argv[1:]]),
    }  # fmt: skip
    rows = measure(options, Rows(options.output, setting, append=True).add)
    print("\n" + markdown(rows))
    if any(not row.get("losses_agree", True) for row in rows):
        sys.exit("error: losses differ; see the table")


if __name__ == "__main__":
    main()
