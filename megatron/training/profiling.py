"""A window of steps under torch.profiler: a Chrome trace of each rank, and where the time went."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron.core.errors import UserError
from megatron.core.file_utils import make_directory, publish_bytes
from megatron.core.parallel_state import ParallelContext
from megatron.training.config import LoggingConfig
from megatron.training.console import say, warn
from megatron.training.profile_summary import ProfileSummary, describe, summarize

T = TypeVar("T")

_NOTHING = nullcontext()
_COMPRESSION_LEVEL = 4  # of gzip: traces are long and repeat themselves


class StepProfiler:
    """Records the steps that `--profile` asks for. Costs nothing in the others.

    A profiler that fails costs the run its profile and no more: it is said, and training goes on.

    Args:
        config: The window and the directory.
        save: Directory of the run, if it has one.
        context: All its ranks make one.

    Attributes:
        is_open: Whether the window has begun and not ended; the same on all ranks, those that record nothing too.
    """

    def __init__(self, config: LoggingConfig, save: str | None, context: ParallelContext) -> None:
        self.context = context
        self.is_open = False
        self._steps = config.profile_steps
        self._directory = Path(config.profile_dir or Path(save or ".", "profile"))
        ranks = range(context.world_size) if config.profile_ranks is None else [int(r) for r in config.profile_ranks]
        if max(ranks) >= context.world_size:
            raise UserError(
                f"--profile-ranks {max(ranks)} is beyond the last of {context.world_size} ranks, which count from 0"
            )
        self._records = context.rank in ranks
        self._profiler: profile | None = None
        self._first = 0

    @property
    def first_step(self) -> int:
        """The first one that `--profile` asks for."""
        return self._steps.start

    def never_begins(self, last_step: int) -> bool:
        """Whether a run that ends with `last_step` ends before the window."""
        return bool(self._steps) and self._steps.start > last_step

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Marks in the trace what the loop is at."""
        return _NOTHING if self._profiler is None else record_function(name)

    def before_step(self, step: int) -> None:
        """Begin the window if `step` is in it."""
        if self.is_open or step not in self._steps:
            return
        self.is_open, self._first = True, step
        if self._records:
            self._profiler = self._attempt("begun", self._start)

    def ends_with(self, step: int) -> bool:
        """Whether the window is open and `step` the last one in it."""
        return self.is_open and step + 1 not in self._steps

    def finish(self, last_step: int) -> dict[str, float]:
        """End the window, write the traces and tell where the time went; all ranks call it together.

        Args:
            last_step: The last one that was made.

        Returns:
            The metrics of the lowest rank that recorded; empty when none did.
        """
        profiler, self._profiler = self._profiler, None
        self.is_open = False
        last_step = max(last_step, self._first)  # of which a stop may have left a part
        summary = None
        if profiler is not None:
            summary = self._attempt("made", lambda: self._write(profiler, last_step))
        summaries: list[ProfileSummary | None] = [summary] * self.context.world_size
        if self.context.world_size > 1:
            torch.distributed.all_gather_object(summaries, summary, group=self.context.control_group)
        found = {rank: summary for rank, summary in enumerate(summaries) if summary is not None}
        if not found:
            return {}
        for line in describe(found, self._first, last_step):
            say(line, self.context.is_main)
        name = self._path(last_step, "*" if self.context.world_size > 1 else min(found))
        say(f"traces of {len(found)} of {self.context.world_size} ranks: {name}", self.context.is_main)
        return found[min(found)].row()

    def close(self) -> None:
        """End a recording without a trace, if there is one."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            self._attempt("ended", profiler.stop)
        self.is_open = False

    def _start(self) -> profile:
        # Or the library below torch's profiler prints lines of its own at each start and end.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        if self.context.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self.context.device)  # the kernels of earlier steps are no part of it
        profiler = profile(activities=activities)
        profiler.start()
        return profiler

    def _write(self, profiler: profile, last_step: int) -> ProfileSummary | None:
        """Publish this rank's trace and summarize it."""
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
        profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            trace = path.read_bytes()
        make_directory(self._directory)
        publish_bytes(self._path(last_step, self.context.rank), gzip.compress(trace, _COMPRESSION_LEVEL))
        events = json.loads(trace)["traceEvents"]
        if self.context.device.type == "cuda" and not any(event.get("cat") == "kernel" for event in events):
            raise RuntimeError("the trace has no kernels of the GPU, without which nothing can be summed up")
        return summarize(events)

    def _path(self, last_step: int, rank: int | str) -> Path:
        return self._directory / f"rank{rank}_steps{self._first}-{last_step + 1}.json.gz"

    def _attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """What `action` returns; None when it fails, which is said."""
        try:
            return action()
        except Exception as error:  # whatever goes wrong in a profiler, the run is worth more
            warn(f"the profile of rank {self.context.rank} could not be {what}: {' '.join(str(error).split())}")
            return None
