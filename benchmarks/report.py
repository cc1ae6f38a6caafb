"""What benchmarks have in common: what the machine is called, and how rows are printed and kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def cpu_model() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


# Instructions of x86 processors that decide how fast 16-bit products are, by Linux' names.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")


def cpu_features() -> dict[str, bool]:
    """Which of `INSTRUCTION_SETS` the processor has; empty where Linux does not say so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), None)
    return {} if flags is None else {name: name in flags for name in INSTRUCTION_SETS}


def machine() -> dict[str, Any]:
    """The machine at more length than every row has it: also instruction sets, memory and operating system."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "instruction_sets": cpu_features(),
        "memory_gib": round(memory_gib, 1),
        "system": platform.platform(),
    }


def publish(rows: Iterable[dict[str, Any]], output: Path | None, benchmark: str, **setting: Any) -> None:
    """Print one JSON object a row, each with the machine and the `setting`, and write them to `output` if given."""
    common = {
        "benchmark": benchmark,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "numpy": np.__version__,
        **setting,
    }
    lines = [json.dumps(row | common) for row in rows]
    print("\n".join(lines))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n".join(lines) + "\n")


class Rows:
    """Prints rows and writes them to a file, one at a time, so that a run that is cut short leaves them.

    Args:
        output: The file; None for none.
        setting: What all rows have in common.
        append: Keep what the file has; otherwise it is replaced.

    Attributes:
        rows: Those so far.
    """

    def __init__(self, output: Path | None, setting: dict[str, Any], *, append: bool = False) -> None:
        self.rows: list[dict[str, Any]] = []
        self._setting, self._output = setting, output
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            if not append:
                output.write_text("")

    def add(self, row: dict[str, Any]) -> None:
        """One more."""
        self.rows.append(row | self._setting)
        line = json.dumps(self.rows[-1])
        print(line, flush=True)
        if self._output is not None:
            with self._output.open("a", encoding="utf-8") as file:
                print(line, file=file)
