"""R13: one rank hangs, is frozen, ends early, raises or is killed: all ranks end in time, and the console says why."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.corpora import make_byte_dataset, write_prose
from tests.reliability import elastic, faulty_program
from tests.reliability.faulty_program import FAULTS, PURPOSE
from tests.reliability.jobs import ForkedJob
from tests.reliability.signals import RUN, tail

PROGRAM = str(Path(faulty_program.__file__))
TIMEOUT_S = 8.0
LATER_S = 5.0  # all ranks have ended so long after the timeout
PHASES = ("start-up", "step", "evaluation", "save")
LAYOUTS = {
    2: [],
    4: shlex.split("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}
CALL = r"\w+ of \w+ \(megatron/[\w/]+\.py:\d+\)"
WAITED = rf"error: rank \d+ has waited \d+ s in {CALL}( at step \d+)?; rank {{victim}}"
BROKEN = rf"error: rank \d+: {CALL} failed: [^;\n]*; rank {{victim}} has not been heard of for \d+ s, last in "
MESSAGES = {
    "hang": rf"{WAITED} is elsewhere: fail \(faulty_program.py:\d+\) since \d+ s\n",
    "freeze": rf"{WAITED} has not been heard of for \d+ s, last in ",
    "exit": BROKEN,
    "kill": BROKEN,
    "raise": rf"error: (rank {{victim}} ended with ValueError: {PURPOSE}|rank \d+ ended with RuntimeError: "
    rf"cannot save \S+: rank {{victim}} raised ValueError\('{PURPOSE}'\))\n",
}
STATUS_OF_VICTIM = {"hang": 3, "freeze": -9, "exit": 0, "raise": 1, "kill": -9}


@dataclass(frozen=True)
class Trial:
    """Rank `victim` of `ranks` fails with `fault` in `phase`."""

    ranks: int
    fault: str
    phase: str
    victim: int

    def __str__(self) -> str:
        return f"{self.fault} of rank {self.victim} of {self.ranks} in {self.phase}"


def all_trials() -> list[Trial]:
    """Every fault in every phase, of two and of four ranks, of the first and of another rank."""
    each = itertools.product(LAYOUTS, FAULTS, PHASES, (0, 1))
    return [Trial(ranks, fault, phase, place * (ranks - 1)) for ranks, fault, phase, place in each]


def run_trial(trial: Trial, data_path: Path) -> float:
    """Seconds from the fault to the end of the last rank.

    Raises:
        AssertionError: Too late, another exit status than documented, or a console that does not say who and where.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name, "log")
        arguments = [trial.fault, trial.phase, str(trial.victim), name, *RUN, *LAYOUTS[trial.ranks]]
        arguments += ["--data-path", str(data_path), "--save", str(folder / "run")]
        arguments += ["--distributed-timeout-minutes", str(TIMEOUT_S / 60)]
        job = ForkedJob(arguments, trial.ranks, log, PROGRAM)
        try:
            while not (folder / "fault").exists():
                assert not job.ended(0.05), f"ended before the fault: {tail(log)}"
            fault_at = (folder / "fault").stat().st_mtime
            ended = job.ended(TIMEOUT_S + LATER_S)
            seconds = time.time() - fault_at
            assert ended, f"not ended after {seconds:.1f} s: {tail(log)}"
        finally:
            if not job.ended(0):
                job.kill(None)
        statuses = list(job.statuses())
        own, of_others = {STATUS_OF_VICTIM[trial.fault]}, {3, -15}  # -15: the launcher ended who left late
        if (trial.fault, trial.phase) == ("raise", "save"):  # is raised on all ranks
            own, of_others = {1, -15}, {1, 3, -15}
        victim = statuses.pop(trial.victim)
        assert victim in own and of_others.issuperset(statuses), f"statuses {job.statuses()}: {tail(log)}"
        message = MESSAGES[trial.fault].format(victim=trial.victim)
        assert re.search(message, log.read_text()), f"does not say {message}: {tail(log)}"
    return seconds


def attempt(trial: Trial, data_path: Path) -> float | str:
    """Seconds from the fault to the end, or what went wrong."""
    try:
        return run_trial(trial, data_path)
    except Exception as error:
        print(f"R13: {trial}: {error}", file=sys.stderr, flush=True)
        return f"{trial}: {error}"


def count(trials: int | None = None) -> list[dict[str, Any]]:
    """Rows of R13: of all trials, or of the first so many, and of runs under torchrun (`elastic.py`)."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        data_path = make_byte_dataset(write_prose(Path(name, "corpus.jsonl")))
        results = [attempt(trial, data_path) for trial in all_trials()[:trials]]
    failures = [result for result in results if isinstance(result, str)]
    durations = [result for result in results if isinstance(result, float)]
    row = {
        "test": "R13",
        "what": f"one rank hangs, is frozen, ends, raises or is killed: all end within the timeout + {LATER_S:.0f} s "
        "and the console names rank and collective",
        "trials": len(results),
        "passed": len(durations),
        "seconds": round(time.monotonic() - start, 1),
        "timeout_s": TIMEOUT_S,
        "slowest_end_s": round(max(durations, default=0.0), 1),
    }
    return [row | ({"failures": failures} if failures else {}), *(elastic.count() if trials is None else [])]
