"""The rows of counted tests as a table for people."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

TITLES = {  # of the tests, for the short table
    "R1": "kill -9 of the job or of one rank, half of them in a save; then the same bits",
    "R2": "kill at every system call of a save; disks that a power loss leaves",
    "R3": "SIGTERM, SIGINT, SIGUSR1 in every phase: saved, continued to the same bits",
    "R4": "damaged datasets: refused, or found by `tools/verify.py`",
    "R5": "NaN or Inf in a loss, gradient or microbatch",
    "R6": "another layout at every resume: each sample once, the same losses",
    "R7": "full disks, size limits, directories that go away",
    "R8": "8 processes build one dataset, 3 are killed",
    "R9": "planted pickles; forged checkpoints",
    "R10": "malformed text; killed workers",
    "R11": "any number of workers: the same bytes",
    "R12": "flipped bits and other damage of checkpoints",
    "R13": "a rank hangs, freezes, dies or raises; lost nodes; a cut cable",
    "R14": "ranks started with other flags, data or code",
    "R16": "nobody else draws from the random number generators",
    "R17": "10,000 steps: flat memory, descriptors, threads",
    "R18": "`--keep-last 1`: a loadable checkpoint at every look",
}


def provenance(command: str) -> dict[str, str]:
    """What every row says about where it comes from."""
    # A name of the commit only, with a mark when files were changed since.
    describe = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": importlib.metadata.version("torch"),
        "commit": commit,
        "command": command,
    }


def render(lines: Iterable[str]) -> str:
    """Markdown table of rows in JSON lines; of rows with the same test and text, the last one."""
    table = ["| test | what | passed | time | measured |", "|---|---|---|---|---|"]
    return "\n".join(table + [_render_row(row) for row in _newest(lines)]) + "\n"


def summarize(lines: Iterable[str]) -> str:
    """Markdown table with one line a test: the sums of its rows."""
    sums: dict[str, list[int]] = {}
    for row in _newest(lines):
        passed, trials = sums.get(row["test"], (0, 0))
        sums[row["test"]] = [passed + row["passed"], trials + row["trials"]]
    table = ["| test | what | passed |", "|---|---|---|"]
    table += [f"| {test} | {TITLES[test]} | {passed:,} of {trials:,} |" for test, (passed, trials) in sums.items()]
    return "\n".join(table) + "\n"


def _newest(lines: Iterable[str]) -> list[dict[str, Any]]:
    newest = {}
    for row in (json.loads(line) for line in lines if line.strip()):
        newest[row["test"], row["what"]] = row
    return sorted(newest.values(), key=lambda row: int(row["test"].removeprefix("R")))  # stable: rows of a test stay


def _render_row(row: dict[str, Any]) -> str:
    what = row["what"].replace("|", "\\|")
    took = f"{row['seconds']:.0f} s" if row["seconds"] < 100 else f"{row['seconds'] / 60:.0f} min"
    measured = f"{row['date']}, torch {row['torch']}, {row['commit']}"
    return f"| {row['test']} | {what} | {row['passed']} of {row['trials']} | {took} | {measured} |"
