"""Saving during training: at once, or from a thread while training goes on."""

from __future__ import annotations

import atexit
import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.dist_checkpointing.format import CheckpointError, checkpoint_path
from megatron.core.dist_checkpointing.serialization import CheckpointTensors, save_checkpoint
from megatron.core.dist_checkpointing.staging import HostCopies
from megatron.core.dist_checkpointing.verification import raise_on_all
from megatron.core.parallel_state import ParallelContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended.

    Attributes:
        iteration: What was saved.
        path: The directory of the checkpoint.
        seconds: From the call of `save` until the checkpoint was published or the save had failed.
        pause_seconds: How long `save` and `wait_for_copies` kept their caller waiting, also for the save before.
        error: Why there is no such checkpoint, or None; the same on all ranks.
    """

    iteration: int
    path: Path
    seconds: float
    pause_seconds: float
    error: CheckpointError | None = None


class CheckpointSaver:
    """Saves the checkpoints of a run, one at a time; all ranks make it together.

    A save that fails does not raise: it is an outcome with an error, here as there, so that a caller treats both modes
    alike. What is no failure to save (in the caller's thread: an interrupt, a broken process group, a bug) is raised.

    Args:
        root: Directory of the checkpoints.
        context: The layout.
        asynchronous: Copy to host memory (see `HostCopies` for what that takes) and write from a thread; else write
            straight from the tensors before `save` returns.
        keep_last: After a save, remove all but so many of the newest checkpoints; None keeps all.
        keep_every: Do not remove those of iterations that this divides.
    """

    def __init__(
        self,
        root: Path,
        context: ParallelContext,
        asynchronous: bool = False,
        keep_last: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        self.root, self.context = root, context
        self.retention = {"keep_last": keep_last, "keep_every": keep_every}
        # A group of its own: collectives of two threads in one group would meet each other.
        self.group = dist.new_group(backend="gloo", timeout=context.timeout) if context.world_size > 1 else None
        self.copies = HostCopies(context, self.group) if asynchronous else None
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()  # of the last save
        self._copied.set()
        self._pause_seconds = 0.0  # of the last save
        self._outcomes: deque[SaveOutcome] = deque()
        atexit.register(self._before_exit)

    def prepare(self, tensors: CheckpointTensors) -> None:
        """Take the host memory that saving `tensors` needs, in the background; all ranks call it together.

        Optional: the first `save` does it otherwise, which takes longer then. Without effect unless asynchronous.
        """
        self.wait()
        if self.copies is not None:
            self.copies.prepare(tensors)

    def save(
        self, iteration: int, tensors: CheckpointTensors, manifest: dict[str, Any], wait_for_copies: bool = True
    ) -> None:
        """Save as `save_checkpoint` does; all ranks call it together.

        Asynchronous, it first waits for the save before, then for the copies of `tensors` unless told otherwise: then
        the caller does so by `wait_for_copies` before `tensors` change, and may use them meanwhile.
        """
        began = time.perf_counter()
        self.wait()
        self._pause_seconds = 0.0
        if self.copies is None:
            try:
                error = None
                self._write(iteration, tensors, manifest)
            except CheckpointError as raised:
                error = raised
            self._pause_seconds = time.perf_counter() - began
            self._record(iteration, began, error)
            return
        self._copied = threading.Event()
        arguments = (iteration, self.copies.order(tensors), copy.deepcopy(manifest), began, self._copied)
        # A daemon, with a wait at exit: a process that gives up on the others can leave without it (see `close`).
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint-writer", daemon=True)
        self._thread.start()
        self._pause_seconds = time.perf_counter() - began
        if wait_for_copies:
            self.wait_for_copies()

    def wait_for_copies(self) -> None:
        """Wait until the tensors of the last save may change."""
        began = time.perf_counter()
        self._copied.wait()
        self._pause_seconds += time.perf_counter() - began

    def finished(self) -> bool:
        """Whether no save is running on this rank; does not wait and does not communicate."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until no save is running on this rank."""
        if self._thread is not None:
            self._thread.join()

    def outcomes(self) -> list[SaveOutcome]:
        """How the saves ended on this rank that have done so since the last call; does not communicate."""
        found = []
        while self._outcomes:
            found.append(self._outcomes.popleft())
        return found

    def close(self, wait: bool = True) -> None:
        """Wait for the running save and give the host memory back; the end of the program does so otherwise.

        Without `wait`, a running save is left to itself, which is for a process that is about to leave by `os._exit`
        because others are gone: what it has not published by then is swept by the next run's first save.
        """
        atexit.unregister(self._before_exit)
        if wait:
            self._before_exit()

    def _before_exit(self) -> None:
        self.wait()
        if self.copies is not None:
            self.copies.close()

    def _write(self, iteration: int, tensors: CheckpointTensors, manifest: dict[str, Any]) -> None:
        save_checkpoint(self.root, iteration, tensors, manifest, self.context, group=self.group, **self.retention)

    def _run(
        self,
        iteration: int,
        make_copies: Callable[[], CheckpointTensors],
        manifest: dict[str, Any],
        began: float,
        copied: threading.Event,
    ) -> None:
        """The thread of one save; whatever happens in it ends in an outcome."""
        path, error = checkpoint_path(self.root, iteration), None
        copies: CheckpointTensors = {}
        try:
            try:
                copies = make_copies()
            except Exception as raised:
                logger.exception("tensors could not be copied")
                cause = f"rank {self.context.rank} cannot copy its tensors: {_first_line(raised)}"
                error = CheckpointError(f"cannot save {path}: {cause}")
            finally:
                copied.set()
            raise_on_all(error, self.context.world_size, self.group)
            self._write(iteration, copies, manifest)
        except CheckpointError as raised:
            error = raised
        except BaseException as raised:
            logger.exception("the thread that writes a checkpoint failed")
            error = CheckpointError(f"cannot save {path}: {_first_line(raised)}")
        self._record(iteration, began, error)

    def _record(self, iteration: int, began: float, error: CheckpointError | None) -> None:
        path, seconds = checkpoint_path(self.root, iteration), time.perf_counter() - began
        self._outcomes.append(SaveOutcome(iteration, path, seconds, self._pause_seconds, error))


def _first_line(error: BaseException) -> str:
    """What a message says of an error whose traceback is in the log."""
    return f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
