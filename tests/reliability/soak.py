"""R17: long runs with evaluations and asynchronous saves need no more memory, descriptors or threads as they go on.

The processes of a run are looked at from outside while it trains. A straight line is fitted to each quantity over the
second half of the run, when everything has been used many times; what it rises by over that half must stay below a
bound.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tests.corpora import make_byte_dataset, write_prose
from tests.reliability.jobs import ForkedJob, Job, ProgramJob

FLAGS = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 "
    "--encoder-seq-length 32 --hidden-dropout 0.1 --attention-dropout 0.1 --lr 1e-2 --split 90,10,0 --log-interval 1 "
    "--micro-batch-size 4 --eval-iters 1 --async-save --keep-last 2"
)
SAMPLE_EVERY_S = 0.05
BOUNDS = {"rss_mib": 2.0, "descriptors": 2.0, "threads": 2.0, "entries": 2.0}
"""How much the fitted lines may rise over the second half of a run."""


@dataclass(frozen=True)
class Sample:
    """What a process uses at an instant.

    Attributes:
        seconds: Time since the start.
        rss_mib: Resident memory in MiB.
        descriptors: Open file descriptors.
        threads: Threads, those of libraries included.
        entries: Files and directories directly in the save directory.
    """

    seconds: float
    rss_mib: float
    descriptors: int
    threads: int
    entries: int


def growth(samples: Sequence[Sample], quantity: str) -> float:
    """Rise, over the second half of `samples`, of the line fitted to a quantity by least squares."""
    half = samples[len(samples) // 2 :]
    times = [sample.seconds for sample in half]
    values = [getattr(sample, quantity) for sample in half]
    mean_time, mean_value = sum(times) / len(times), sum(values) / len(values)
    covariance = sum((t - mean_time) * (v - mean_value) for t, v in zip(times, values, strict=True))
    return covariance / sum((t - mean_time) ** 2 for t in times) * (times[-1] - times[0])


def look_at(pid: int, save: Path, seconds: float) -> Sample | None:
    """A sample of process `pid`, or None when it is gone."""
    process = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        descriptors = sum(1 for _ in (process / "fd").iterdir())
        entries = sum(1 for _ in save.iterdir())
    except OSError:
        return None
    if "VmRSS" not in status:  # it has ended, and nobody has asked for its status yet
        return None
    return Sample(seconds, int(status["VmRSS"].split()[0]) / 1024, descriptors, int(status["Threads"]), entries)


def watch(job: Job, ranks: int, save: Path) -> list[list[Sample]]:
    """Samples of each rank, from the first line of metrics to the end."""
    samples: list[list[Sample]] = [[] for _ in range(ranks)]
    start = time.monotonic()
    pids: list[int] = []
    while not job.ended(SAMPLE_EVERY_S):
        if not (save / "metrics.jsonl").exists():
            continue
        pids = pids or job.pids()
        for rank, pid in enumerate(pids):
            sample = look_at(pid, save, time.monotonic() - start)
            if sample is not None:
                samples[rank].append(sample)
    return samples


def soak(ranks: int, steps: int, folder: Path, real: bool = True) -> dict[str, Any]:
    """A row of the table: a run of so many steps that evaluates and saves about a hundred times.

    Args:
        ranks: Data-parallel processes.
        steps: Steps to train.
        folder: Where it writes.
        real: Run the program itself, else a fork that has its imports already.
    """
    start = time.monotonic()
    data = make_byte_dataset(write_prose(folder / "corpus.jsonl"))
    save = folder / "save"
    interval = max(1, steps // 100)
    flags = [*FLAGS, "--data-path", str(data), "--save", str(save), "--train-iters", str(steps)]
    flags += ["--save-interval", str(interval), "--eval-interval", str(interval)]
    log = folder / "log"
    job = ProgramJob(flags, ranks, log, max_restarts=0) if real else ForkedJob(flags, ranks, log)
    samples = watch(job, ranks, save)
    failures = []
    if any(job.statuses()) or not (save / "finished").exists():
        failures.append(f"ended with statuses {job.statuses()}: {log.read_text()[-2000:]}")
    grown = {
        field.name: [round(growth(of_rank, field.name), 2) for of_rank in samples if len(of_rank) > 3]
        for field in fields(Sample)
        if field.name in BOUNDS
    }
    for quantity, of_ranks in grown.items():
        if len(of_ranks) < ranks or max(of_ranks) > BOUNDS[quantity]:
            failures.append(f"{quantity} rose by {of_ranks} (ranks) in the second half, allowed {BOUNDS[quantity]}")
    processes = "one process" if ranks == 1 else f"{ranks} processes"
    saves = -(-steps // interval)
    return {
        "test": "R17",
        "what": f"{steps:,} steps of {processes} with {saves} asynchronous saves: memory, descriptors, threads flat",
        "trials": 1,
        "passed": int(not failures),
        "seconds": round(time.monotonic() - start, 1),
        "samples": len(samples[0]),
        "growth_in_second_half": grown,
        "rss_mib_start": [round(of_rank[len(of_rank) // 2].rss_mib, 1) for of_rank in samples if of_rank],
        "rss_mib_end": [round(of_rank[-1].rss_mib, 1) for of_rank in samples if of_rank],
        "most_descriptors": [max(sample.descriptors for sample in of_rank) for of_rank in samples if of_rank],
        "most_threads": [max(sample.threads for sample in of_rank) for of_rank in samples if of_rank],
        "most_entries": max(sample.entries for sample in samples[0]) if samples[0] else None,
        "failures": failures,
    }


def count() -> list[dict[str, Any]]:
    """Rows of the table."""
    rows = []
    for ranks, steps in ((1, 10_000), (2, 3_000)):
        folder = Path(tempfile.mkdtemp(prefix="soak-"))
        rows.append(soak(ranks, steps, folder))
        if not rows[-1]["failures"]:
            shutil.rmtree(folder)
    return rows
