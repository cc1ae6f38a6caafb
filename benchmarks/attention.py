"""Time, memory and error of attention with a T5 position bias and its gradient, beside what has no bias.

Contenders: this project's Triton kernels, which take the bias as a vector; torch's memory-efficient attention with the
bias as a matrix; FlexAttention, compiled, with the vector. As ceilings: our kernels without a bias, and torch's flash
attention, which can have none. Every case has about the same number of tokens.

Contenders take turns, in another order each round; a row is the median of its rounds. On a GPU a turn replays a CUDA
graph, so that launching costs nothing (`graph`: whether that worked), over inputs that together exceed its caches;
`eager_ms` is the same call without a graph, which includes what the host needs. Rows appear as cases finish, the most
important first. Errors are relative, against float64. A contender that fails has a row that says so.

    python benchmarks/attention.py --output benchmarks/results/attention.jsonl
    python benchmarks/attention.py --variants             time tile sizes of our kernels instead
    python benchmarks/attention.py --markdown benchmarks/results/attention.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attention_contenders import CONTENDERS, Problem, Shape, errors, make_diagonals, make_inputs
from attention_table import markdown
from attention_timing import Call, timed_call
from attention_variants import measure_variants, shapes
from report import Rows, cpu_model

TOKENS, HEADS, ROUNDS = 16384, 12, 9
PASSES = ("forward", "forward_backward")
INPUT_SETS = 3


def cases(tiny: bool) -> list[Shape]:
    """Shapes, the most important first."""
    if tiny:
        return [Shape(2, 1, 20, 16, True, torch.float32)]
    shapes = []
    for causal, channels, length in product((False, True), (64, 128), (512, 1024, 2048, 4096)):
        shapes.append(Shape(TOKENS // length, HEADS, length, channels, causal))
    return shapes


def first_line(error: Exception) -> str:
    """For a row."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def build(
    names: list[str], shape: Shape, device: torch.device, failed: Callable[[str, str], None]
) -> dict[str, tuple[Problem, dict[str, float]]]:
    """Those contenders that can compute the shape, warmed up, with their errors."""
    inputs = [make_inputs(shape, device, seed) for seed in range(INPUT_SETS if device.type == "cuda" else 1)]
    diagonals = make_diagonals(shape, device)
    problems = {}
    for name in names:
        try:
            problem = Problem(name, shape, inputs, diagonals)
            problem.forward(inputs[0])
            problems[name] = problem, errors(problem, diagonals)
        except Exception as error:  # noqa: PERF203 - whatever a library raises, the others go on
            failed(name, first_line(error))
    return problems


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """Memory of the device that a call needs beyond its arguments."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def take_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, which starts with another one each time."""
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(calls[name].milliseconds())
    return found


def measure(shape: Shape, names: list[str], device: torch.device, rounds: int, rows: Rows) -> None:
    """The rows of a shape."""
    described = shape.described()
    problems = build(names, shape, device, lambda name, error: rows.add(
        {"contender": name, **described, "error_message": error}
    ))  # fmt: skip
    if not problems:
        return
    for which in PASSES:
        replayed: dict[str, Call] = {}
        eager: dict[str, Call] = {}
        peaks = {}
        for name, (problem, _) in problems.items():
            method = getattr(problem, which)
            functions = [partial(method, inputs) for inputs in problem.inputs]
            peaks[name] = peak_mib(functions[0], device)
            eager[name] = replayed[name] = timed_call(functions, device, graph=False)
            try:
                replayed[name] = timed_call(functions, device, graph=True)
            except Exception as error:  # not all that torch calls can be captured; the row says so
                print(f"{name}: no graph: {first_line(error)}", file=sys.stderr)
        without_graph = take_turns(eager, max(1, rounds // 3))
        for name, milliseconds in take_turns(replayed, rounds).items():
            median = statistics.median(milliseconds)
            rows.add({
                "contender": name, "pass": which, **described,
                "error": {key: float(f"{value:.3g}") for key, value in problems[name][1].items()},
                "ms": round(median, 4), "ms_range": [round(min(milliseconds), 4), round(max(milliseconds), 4)],
                "tflops": round(shape.flops(which == "forward_backward") / median / 1e9, 2),
                "graph": replayed[name].graph, "eager_ms": round(statistics.median(without_graph[name]), 4),
                "peak_mib": peaks[name], "rounds": rounds,
            })  # fmt: skip


def setting_of(device: torch.device) -> dict[str, Any]:
    """What all rows have in common."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "benchmark": "attention",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "torch": torch.__version__,
        "triton": version,
        "python": platform.python_version(),
        "command": shlex.join(["python", "benchmarks/attention.py", *sys.argv[1:]]),
    }


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows to this file too")
    parser.add_argument("--markdown", type=Path, help="print the tables of this file of rows and measure nothing")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a test of this script")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=330.0, help="start no further case after this long")
    parser.add_argument("--tiny", action="store_true", help="a small case")
    parser.add_argument("--variants", action="store_true", help="time tile sizes of our kernels instead")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and save when asked."""
    options = parse_options()
    if options.markdown is not None:
        print(markdown([json.loads(line) for line in options.markdown.read_text().splitlines()]))
        return
    if options.device == "cpu":  # Triton's interpreter, chosen before Triton is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    device = torch.device(options.device)
    if device.type == "cuda":
        # Each shape is compiled on its own, and none may fall back to the uncompiled kernel.
        torch._dynamo.config.recompile_limit = 64
    rows = Rows(options.output, setting_of(device))
    began = time.perf_counter()

    def remaining_s() -> float:
        return options.seconds - (time.perf_counter() - began)

    for shape in shapes(options.tiny) if options.variants else cases(options.tiny):
        if remaining_s() < 0:
            print(f"no time left for {shape}", file=sys.stderr)
        elif options.variants:
            measure_variants(shape, device, options.tiny, rows.add, remaining_s)
        else:
            measure(shape, options.contenders, device, options.rounds, rows)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n" + markdown(rows.rows))


if __name__ == "__main__":
    main()
