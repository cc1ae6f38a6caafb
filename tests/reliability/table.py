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
    newest = {}
    for row in (json.loads(line) for line in lines if line.strip()):
        newest[row["test"], row["what"]] = row
    rows = sorted(newest.values(), key=lambda row: int(row["test"].removeprefix("R")))  # stable: rows of a test stay
    table = ["| test | what | passed | time | measured |", "|---|---|---|---|---|"]
    return "\n".join(table + [_render_row(row) for row in rows]) + "\n"


def _render_row(row: dict[str, Any]) -> str:
    what = row["what"].replace("|", "\\|")
    took = f"{row['seconds']:.0f} s" if row["seconds"] < 100 else f"{row['seconds'] / 60:.0f} min"
    measured = f"{row['date']}, torch {row['torch']}, {row['commit']}"
    return f"| {row['test']} | {what} | {row['passed']} of {row['trials']} | {took} | {measured} |"
