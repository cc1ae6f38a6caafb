"""Counts of the reliability tests: `python -m tests.reliability R4 R8`, or without a name all of them.

Each test prints rows of the README's table as JSON lines: what was tried, how often, how often it went right and, for
trials that did not, what went wrong. Exit status: 0 all trials passed, 1 some did not, 2 no such test.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any

COUNTED = {  # name: module of this folder and its function, which returns rows
    "R4": "damaged_datasets:count",
    "R8": "concurrent_preprocessing:count",
    "R10": "malformed_text:count",
    "R11": "preprocessing_workers:count",
}


def run_counted(name: str) -> list[dict[str, Any]]:
    """Rows of one test."""
    module, function = COUNTED[name].split(":")
    rows: list[dict[str, Any]] = getattr(importlib.import_module(f"tests.reliability.{module}"), function)()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(COUNTED))
    names = parser.parse_args().names or list(COUNTED)
    if unknown := [name for name in names if name not in COUNTED]:
        parser.error(f"no test {unknown[0]}; choose from {' '.join(COUNTED)}")
    all_passed = True
    for name in names:
        for row in run_counted(name):
            print(json.dumps(row), flush=True)
            all_passed &= row["passed"] == row["trials"]
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
