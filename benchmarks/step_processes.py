"""Contenders of `train_step.py` and `memory.py`, each in a process of its own, that make steps in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from step_contender import Case

CONTENDER = Path(__file__).with_name("step_contender.py")


class StepProcess:
    """A contender that waits for its turn.

    Args:
        name: What it is called.
        case: What it is.
        max_cpu_isa: The most that oneDNN may use of the processor's instructions (`ONEDNN_MAX_CPU_ISA`); None: all.

    Attributes:
        hello: What it has said of itself: `keeps_freed_memory`, `imports_bytes`.

    Raises:
        SystemExit: It has failed; the last lines that it wrote are printed. Also from `ask`.
    """

    def __init__(self, name: str, case: Case, max_cpu_isa: str | None = None) -> None:
        self.name, self.case = name, case
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(CONTENDER), case.to_json()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env=environment(case.threads, max_cpu_isa),
        )  # fmt: skip
        self.hello = self._answer()

    def __enter__(self) -> StepProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, command: int | str) -> dict[str, Any]:
        """`describe`, or make so many steps; see `step_contender`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then the answer says why
            print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().splitlines()[-15:]
        raise SystemExit("\n".join([*lines, f"error: {self.name} ended with status {status}"]))


def environment(threads: int, max_cpu_isa: str | None) -> dict[str, str]:
    """The environment of whatever is measured, without settings of the allocator, which `Case` has."""
    allocator = ("MALLOC_", "GLIBC_TUNABLES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(allocator)}
    return kept | {"OMP_NUM_THREADS": str(threads)} | ({"ONEDNN_MAX_CPU_ISA": max_cpu_isa} if max_cpu_isa else {})


def available_bytes() -> int | None:
    """Memory that new processes can have; None where Linux does not say so."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The names in the order of round `number`: each is first, and each follows each of its neighbours, in turn."""
    first = number % len(names)
    order = [*names[first:], *names[:first]]
    return order[::-1] if number // len(names) % 2 else order


def take_turns(processes: Mapping[str, StepProcess], rounds: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """What each process answers to `steps` steps in each round."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
    for number in range(rounds):
        for name in rotated(list(processes), number):
            answers[name].append(processes[name].ask(steps))
    return answers
