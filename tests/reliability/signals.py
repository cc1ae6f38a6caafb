"""R3: SIGTERM, SIGINT and SIGUSR1, to a whole job or one rank, in every phase: the run stops in order and goes on.

A trial stops a run on the way, continues it with the same command, and compares its metrics and the bytes of its last
checkpoint with those of a run that nothing stopped. The interrupted program waits in the phase (`paused_program.py`)
until the signals are sent, so that each hits what it is aimed at however fast the machine is.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.corpora import make_byte_dataset, write_prose
from tests.reliability import paused_program
from tests.reliability.interrupted_building import Builds, building_trials
from tests.reliability.jobs import ForkedJob, ProgramJob
from tests.reliability.kills import difference, outcome

T = TypeVar("T")

PAUSED = str(Path(paused_program.__file__))
GRACE_S = 30.0  # torchrun's: a rank that has not ended by then is killed
LAUNCHER_ENDS_WITHIN_S = 60.0  # after its ranks
KILLED = "forcefully exiting"  # what torchrun says of such a rank
BETWEEN_SIGNALS_S = 1.1  # closer ones count as one
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# The evaluation, the step that is paused in, and the save come after different steps.
EVALUATED, SAVED, LAST = 3, 5, 8
RUN = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 8 "
    "--encoder-seq-length 64 --lr 1e-2 --split 90,10,0 --log-interval 1 --eval-iters 3 --micro-batch-size 2 "
    f"--global-batch-size 8 --eval-interval {EVALUATED} --save-interval {SAVED} --train-iters {LAST}"
)
LAYOUTS = {  # name: number of ranks, flags
    "one": (1, []),
    "data": (2, []),
    "pipeline": (2, ["--pipeline-model-parallel-size", "2"]),
}


@dataclass(frozen=True)
class Trial:
    """Where a run is hit by what.

    Attributes:
        layout: Of `LAYOUTS`.
        phases: Phases of `paused_program`; the run is started, and stopped, as often.
        number: The signal.
        target: A rank, or None for all of them (with torchrun: for torchrun, which passes it on).
        presses: How often it is sent.
        flags: Further flags of the run.
        torchrun: Started by the real launcher, with these options, instead of forked; None: forked.
    """

    layout: str
    phases: tuple[str, ...]
    number: signal.Signals
    target: int | None = None
    presses: int = 1
    flags: tuple[str, ...] = ()
    torchrun: tuple[str, ...] | None = None

    def __str__(self) -> str:
        target = "all ranks" if self.target is None else f"rank {self.target}"
        by = "" if self.torchrun is None else " of torchrun"
        hits = f"{self.presses} {self.number.name} to {target}{by}"
        return " ".join([self.layout, *self.flags, "in", *self.phases, "gets", hits])


def stopped_after(trial: Trial, phase: str, before: int) -> int | None:
    """The step whose state is to be saved; None when that is not determined. `before`: where the run began."""
    if phase == "save":
        return None if "--async-save" in trial.flags else SAVED
    if phase == "step":
        # A second signal gives up the step under way, except in a pipeline, whose microbatches are not apart.
        given_up = trial.presses > 1 and trial.layout != "pipeline"
        return paused_program.STEP - given_up
    return EVALUATED if phase == "evaluation" else before


def newest(run: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("iter_")) for path in run.glob("iter_*")), default=0)


class Signals:
    """Runs trials in a folder, on a dataset."""

    def __init__(self, folder: Path, data_path: Path) -> None:
        self.folder, self.data_path = folder, data_path
        self.runs = itertools.count()
        self._expected: dict[str, dict[str, Any]] = {}

    def flags(self, layout: str, run: Path) -> list[str]:
        return [*RUN, *LAYOUTS[layout][1], "--data-path", str(self.data_path), "--save", str(run)]

    def expected(self, layout: str) -> dict[str, Any]:
        """Outcome of the run that nothing stops."""
        if layout not in self._expected:
            run = self.folder / f"uninterrupted_{layout}"
            self._finish(layout, run, [])
            self._expected[layout] = outcome(run)
        return self._expected[layout]

    def _finish(self, layout: str, run: Path, flags: Sequence[str]) -> None:
        ranks, log = LAYOUTS[layout][0], run.with_suffix(".log")
        job = ForkedJob([*self.flags(layout, run), *flags], ranks, log)
        assert job.ended(120), "the run does not end"
        assert job.statuses() == [0] * ranks, f"statuses {job.statuses()}: {tail(log)}"

    def run_trial(self, trial: Trial) -> None:
        """Raises `AssertionError` when anything is not as it is to be."""
        expected = self.expected(trial.layout)
        run = self.folder / f"run{next(self.runs)}"
        for phase in trial.phases:
            self._interrupt(trial, phase, run)
        self._finish(trial.layout, run, trial.flags)
        different = difference(outcome(run), expected)
        assert different is None, different

    def _interrupt(self, trial: Trial, phase: str, run: Path) -> None:
        """Start the run, signal it in the phase, and look at how it ends."""
        before, log = newest(run), run.with_suffix(f".{phase}.log")
        statuses = self.start_and_hit(trial, phase, self.flags(trial.layout, run), log)
        self._check_stop(trial, phase, statuses, run, log, before)

    def start_and_hit(self, trial: Trial, phase: str, flags: Sequence[str], log: Path) -> list[int]:
        """Exit statuses of a run that is signalled in the phase."""
        ranks = LAYOUTS[trial.layout][0]
        with tempfile.TemporaryDirectory() as meeting:
            arguments = [phase, meeting, *flags, *trial.flags]
            job: ForkedJob | ProgramJob
            if trial.torchrun is None:
                job = ForkedJob(arguments, ranks, log, PAUSED)
            else:
                job = ProgramJob(arguments, ranks, log, max_restarts=0, program=PAUSED, options=trial.torchrun)
            try:
                self._wait(job, Path(meeting), {"0"} if phase == "save" else set(map(str, range(ranks))), log)
                self._send(trial, job)
                (Path(meeting) / "go").touch()
                within = GRACE_S + (LAUNCHER_ENDS_WITHIN_S if trial.torchrun is not None else 0)
                assert job.ended(within), f"not ended within {within:.0f} s: {tail(log)}"
            finally:
                if not job.ended(0):
                    job.kill(None)
        return job.statuses()

    @staticmethod
    def _wait(job: ForkedJob | ProgramJob, meeting: Path, ranks: set[str], log: Path) -> None:
        deadline = time.monotonic() + 120
        while not all((meeting / f"waits{rank}").exists() for rank in ranks):
            assert not job.ended(0.01) and time.monotonic() < deadline, f"does not get to the phase: {tail(log)}"

    @staticmethod
    def _send(trial: Trial, job: ForkedJob | ProgramJob) -> None:
        for press in range(trial.presses):
            if press:
                time.sleep(BETWEEN_SIGNALS_S)
            if trial.target is not None:
                pids = [job.pids()[trial.target]]
            else:
                pids = [job.pid] if isinstance(job, ProgramJob) else job.pids()
            for pid in pids:
                os.kill(pid, trial.number)
        if isinstance(job, ProgramJob) and trial.target is None:
            time.sleep(BETWEEN_SIGNALS_S)  # until torchrun has passed it on

    @staticmethod
    def _check_stop(trial: Trial, phase: str, statuses: list[int], run: Path, log: Path, before: int) -> None:
        ranks = LAYOUTS[trial.layout][0]
        assert not (run / "finished").exists(), "marked as finished"
        # Before the process group is there nobody listens: the signal ends the processes, which have changed nothing.
        status = -trial.number if phase == "imports" else 0
        # torchrun that was signalled itself ends with 1 whatever its processes do.
        by_launcher = trial.torchrun is not None and trial.target is None and ranks > 1
        wanted = [1] if by_launcher else [status] if trial.torchrun is not None else [status] * ranks
        assert statuses == wanted, f"statuses {statuses} instead of {wanted}: {tail(log)}"
        assert KILLED not in log.read_text(), f"a rank outlived the grace of {GRACE_S:.0f} s: {tail(log)}"
        step, saved = stopped_after(trial, phase, before), newest(run)
        step = saved if step is None else step
        assert saved == step, f"step {saved} was saved, not {step}: {tail(log)}"
        if phase != "imports":
            why = f"stopped after step {step}: {trial.number.name}"
            assert why in log.read_text(), f"does not say '{why}': {tail(log)}"


def tail(log: Path) -> str:
    """The last lines that a run printed."""
    return " / ".join(log.read_text().splitlines()[-12:]) if log.exists() else "no output"


def forked_trials() -> list[Trial]:
    """Every signal, to each rank and to all, in every phase, once and twice, over three layouts."""
    phases = ("start-up", "step", "evaluation", "save")
    trials = [
        Trial("data", (phase,), number, target, presses)
        for phase, number, target, presses in itertools.product(phases, SIGNALS, (None, 0, 1), (1, 2))
    ]
    trials += [
        Trial("one", (phase,), number, None, presses)
        for phase, number, presses in itertools.product(phases, SIGNALS, (1, 2))
    ]
    trials += [
        Trial("pipeline", (phase,), number, target, presses)
        for (phase, presses), number, target in zip(
            itertools.product(phases, (1, 2)), itertools.cycle(SIGNALS), itertools.cycle((None, 0, None, 1))
        )
    ]
    trials += [
        Trial("data", ("save",), number, target, presses, ("--async-save",))
        for number, target, presses in itertools.product(SIGNALS, (None, 1), (1, 2))
    ]
    trials += [Trial("one", ("imports",), number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    # Again where a stopped run is continued: in its start-up, and in the evaluation that it begins with.
    trials += [Trial("data", (first, "start-up"), number) for first in ("step", "evaluation") for number in SIGNALS]
    trials += [Trial("data", ("evaluation", "evaluation"), number) for number in SIGNALS]
    return trials


def program_trials() -> list[Trial]:
    """The real programs: torchrun or one of its ranks, and a process without a launcher."""
    term, interrupt, user = SIGNALS
    phases = ("imports", "start-up", "step", "evaluation", "save")
    trials = [Trial("data", (phase,), number, torchrun=()) for phase in phases for number in (term, interrupt)]
    trials += [Trial("data", ("step",), user, torchrun=("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"))]
    trials += [Trial("data", ("step",), term, presses=2, torchrun=())]
    trials += [Trial("data", ("step",), number, target=1, torchrun=()) for number in SIGNALS]
    trials += [Trial("one", ("step",), number, torchrun=()) for number in SIGNALS]
    return trials


def count_trials(what: str, trials: Iterable[T], run_trial: Callable[[T], None]) -> dict[str, Any]:
    """Run the trials; a row of the README's table."""
    start, tried, failures = time.monotonic(), 0, []
    for trial in trials:
        tried += 1
        try:
            run_trial(trial)
        except Exception as error:
            failures.append(f"{trial}: {error}")
            print(f"R3: {failures[-1]}", file=sys.stderr, flush=True)
    seconds = round(time.monotonic() - start, 1)
    row = {"test": "R3", "what": what, "trials": tried, "passed": tried - len(failures), "seconds": seconds}
    return row | ({"failures": failures} if failures else {})


def count() -> list[dict[str, Any]]:
    """Rows of R3."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        signals = Signals(folder, make_byte_dataset(write_prose(folder / "corpus.jsonl")))
        same = "saved at the current step, continued to the same losses and bytes"
        return [
            count_trials(f"a signal to ranks of a run: {same}", forked_trials(), signals.run_trial),
            count_trials(f"a signal to torchrun or under it: {same}", program_trials(), signals.run_trial),
            count_trials("a signal while a dataset is built", building_trials(), Builds(folder).run_trial),
        ]
