"""Saving during training: at once, or from a thread while training goes on."""

from __future__ import annotations

import atexit
import copy
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.dist_checkpointing.format import CheckpointError, checkpoint_path
from megatron.core.dist_checkpointing.serialization import CheckpointTensors, save_checkpoint
from megatron.core.dist_checkpointing.staging import HostCopies
from megatron.core.parallel_state import ParallelContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended.

    Attributes:
        iteration: What was saved.
        path: The directory of the checkpoint.
        seconds: From the call of `save` until the checkpoint was published or the save had failed.
        pause_seconds: How long `save` kept its caller waiting, a wait for the save before included.
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
        self._outcomes: deque[SaveOutcome] = deque()
        atexit.register(self._before_exit)

    def prepare(self, tensors: CheckpointTensors) -> None:
        """Take the host memory that saving `tensors` needs, in the background; all ranks call it together.

        Optional: the first `save` does it otherwise, and pauses for it. Without effect unless asynchronous.
        """
        self.wait()
        if self.copies is not None:
            self.copies.prepare(tensors)

    def save(self, iteration: int, tensors: CheckpointTensors, manifest: dict[str, Any]) -> None:
        """Save as `save_checkpoint` does; all ranks call it together.

        Asynchronous, it first waits for the save before, and returns when `tensors` may change.
        """
        began = time.perf_counter()
        self.wait()
        if self.copies is None:
            try:
                error = None
                self._write(iteration, tensors, manifest)
            except CheckpointError as raised:
                error = raised
            self._record(iteration, began, time.perf_counter(), error)
        else:
            staged = self.copies.copy(tensors)
            arguments = (iteration, staged, copy.deepcopy(manifest), began, time.perf_counter())
            # A daemon, with a wait at exit: a process that gives up on the others can leave without it (see `close`).
            self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint-writer", daemon=True)
            self._thread.start()

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
        self, iteration: int, staged: CheckpointTensors, manifest: dict[str, Any], began: float, copied: float
    ) -> None:
        """The thread of one save; whatever happens in it ends in an outcome."""
        error = None
        try:
            self._write(iteration, staged, manifest)
        except CheckpointError as raised:
            error = raised
        except BaseException as raised:
            logger.exception("the thread that writes a checkpoint failed")
            cause = f"{type(raised).__name__} {str(raised).partition(chr(10))[0]}"  # the log has the traceback
            error = CheckpointError(f"cannot save {checkpoint_path(self.root, iteration)}: {cause}")
        self._record(iteration, began, copied, error)

    def _record(self, iteration: int, began: float, resumed: float, error: CheckpointError | None) -> None:
        path = checkpoint_path(self.root, iteration)
        self._outcomes.append(SaveOutcome(iteration, path, time.perf_counter() - began, resumed - began, error))
