"""R7: saves that fail (full disk, file-size limit, read-only or missing directory) leave the old checkpoint and tell.

`count_failing_calls` lets every system call of a save fail, one at a time and from it onwards; `count_conditions` makes
the real thing; `count_runs` does it to whole runs, under both values of `--on-save-error`.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from megatron.core.config import ParallelConfig
from megatron.core.dist_checkpointing import CheckpointSaver, latest_checkpoint, read_manifest
from megatron.core.dist_checkpointing.format import HINT
from megatron.core.parallel_state import ParallelContext
from tests.corpora import make_byte_dataset, write_prose
from tests.distributed import run_distributed
from tests.reliability.crash_points import VARIANTS, CrashPoints, Variant
from tests.reliability.jobs import ForkedJob
from tests.reliability.malicious import FLAGS, RUN_WITHIN_S
from tests.reliability.small_checkpoints import (
    by_rows,
    count_trials,
    description,
    example,
    leftovers,
    load_latest,
    save_example,
    scratch,
)
from tests.reliability.system_calls import why_unavailable

ERRORS = {"fsync": "EIO", "fdatasync": "EIO", "rename": "EROFS", "unlink": "EACCES", "unlinkat": "EACCES"}
USUAL_ERROR = "ENOSPC"
PAGE = 4096
RUN_STEPS = 100
RUN_FLAGS = [*FLAGS[: FLAGS.index("--save-interval")], "--train-iters", str(RUN_STEPS), "--save-interval", "10"]
RUN_FLAGS += ["--keep-last", "1", "--log-interval", "10"]
RUN_FILES = ("metrics.jsonl", "finished", "tokenizer")


def failing_calls(folder: Path, variant: Variant) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trial for each system call of a save that fails, alone and with all later ones of its name."""
    folder.mkdir(parents=True)
    save = CrashPoints(folder, variant)
    for (rank, (name, number)), later in product(save.points(), ("", "+")):
        error = ERRORS.get(name, USUAL_ERROR)
        inject = f"{name}:error={error}:when={number}{later}"
        yield f"{variant}, rank {rank}, {inject}", partial(_try_failing_call, save, rank, inject)


def _try_failing_call(save: CrashPoints, rank: int, inject: str) -> None:
    outcomes = save.disturbed(rank, inject)
    assert len(set(outcomes)) == 1, f"the ranks differ: {outcomes}"
    assert outcomes[0] == "saved" or outcomes[0].startswith("failed: "), outcomes[0]
    assert outcomes[0].isprintable(), f"not a line: {outcomes[0]!r}"
    save.situation.check(save.root, saved=outcomes[0] == "saved")
    save.situation.check_next_save(save.root)


def count_failing_calls(variants: list[Variant] = VARIANTS) -> dict[str, Any]:
    """One row."""
    if problem := why_unavailable():
        raise RuntimeError(problem)
    with scratch() as folder:
        every = (t for n, variant in enumerate(variants) for t in failing_calls(Path(folder, str(n)), variant))
        return count_trials("R7", "every system call of a save fails (no space, I/O error, read-only)", every)


@contextmanager
def small_disk(where: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes at `where`; needs root."""
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(where)], check=True, capture_output=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)
        where.rmdir()


def _remount(where: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(where)], check=True)


class Condition:
    """Something that makes saving under `root` impossible (`begin`), and its end."""

    def __init__(self, disk: Path, root: Path) -> None:
        self.disk, self.root = disk, root

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError


class FullDisk(Condition):
    """Other files leave a few pages."""

    pages = 2

    def begin(self) -> None:
        status = os.statvfs(self.disk)
        with (self.disk / "filler").open("wb") as filler:
            filler.write(bytes(status.f_bavail * status.f_frsize - self.pages * PAGE))

    def end(self) -> None:
        (self.disk / "filler").unlink()


class FullAfterAWhile(FullDisk):
    """Space for some of a shard, but not for all of it."""

    pages = 6


class FileSizeLimit(Condition):
    """`ulimit -f`, in the process that saves."""

    def begin(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE, self.limits[1]))

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


class ReadOnly(Condition):
    """The file system becomes read-only, as after an error of the disk."""

    def begin(self) -> None:
        _remount(self.disk, "ro")

    def end(self) -> None:
        _remount(self.disk, "rw")


class DirectoryGone(Condition):
    """Somebody moves the directory away and puts a file there; later it is put back."""

    def begin(self) -> None:
        self.root.rename(self.disk / "away")
        self.root.write_bytes(b"")

    def end(self) -> None:
        self.root.unlink()
        (self.disk / "away").rename(self.root)


CONDITIONS = [FullDisk, FullAfterAWhile, FileSizeLimit, ReadOnly, DirectoryGone]


def _save_under(
    rank: int, disk: Path, root: Path, condition: type[Condition], asynchronous: bool
) -> tuple[list[str | None], list[int | None]]:
    """Save before, under and after the condition; returns the errors, and what loads after each save."""
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    divide = by_rows if context.world_size > 1 else lambda tensors: tensors
    trouble = condition(disk, root)
    errors: list[str | None] = []
    loaded: list[int | None] = []
    mine = context.is_main or condition is FileSizeLimit  # a limit is a process's own
    with closing(CheckpointSaver(root, context, asynchronous)) as saver:
        for iteration in (1, 2, 3):
            if context.world_size > 1:
                torch.distributed.barrier()  # nobody loads any more
            if iteration == 2 and mine:
                trouble.begin()
            if context.world_size > 1:
                torch.distributed.barrier()
            saver.save(iteration, divide(example(iteration)), description(iteration))
            saver.wait()
            errors += [None if outcome.error is None else str(outcome.error) for outcome in saver.outcomes()]
            if context.world_size > 1:
                torch.distributed.barrier()
            if iteration == 2 and mine:
                trouble.end()
            if context.world_size > 1:
                torch.distributed.barrier()
            loaded.append(load_latest(root))
    return errors, loaded


def _try_condition(folder: Path, ranks: int, condition: type[Condition], asynchronous: bool) -> None:
    with small_disk(folder, size=2**20) as disk:
        root = disk / "root"
        answers = run_distributed(_save_under, ranks, disk, root, condition, asynchronous, timeout=20.0)
        for answer in answers:
            assert answer == answers[0], f"the ranks differ: {answers}"
            (first, failure, last), loaded = answer
            assert first is None and last is None, answer
            assert loaded == [1, 1, 3], f"loaded after each save: {loaded}"
            assert failure is not None and "iter_0000002" in failure and failure.isprintable(), f"message {failure!r}"
        assert not leftovers(root), leftovers(root)


def _try_hint(folder: Path, asynchronous: bool) -> None:
    """A hint that cannot be written does not keep a checkpoint from being there."""
    save_example(folder, 1, 1)
    (folder / HINT).unlink()
    (folder / HINT).mkdir()
    with closing(CheckpointSaver(folder, ParallelContext(torch.device("cpu")), asynchronous)) as saver:
        saver.save(2, example(2), description(2))
        saver.wait()
        (outcome,) = saver.outcomes()
    assert outcome.error is None or str(outcome.error).isprintable()
    assert load_latest(folder) == 2
    assert not leftovers(folder)


def conditions(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trial for each condition, number of ranks and kind of save."""
    for condition, ranks, asynchronous in product(CONDITIONS, (1, 2), (False, True)):
        name = f"{condition.__name__}, {ranks} ranks, {'a' * asynchronous}sync"
        yield name, partial(_try_condition, folder / name, ranks, condition, asynchronous)
    for asynchronous in (False, True):
        name = f"hint that is a directory, {'a' * asynchronous}sync"
        yield name, partial(_try_hint, folder / name, asynchronous)


def count_conditions() -> dict[str, Any]:
    """One row."""
    with scratch() as folder:
        what = "full disk, file-size limit, read-only, directory gone, hint unwritable: real"
        return count_trials("R7", what, conditions(Path(folder)))


def _wait_for(condition: Callable[[], bool], job: ForkedJob) -> None:
    """Wait for something that a running job does."""
    deadline = time.monotonic() + RUN_WITHIN_S
    while not condition():
        assert not job.ended(0.01), f"the run ended with statuses {job.statuses()}"
        assert time.monotonic() < deadline, "the run does not come to it"


def _saved_step(save: Path) -> int | None:
    """Iteration of the newest sound checkpoint of a run."""
    path = latest_checkpoint(save)
    return None if path is None else int(read_manifest(path)["progress"]["iteration"])


def _try_run(folder: Path, policy: str, asynchronous: bool, ranks: int, metrics_too: bool) -> None:
    """A run whose disk is full from its first checkpoint on, until the run has told of a failed save."""
    folder.mkdir()
    data, log = make_byte_dataset(write_prose(folder / "corpus.jsonl")), folder / "log"
    with small_disk(folder / "disk", size=2**21) as disk:
        save, trouble = disk / "save", FullDisk(disk, disk / "save")
        command = [*RUN_FLAGS, "--data-path", str(data), "--save", str(save), "--on-save-error", policy]
        command += ["--async-save"] if asynchronous else []
        command += [] if metrics_too else ["--metrics-file", str(folder / "metrics")]
        job = ForkedJob(command, ranks, log)
        try:
            _wait_for(lambda: any(save.glob("iter_???????")), job)
            trouble.begin()
            if policy == "continue":
                _wait_for(lambda: "training goes on without this checkpoint" in log.read_text(), job)
                assert _saved_step(save) is not None, "the checkpoint before is gone"
                trouble.end()
            assert job.ended(RUN_WITHIN_S), "the run does not end"
        finally:
            job.kill(None)
        output = log.read_text()
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in output, output[-1500:]
        if policy == "continue":
            assert (set(job.statuses()), errors) == ({0}, []), f"statuses {job.statuses()}: {output[-500:]}"
            assert (_saved_step(save), leftovers(save, RUN_FILES)) == (RUN_STEPS, []), f"left: {leftovers(save)}"
        else:
            assert 5 in job.statuses(), f"statuses {job.statuses()}: {output[-500:]}"
            assert len(errors) == 1 and "No space left" in errors[0], errors
            assert _saved_step(save) is not None, "the checkpoint before is gone"


def runs(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trial for each policy, kind of save, number of ranks and place of the metrics."""
    choices = product(("stop", "continue"), (False, True), (1, 2), (False, True))
    for number, (policy, asynchronous, ranks, metrics_too) in enumerate(choices):
        name = f"--on-save-error {policy}, {'a' * asynchronous}sync, {ranks} ranks, metrics there: {metrics_too}"
        yield name, partial(_try_run, folder / str(number), policy, asynchronous, ranks, metrics_too)


def count_runs() -> dict[str, Any]:
    """One row."""
    with scratch() as folder:
        return count_trials("R7", "runs on a disk that becomes full: exit status 5, or they go on", runs(Path(folder)))


def count() -> list[dict[str, Any]]:
    """Failing system calls, real conditions, whole runs."""
    return [count_failing_calls(), count_conditions(), count_runs()]
