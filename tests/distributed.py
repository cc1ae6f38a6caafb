"""The one helper for tests that need several processes: gloo ranks on this machine, one thread each."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# The fork server imports these once; every rank is then a fork of it and starts in a few milliseconds.
# torch._dynamo takes seconds and is imported by FSDP2's first use.
PRELOAD = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"]


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run `fn(rank, *args)` on `world_size` gloo processes and return what each rank returned, by rank.

    Args:
        fn: Picklable (top-level) function. The default process group is initialised when it is called.
        world_size: Number of processes.
        args: Picklable arguments.
        timeout: Seconds after which all ranks are killed; also the timeout of each collective.

    Raises:
        AssertionError: A rank raised (with the traceback of the first that did), died, or the time is over.
            The other ranks are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(fn, rank, world_size, args, folder, timeout, sender), daemon=True
            )
            process.start()
            sender.close()  # the receiver then sees the end of the stream when the rank dies
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Any], processes: list[Any], timeout: float) -> list[Any]:
    """Wait for a message of every rank; the first failure ends the wait."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = {id(pipe): rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait([pipes[rank] for rank in waiting.values()], deadline - time.monotonic())
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} did not finish within {timeout:.0f} s")
        for pipe in ready:
            rank = waiting[id(pipe)]
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                message = f"rank {rank} died with exit code {processes[rank].exitcode}"
                raise AssertionError(message) from None
            if not succeeded:
                raise AssertionError(f"rank {rank} raised:\n{value}")
            results[rank] = value
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    fn: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], folder: str, timeout: float, sender: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # does not depend on how the host's name resolves
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(folder) / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = fn(rank, *args)
        dist.barrier()  # gloo aborts a rank whose peer has already destroyed its group
        dist.destroy_process_group()
        sender.send_bytes(pickle.dumps((True, result)))  # not send(): it shares tensors, which end with this process
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        sender.close()
        os._exit(1)  # the process group cannot be torn down in order any more
