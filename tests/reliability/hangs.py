"""R13: one rank hangs, is frozen, ends early or raises; every rank ends in time and the console says who and where."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed import PRELOAD

TIMEOUT_S = 5.0
FAULTS = ("hang", "freeze", "exit", "raise")
BEFORE_STEP = 3  # the step in which the fault happens


@dataclass
class Ending:
    """How a rank ended: exit status, seconds after the fault, and what it printed to stderr."""

    status: int
    seconds: float
    printed: str


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, limit_s: float = 60.0) -> list[Ending]:
    """Run `function(rank, *args)` on processes described to them as torchrun does, and report how each ends.

    Seconds count from the moment that a rank calls `mark_fault`. Unlike `run_distributed`, a rank may die.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        processes = [
            context.Process(target=_rank_main, args=(function, rank, world_size, port, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        ended: dict[int, float] = {}
        deadline = time.monotonic() + limit_s
        try:
            while len(ended) < world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                for rank, process in enumerate(processes):
                    if process.exitcode is not None:
                        ended.setdefault(rank, time.time())
        finally:
            for process in processes:
                process.kill()
                process.join()
        if len(ended) < world_size:
            raise AssertionError(f"ranks {sorted(set(range(world_size)) - set(ended))} did not end in {limit_s:.0f} s")
        fault = Path(folder, "fault").stat().st_mtime
        texts = [Path(folder, f"{rank}.err").read_text() for rank in range(world_size)]
    return [Ending(processes[rank].exitcode or 0, ended[rank] - fault, texts[rank]) for rank in range(world_size)]


def mark_fault() -> None:
    """Called by the rank that is about to fail."""
    Path(os.environ["FAULT_FILE"]).touch()


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), FAULT_FILE=str(Path(folder, "fault")), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    descriptor = os.open(Path(folder, f"{rank}.err"), os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    function(rank, *args)


def fail(fault: str) -> None:
    """Make this process fail in one of the ways of `FAULTS`."""
    mark_fault()
    if fault == "hang":
        time.sleep(600)
    elif fault == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "exit":
        os._exit(0)
    elif fault == "raise":
        raise ValueError("a fault on purpose")
