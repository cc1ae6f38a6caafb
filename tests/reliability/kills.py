"""R1: runs that are killed with SIGKILL and started again end as the uninterrupted run, bit for bit.

A trial is a run with dropout, of one or two processes, that is killed once, then started again by the same command
until it is done. Compared with the uninterrupted run are every file of the last checkpoint with its progress, and the
losses and gradient norms of all steps. Half of the kills come at an instant that is uniform over the life of a run,
from its start to its end; the other half come within the duration of a save after its temporary directory appeared.

Trial `n` of a seed is the same whatever else is tried: layout, synchronous or asynchronous saves, victim and instant.
"""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.corpora import make_byte_dataset, write_prose
from tests.reliability.jobs import ForkedJob, Job, ProgramJob

STEPS, SAVE_INTERVAL = 25, 5
FLAGS = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 "
    "--encoder-seq-length 32 --hidden-dropout 0.1 --attention-dropout 0.1 --lr 1e-2 --split 90,10,0 --log-interval 1 "
    f"--global-batch-size 8 --eval-interval 7 --eval-iters 1 --train-iters {STEPS} "
    f"--save-interval {SAVE_INTERVAL} --keep-last 2"
)
LAYOUTS = {
    "one process": (1, shlex.split("--micro-batch-size 8")),
    "DP2": (2, shlex.split("--micro-batch-size 4 --data-parallel-sharding-strategy optim_grads")),
    "TP2": (2, shlex.split("--micro-batch-size 8 --tensor-model-parallel-size 2 --sequence-parallel")),
    "PP2": (2, shlex.split("--micro-batch-size 4 --pipeline-model-parallel-size 2")),
}
ASYNCHRONOUS = ["--async-save"]
RUN_WITHIN_S = 180.0  # a run that takes longer hangs
KILLS_AT_MOST = 10  # tries to be earlier than the end of a run


@dataclass(frozen=True)
class Trial:
    """What is done in trial `number`.

    Attributes:
        number: Decides everything else, with the seed.
        layout: Key of `LAYOUTS`.
        asynchronous: Saves asynchronously.
        aimed: The kill is aimed into a save.
        real: Real programs and, for several ranks, torchrun, which starts them again by itself.
        rank: The rank that is killed; None: the whole job.
    """

    number: int
    layout: str
    asynchronous: bool
    aimed: bool
    real: bool
    rank: int | None

    @classmethod
    def of(cls, number: int, seed: int) -> Trial:
        """One in ten is real; the others go through layouts, kinds of saves and aims in turn."""
        tens, ones = divmod(number, 10)
        real, aimed, asynchronous = ones == tens % 10, number % 2 == 1, number // 2 % 2 == 1
        layout = list(LAYOUTS)[tens // 2 % 2 if real else number // 4 % len(LAYOUTS)]
        ranks = LAYOUTS[layout][0]
        random_number = random.Random(f"victim {seed} {number}")
        single = ranks > 1 and (real or random_number.random() < 0.5)
        return cls(number, layout, asynchronous, aimed, real, random_number.randrange(ranks) if single else None)

    @property
    def kind(self) -> tuple[str, bool]:
        """Trials of a kind have the same uninterrupted run."""
        return self.layout, self.real


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run of a layout.

    Attributes:
        outcome: See `outcome`.
        started_after: Seconds until all ranks were started.
        seconds: Its duration.
        save_seconds: Usual time between the appearance of a temporary directory and its renaming.
    """

    outcome: dict[str, Any]
    started_after: float
    seconds: float
    save_seconds: float


@dataclass(frozen=True)
class Result:
    """How a trial went.

    Attributes:
        landed: What the run was at when it was killed; see `_landed`.
        statuses: Of the ranks of the job that was killed, -n for signal n; empty for the whole job.
        failure: What went wrong, or None.
        seconds: Duration of the trial.
    """

    landed: str
    statuses: list[int]
    failure: str | None
    seconds: float


def outcome(save: Path) -> dict[str, Any]:
    """What two runs are compared by: files, progress and losses."""
    checkpoint = max(save.glob("iter_" + "[0-9]" * 7))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    keys = "lm_loss", "grad_norm", "learning_rate", "validation_lm_loss"
    values = [(row["iteration"], key, row[key]) for row in rows for key in keys if key in row]
    return {
        "checkpoint": checkpoint.name,
        "files": files,
        "progress": json.loads((checkpoint / "manifest.json").read_text())["progress"],
        "values": sorted(values),
        "finished": (save / "finished").exists(),
    }


def _start(trial: Trial, data: Path, save: Path) -> Job:
    ranks, flags = LAYOUTS[trial.layout]
    flags = [*FLAGS, *flags, *(ASYNCHRONOUS if trial.asynchronous else [])]
    flags += ["--data-path", str(data), "--save", str(save)]
    kind = ProgramJob if trial.real else ForkedJob
    return kind(flags, ranks, save.with_suffix(".log"))


def _wait_for_end(job: Job) -> str | None:
    """What is wrong with the end of a run that nobody disturbs, or None."""
    if not job.ended(RUN_WITHIN_S):
        job.kill(None)
        return f"did not end within {RUN_WITHIN_S:.0f} s"
    statuses = job.statuses()
    return None if statuses and not any(statuses) else f"ended with statuses {statuses}"


def _temporaries(save: Path) -> list[str]:
    """Names of the saves under way, or of their remains."""
    try:
        return [path.name for path in save.iterdir() if ".tmp-" in path.name and path.is_dir()]
    except FileNotFoundError:  # the run has not made its directory yet, or just renamed one
        return []


def run_reference(trial: Trial, data: Path, save: Path) -> Reference:
    """The uninterrupted run of the kind of `trial`."""
    start = time.monotonic()
    job = _start(trial, data, save)
    started_after, save_seconds, since = None, [], None
    while not job.ended(0.001):
        now = time.monotonic()
        if started_after is None and len(job.pids()) == LAYOUTS[trial.layout][0]:
            started_after = now - start
        if since is None and _temporaries(save):
            since = now
        elif since is not None and not _temporaries(save):
            save_seconds.append(now - since)
            since = None
    seconds = time.monotonic() - start
    failure = _wait_for_end(job)
    assert failure is None, f"the uninterrupted run of {trial} {failure}: {save.with_suffix('.log')}"
    assert started_after is not None and save_seconds, f"the uninterrupted run of {trial} was not seen saving"
    return Reference(outcome(save), started_after, seconds, sorted(save_seconds)[len(save_seconds) // 2])


def _wait_for_instant(job: Job, trial: Trial, reference: Reference, save: Path, chance: random.Random) -> bool:
    """Wait for the instant of the kill; False when the job was over before."""
    if trial.rank is not None:  # there is nobody to kill before
        while len(job.pids()) <= trial.rank:
            if job.ended(0.001):
                return False
    if not trial.aimed:
        life = reference.seconds - (0.0 if trial.rank is None else reference.started_after)
        return not job.ended(chance.uniform(0.0, life))
    iteration = SAVE_INTERVAL * chance.randint(1, STEPS // SAVE_INTERVAL)
    while not any(name.startswith(f"iter_{iteration:07d}") for name in _temporaries(save)):
        if job.ended(0.001):
            return False
    return not job.ended(chance.uniform(0.0, reference.save_seconds))


def _landed(save: Path) -> str:
    """What a run was at when it was killed, by what it left."""
    if _temporaries(save):
        return "save"
    if (save / f"iter_{STEPS:07d}").exists():
        return "after the last save"
    metrics = save / "metrics.jsonl"
    return "step" if metrics.exists() and metrics.stat().st_size else "start-up"


def _kill(trial: Trial, reference: Reference, data: Path, save: Path, chance: random.Random) -> tuple[Job, str]:
    """Start a run and kill it; a run that was over before is started anew with another instant."""
    for _ in range(KILLS_AT_MOST):
        shutil.rmtree(save, ignore_errors=True)
        job = _start(trial, data, save)
        if _wait_for_instant(job, trial, reference, save, chance) and job.kill(trial.rank):
            if trial.real and trial.rank is not None:
                return job, _landed(save)  # torchrun is about to start the ranks again
            if not job.ended(RUN_WITHIN_S):
                job.kill(None)
                raise TimeoutError(f"the other ranks were still there after {RUN_WITHIN_S:.0f} s")
            if not job.statuses() or -9 in job.statuses():
                return job, _landed(save)
        failure = _wait_for_end(job)
        assert failure is None, f"before it was killed, the run {failure}"
    raise TimeoutError(f"{KILLS_AT_MOST} times the run was over before it was killed")


def run_trial(trial: Trial, reference: Reference, data: Path, folder: Path, seed: int) -> Result:
    """Kill a run, start it again, compare. What a failed trial leaves in `folder` stays there."""
    save = folder / f"trial_{trial.number:04d}"
    start, landed, statuses = time.monotonic(), "nothing", []
    try:
        job, landed = _kill(trial, reference, data, save, random.Random(f"instant {seed} {trial.number}"))
        again = job
        if not (trial.real and trial.rank is not None):
            statuses = [] if trial.rank is None else job.statuses()
            again = _start(trial, data, save)
        failure = _wait_for_end(again)
        if failure is not None:
            failure = f"the run that continues {failure}"
        else:
            failure = difference(outcome(save), reference.outcome)
    except (AssertionError, OSError, ValueError, KeyError) as error:
        failure = f"{type(error).__name__}: {error}"
    if failure is None:
        shutil.rmtree(save)
        save.with_suffix(".log").unlink()
    else:
        failure = f"{trial}, killed at: {landed}, {failure}; see {save} and {save.with_suffix('.log')}"
    return Result(landed, statuses, failure, time.monotonic() - start)


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """What differs between two outcomes, or None."""
    differing = [key for key, value in expected.items() if found[key] != value]
    return f"{' and '.join(differing)} differ from the uninterrupted run's" if differing else None


def run_trials(trials: Sequence[Trial], folder: Path, seed: int) -> Iterator[tuple[Trial, Result]]:
    """Results of `trials`, in the order in which they end; two at a time while they have one process each."""
    data = make_byte_dataset(write_prose(folder / "corpus.jsonl"))
    assert ForkedJob(["--help"], 1, folder / "help.log").ended(RUN_WITHIN_S)  # the server has its imports from now on
    references: dict[tuple[str, bool], Reference] = {}
    for trial in trials:
        if trial.kind not in references:
            plain = Trial(trial.number, trial.layout, False, False, trial.real, None)
            references[trial.kind] = run_reference(plain, data, folder / f"reference_{len(references)}")
    for (layout, real), reference in references.items():
        assert reference.outcome == references.get((layout, not real), reference).outcome, f"{layout}: forks differ"

    def run(trial: Trial) -> tuple[Trial, Result]:
        return trial, run_trial(trial, references[trial.kind], data, folder, seed)

    for at_once in (2, 1):
        chosen = [trial for trial in trials if (LAYOUTS[trial.layout][0] == 1) == (at_once == 2)]
        with ThreadPoolExecutor(at_once) as threads:
            yield from threads.map(run, chosen)


def count(trials: int = 200, seed: int = 7, record: str | None = None) -> list[dict[str, Any]]:
    """Rows of the table.

    Args:
        trials: Number of kills.
        seed: Decides the victims and instants.
        record: File with a line for each trial; those it has already are not tried again.
    """
    done = _read_record(record, seed)
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    chosen = [Trial.of(number, seed) for number in range(trials) if number not in done]
    for trial, result in run_trials(chosen, folder, seed):
        done[trial.number] = entry = {"seed": seed, **asdict(trial), **asdict(result)}
        if record is not None:
            with Path(record).open("a") as file:
                file.write(json.dumps(entry) + "\n")
        print(f"{len(done)}/{trials} {json.dumps(entry)}", file=sys.stderr, flush=True)
    entries = [done[number] for number in range(trials)]
    if not any(entry["failure"] for entry in entries):
        shutil.rmtree(folder)
    print(f"took {time.monotonic() - start:.0f} s", file=sys.stderr)
    return [
        _row("killed at a random instant, then continued", [e for e in entries if not e["aimed"]], seed),
        _row("killed in a save, then continued", [e for e in entries if e["aimed"]], seed),
    ]


def _read_record(record: str | None, seed: int) -> dict[int, dict[str, Any]]:
    if record is None or not Path(record).exists():
        return {}
    entries = [json.loads(line) for line in Path(record).read_text().splitlines()]
    return {entry["number"]: entry for entry in entries if entry["seed"] == seed}


def _statuses_of_others(entries: list[dict[str, Any]]) -> Iterator[int]:
    for entry in entries:
        yield from (status for rank, status in enumerate(entry["statuses"]) if rank != entry["rank"])


def _row(what: str, entries: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """A row of the table, with how many kills were of which kind."""
    failures = [entry["failure"] for entry in entries if entry["failure"]]
    return {
        "test": "R1",
        "what": what,
        "trials": len(entries),
        "passed": len(entries) - len(failures),
        "seconds": round(sum(entry["seconds"] for entry in entries), 1),
        "seed": seed,
        "landed": dict(Counter(entry["landed"] for entry in entries)),
        "layouts": dict(Counter(entry["layout"] for entry in entries)),
        "single_rank": sum(entry["rank"] is not None for entry in entries),
        "asynchronous": sum(entry["asynchronous"] for entry in entries),
        "real_programs": sum(entry["real"] for entry in entries),
        # How the other ranks ended when one was killed: 3 is by themselves, -9 after SIGTERM and half a minute.
        "other_ranks_ended_with": dict(Counter(_statuses_of_others(entries))),
        "failures": failures,
    }
