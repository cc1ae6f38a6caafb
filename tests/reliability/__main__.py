"""Counts of the reliability tests: `python -m tests.reliability R4 R8`, or `all` of them.

Each test prints rows of the README's table as JSON lines: what was tried, how often, how often it went right and, for
trials that did not, what went wrong. Exit status: 0 all trials passed, 1 some did not, 2 no such test.

    python -m tests.reliability all >> benchmarks/results/reliability.jsonl
    python -m tests.reliability R1 --trials 20 --seed 3 --record kills.jsonl
    python -m tests.reliability --markdown benchmarks/results/reliability.jsonl
    python -m tests.reliability --summary benchmarks/results/reliability.jsonl
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from tests.reliability.table import provenance, render, summarize

COUNTED = {  # name: module of this folder and its function, which returns rows
    "R1": "kills:count",
    "R2": "power_loss:count",
    "R3": "signals:count",
    "R4": "damaged_datasets:count",
    "R5": "numerical_faults:count",
    "R6": "ledger:count",
    "R7": "full_disk:count",
    "R8": "concurrent_preprocessing:count",
    "R9": "malicious:count",
    "R10": "malformed_text:count",
    "R11": "preprocessing_workers:count",
    "R12": "bit_flips:count",
    "R13": "hangs:count",
    "R14": "mismatch:count",
    "R16": "rng_hygiene:count",
    "R17": "soak:count",
    "R18": "retention:count",
}


def run_counted(name: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one test; of `options`, it gets those that it has."""
    module, function = COUNTED[name].split(":")
    count = getattr(importlib.import_module(f"tests.reliability.{module}"), function)
    accepted = inspect.signature(count).parameters
    rows: list[dict[str, Any]] = count(**{key: value for key, value in options.items() if key in accepted})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(COUNTED))
    parser.add_argument("--trials", type=int, help="number of trials, for tests where it can be chosen")
    parser.add_argument("--seed", type=int, help="decides what tests with random trials do")
    parser.add_argument("--record", help="file with a line for each trial; those it has already are not tried again")
    parser.add_argument(
        "--markdown", type=Path, metavar="ROWS", help="print recorded rows as a table, and nothing else"
    )
    parser.add_argument("--summary", type=Path, metavar="ROWS", help="the same with one line a test")
    arguments = vars(parser.parse_args())
    names = arguments.pop("names")
    for table, recorded_rows in ((render, arguments.pop("markdown")), (summarize, arguments.pop("summary"))):
        if recorded_rows is not None:
            print(table(recorded_rows.read_text().splitlines()), end="")
            return 0
    if names in ([], ["all"]):
        names = list(COUNTED)
    if unknown := [name for name in names if name not in COUNTED]:
        parser.error(f"no test {unknown[0]}; choose from {' '.join(COUNTED)}")
    options = {key: value for key, value in arguments.items() if value is not None}
    source = provenance(shlex.join(["python", "-m", "tests.reliability", *sys.argv[1:]]))
    # A shell that runs this in the background has it ignored, which the programs under test would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    all_passed = True
    for name in names:
        for row in run_counted(name, options):
            print(json.dumps(row | source), flush=True)
            all_passed &= row["passed"] == row["trials"]
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
