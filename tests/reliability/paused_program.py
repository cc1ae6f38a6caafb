"""`pretrain_t5.py` that waits in one phase until it is told to go on: `paused_program.py PHASE FOLDER flags...`.

A rank that waits leaves the file `FOLDER/waits<rank>`; all go on when `FOLDER/go` is there.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEP = 4  # the step that is paused in
WAITS_AT_MOST_S = 120.0


def before(owner: Any, name: str, call: int, action: Callable[[], None]) -> None:
    """Let `action` run before the `call`-th call (from 1) of `owner.name`."""
    function, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def pause(folder: Path) -> None:
    """Tell that this rank waits, and wait."""
    (folder / f"waits{os.environ.get('RANK', '0')}").touch()
    deadline = time.monotonic() + WAITS_AT_MOST_S
    while not (folder / "go").exists():
        assert time.monotonic() < deadline, "nobody told this rank to go on"
        time.sleep(0.01)


def arrange(phase: str, action: Callable[[], None]) -> None:
    """Let `action` run once in the phase: imports, start-up, step, evaluation or save."""
    from megatron.core.datasets.prefetch import Prefetcher
    from megatron.core.dist_checkpointing import CheckpointSaver
    from megatron.training import training
    from megatron.training.model_setup import DistributedModel

    if phase == "imports":
        before(training, "pretrain_in", 1, action)
    elif phase == "start-up":
        before(training, "open_data", 1, action)
    elif phase == "step":
        before(Prefetcher, "step_batch", STEP, action)
    elif phase == "evaluation":
        before(DistributedModel, "token_losses", 1, action)
    else:
        assert phase == "save"
        # Amid the writing: the first file of the first checkpoint is written, but not known to be on the disk.
        before(CheckpointSaver, "save", 1, lambda: before(os, "fsync", 1, action))


if __name__ == "__main__":
    phase, folder, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    arrange(phase, lambda: pause(Path(folder)))
    program = str(ROOT / "pretrain_t5.py")
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
