"""R2: every system call of a save that changes the disk is a crash point, and each is tried.

A save runs in processes of its own under strace, which kills one of them right before the n-th call of a name, for
every name and n that an undisturbed save makes. What is then on the disk must load as the checkpoint before or the new
one, and the next save must work and leave nothing behind. `power_loss` builds on the same recordings.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import CheckpointSaver, checkpoint_path, latest_checkpoint
from megatron.core.parallel_state import ParallelContext
from tests.distributed import PRELOAD
from tests.reliability.small_checkpoints import (
    CPU,
    by_rows,
    count_trials,
    description,
    example,
    leftovers,
    load_example,
    load_latest,
    save_example,
    scratch,
)
from tests.reliability.system_calls import Tracer, below, kill_points, why_unavailable

DEADLINE_S = 60.0  # a rank that lost its peer must not take longer to notice
NEW_SEED = 9


@dataclass(frozen=True)
class Situation:
    """What a save finds, and what it does.

    Attributes:
        existing: Iterations that are there; the seed of each is its number.
        iteration: Iteration to save.
        keep_last: Checkpoints to keep.
        untidy: Leave what killed saves leave, and a damaged checkpoint that is newer than the sound ones.
    """

    existing: tuple[int, ...]
    iteration: int
    keep_last: int | None = None
    untidy: bool = False

    def prepare(self, root: Path) -> None:
        """Build the directory that the save finds."""
        for iteration in self.existing:
            save_example(root, iteration, seed=iteration)
        if self.untidy:
            newest = checkpoint_path(root, max(self.existing))
            shutil.copytree(newest, root / f"{newest.name}.tmp-0123abcd")
            damaged = shutil.copytree(newest, checkpoint_path(root, max(self.existing) + 1))
            (damaged / "manifest.json").write_bytes(b"{}")

    def check(self, root: Path, saved: bool) -> int | None:
        """What loads from `root` after an interrupted save (its seed); AssertionError when that is not permitted.

        Args:
            root: Directory of all checkpoints.
            saved: A rank said that the save has succeeded, so it must be the new checkpoint that loads.
        """
        path = latest_checkpoint(root)
        if path is None:
            assert not self.existing and not saved, "no checkpoint can be loaded"
            return None
        seed, old = load_example(path), max(self.existing, default=None)
        assert seed == NEW_SEED or (seed == old and not saved), f"{path.name} holds the save of seed {seed}"
        wanted = self.iteration if seed == NEW_SEED else old
        assert path.name.startswith(f"iter_{wanted:07d}"), f"{path.name} holds the save of seed {seed}"
        return seed

    def check_next_save(self, root: Path) -> None:
        """The save after the crash must work and sweep."""
        following = self.iteration + 1
        with closing(CheckpointSaver(root, CPU, keep_last=self.keep_last)) as saver:
            saver.save(following, example(following), description(following))
            assert [outcome.error for outcome in saver.outcomes()] == [None]
        assert load_latest(root) == following
        assert not leftovers(root), f"the next save leaves {leftovers(root)}"


SITUATIONS = {
    "first save": Situation((), 1),
    "later save": Situation((1,), 2),
    "same iteration again": Situation((1, 2), 2),
    "retention, untidy": Situation((1, 2, 3), 5, keep_last=1, untidy=True),
}


@dataclass(frozen=True)
class Variant:
    """How a save is made: the situation's name, number of ranks, synchronous or not."""

    situation: str
    ranks: int
    asynchronous: bool

    def __str__(self) -> str:
        return f"{self.situation}, {self.ranks} rank{'s' * (self.ranks > 1)}, {'a' * self.asynchronous}sync"


VARIANTS = [Variant(*choice) for choice in product(SITUATIONS, (1, 2), (False, True))]


def _save(root: Path, variant: Variant, rank: int, rendezvous: str, pipe: Connection) -> None:
    """One rank's process: get ready, wait for the tracer, save, and tell how it went."""
    torch.set_num_threads(1)
    logging.disable()
    situation, context, tensors = SITUATIONS[variant.situation], CPU, example(NEW_SEED)
    if variant.ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        timeout = timedelta(seconds=DEADLINE_S)
        torch.distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=variant.ranks, timeout=timeout
        )
        context, tensors = ParallelContext(torch.device("cpu"), variant.ranks, rank), by_rows(tensors)
    os.urandom = random.Random(rank).randbytes  # names of temporary directories are those of the recording
    saver = CheckpointSaver(root, context, variant.asynchronous, situation.keep_last)
    pipe.send("ready")
    pipe.recv()
    try:
        saver.save(situation.iteration, tensors, description(NEW_SEED))
        saver.wait()
        (outcome,) = saver.outcomes()
        pipe.send("saved" if outcome.error is None else f"failed: {outcome.error}")
    except Exception as error:
        pipe.send(f"raised: {error!r}")
    os._exit(0)  # a process group that lost a rank cannot be torn down in order


def run_save(
    root: Path, variant: Variant, trace: Callable[[list[int]], Tracer], folder: Path
) -> tuple[list[str], Tracer]:
    """Make one save under a tracer.

    Args:
        root: Directory of all checkpoints.
        variant: How.
        trace: Attaches a tracer to the processes of the ranks, given by rank.
        folder: For the ranks' rendezvous.

    Returns:
        What became of each rank ("saved", "failed: ...", "raised: ..." or "killed"), and the tracer.
    """
    multiprocessing_context = multiprocessing.get_context("forkserver")
    multiprocessing_context.set_forkserver_preload([*PRELOAD, "tests.reliability.crash_points"])
    processes, pipes = [], []
    with tempfile.NamedTemporaryFile(dir=folder) as rendezvous:
        try:
            for rank in range(variant.ranks):
                ours, theirs = multiprocessing_context.Pipe()
                arguments = (root, variant, rank, f"file://{rendezvous.name}.store", theirs)
                process = multiprocessing_context.Process(target=_save, args=arguments, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            for pipe in pipes:
                assert pipe.recv() == "ready"
            tracer = trace([process.pid for process in processes])  # type: ignore[misc]
            for pipe in pipes:
                pipe.send("go")
            outcomes = [_outcome(rank, *ends) for rank, ends in enumerate(zip(pipes, processes, strict=True))]
        finally:
            for process in processes:
                process.kill()
                process.join()
        tracer.wait()
    return outcomes, tracer


def _outcome(rank: int, pipe: Connection, process: Any) -> str:
    assert pipe.poll(DEADLINE_S), f"rank {rank} hangs"
    try:
        outcome: str = pipe.recv()
    except EOFError:
        process.join()
        outcome = "killed" if process.exitcode == -9 else f"ended with {process.exitcode}"
    return outcome


class CrashPoints:
    """The crash points of one variant of a save.

    Args:
        folder: For directories, rendezvous and logs.
        variant: The variant.
        place: Where in `folder` the checkpoints are to be.
    """

    def __init__(self, folder: Path, variant: Variant, place: str = "root") -> None:
        self.folder, self.variant = folder, variant
        self.situation = SITUATIONS[variant.situation]
        self.found = folder / "found"  # what each save finds
        self.root = folder / place  # always the same path, so that a recording fits later runs
        self.situation.prepare(self.found)

    def renew(self) -> None:
        """Put everything back to before the save."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self.found.exists():
            shutil.copytree(self.found, self.root)

    def record(self, victims: list[int] | None = None, paths: tuple[str, ...] = ()) -> Tracer:
        """Make an undisturbed save and record what the ranks `victims` (default: all) do to `paths`."""
        self.renew()
        log = self.folder / "log"
        ranks = range(self.variant.ranks) if victims is None else victims
        outcomes, tracer = run_save(
            self.root, self.variant, lambda pids: Tracer([pids[rank] for rank in ranks], log, paths), self.folder
        )
        assert set(outcomes) == {"saved"}, f"undisturbed saves: {outcomes}"
        assert self.situation.check(self.root, saved=True) == NEW_SEED
        return tracer

    def trials(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """A trial for each crash point of each rank."""
        for rank, (name, number) in self.points():
            yield f"{self.variant}, rank {rank}, {name} {number}", partial(self._try, rank, name, number)

    def points(self) -> list[tuple[int, tuple[str, int]]]:
        """Rank and (name, n) of each call that can change the disk."""
        calls = below(self.root, self.record().calls())
        paths = {path for call in calls for path in call.paths()}
        self.paths = sorted(paths | {str(Path(path).parent) for path in paths} | {str(self.root)})
        recorded = {rank: self.record([rank], tuple(self.paths)).calls() for rank in range(self.variant.ranks)}
        points = [(rank, point) for rank, of_rank in recorded.items() for point in kill_points(of_rank)]
        assert len(points) >= sum(call.changes for call in calls) > 0, f"{len(points)} points, {len(calls)} calls"
        return points

    def disturbed(self, rank: int, inject: str) -> list[str]:
        """What becomes of the ranks of a save of which one is disturbed; see `Tracer`. After `points`."""
        self.renew()
        outcomes, _ = run_save(
            self.root,
            self.variant,
            lambda pids: Tracer([pids[rank]], Path(os.devnull), self.paths, inject),
            self.folder,
        )
        return outcomes

    def _try(self, rank: int, name: str, number: int) -> None:
        outcomes = self.disturbed(rank, f"{name}:signal=SIGKILL:when={number}")
        assert outcomes[rank] == "killed", f"the crash point was not reached: {outcomes}"
        self.situation.check(self.root, saved="saved" in outcomes)
        self.situation.check_next_save(self.root)


def count_kills(variants: list[Variant] = VARIANTS) -> list[dict[str, Any]]:
    """A row for each number of ranks and kind of save, over all situations."""
    if problem := why_unavailable():
        raise RuntimeError(problem)
    rows = []
    for ranks, asynchronous in dict.fromkeys((variant.ranks, variant.asynchronous) for variant in variants):
        started = time.perf_counter()
        with scratch() as folder:
            trials = [
                trial
                for number, variant in enumerate(variants)
                if (variant.ranks, variant.asynchronous) == (ranks, asynchronous)
                for trial in CrashPoints(_made(Path(folder, str(number))), variant).trials()
            ]
            what = f"kill at every system call of {'an asynchronous' if asynchronous else 'a synchronous'} save"
            rows.append(count_trials("R2", f"{what}, {ranks} rank{'s' * (ranks > 1)}", trials, started))
    return rows


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
