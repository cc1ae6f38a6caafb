"""The watchdog: it names the rank and the call that keep a job waiting, ends the job, and is silent otherwise."""

import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.errors import CommunicationError, UserError
from megatron.training.arguments import run_command_line
from megatron.training.watchdog import Watchdog, describe_communication_failure, locate
from tests.distributed import PRELOAD
from tests.reliability.faulty_program import fail

TIMEOUT_S = 4.0
CALL = r"all_reduce of _step \(test_watchdog.py:\d+\)"


@dataclass
class Ending:
    """How a rank ended: exit status, seconds after the fault, and what it printed to stderr."""

    status: int
    seconds: float
    printed: str


def _run_ranks(function: Callable[..., Any], world_size: int, *args: Any, limit_s: float = 60.0) -> list[Ending]:
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


def _mark_fault() -> None:
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


def _step() -> None:
    torch.distributed.all_reduce(torch.ones(3))


def _loop(rank: int, fault: str, world_size: int) -> None:
    """Steps of one all-reduce each; the last rank fails before the fourth."""

    def main() -> None:
        timeout = timedelta(seconds=TIMEOUT_S)
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timeout))
        prefixed = torch.distributed.PrefixStore("default_pg", store)
        torch.distributed.init_process_group("gloo", store=prefixed, rank=rank, world_size=world_size, timeout=timeout)
        with Watchdog(store, rank, world_size, timeout) as watchdog:
            for watchdog.step in range(6):
                if watchdog.step == 3 and rank == world_size - 1:
                    _mark_fault()
                    if fault == "mistake":
                        raise UserError("my.bin is damaged; copy it again")
                    if fault == "late":
                        time.sleep(0.7 * TIMEOUT_S)
                    else:
                        fail(fault)
                _step()
            torch.distributed.barrier()

    run_command_line(main, is_printing_process=rank == 0)


def test_a_hanging_rank_is_named_and_every_rank_leaves() -> None:
    endings = _run_ranks(_loop, 2, "hang", 2)
    assert [ending.status for ending in endings] == [3, 3]
    assert all(ending.seconds < TIMEOUT_S + 5 for ending in endings)
    who = rf"error: rank 0 has waited \d s in {CALL} at step 3; rank 1 is elsewhere"
    assert re.fullmatch(rf"{who}: fail \(faulty_program.py:\d+\) since \d s\n", endings[0].printed)


def test_a_frozen_rank_is_named_and_killed() -> None:
    endings = _run_ranks(_loop, 3, "freeze", 3)
    assert [ending.status for ending in endings] == [3, 3, -9]
    assert all(ending.seconds < TIMEOUT_S + 5 for ending in endings)
    printed = "".join(ending.printed for ending in endings)
    assert re.search(rf"rank [01] has waited \d s in {CALL} at step 3; rank 2 has not been heard of for \d s", printed)


def test_a_rank_that_ends_early_is_named() -> None:
    endings = _run_ranks(_loop, 2, "exit", 2)
    assert [ending.status for ending in endings] == [3, 0]
    assert re.search(rf"error: rank 0: {CALL} failed: .*; rank 1 has not been heard of for \d s\b", endings[0].printed)


def test_a_rank_that_raises_ends_the_others_and_is_alone_to_speak() -> None:
    endings = _run_ranks(_loop, 2, "raise", 2)
    assert [ending.status for ending in endings] == [3, 1]
    assert "a fault on purpose" in endings[1].printed
    assert endings[0].printed == ""


def test_a_mistake_on_a_rank_that_does_not_print_is_shown_by_the_one_that_does() -> None:
    endings = _run_ranks(_loop, 2, "mistake", 2)
    assert [ending.status for ending in endings] == [1, 1]
    assert endings[0].printed == "error: my.bin is damaged; copy it again (rank 1)\n"


def test_waiting_for_less_than_the_timeout_is_no_hang() -> None:
    endings = _run_ranks(_loop, 2, "late", 2)
    assert [(ending.status, ending.printed) for ending in endings] == [(0, ""), (0, "")]


def test_other_failures_are_not_taken_for_communication() -> None:
    for error in (ValueError("gloo"), UserError("--distributed-backend nccl needs GPUs"), RuntimeError("no memory")):
        assert describe_communication_failure(error, 0) is None


def test_the_cause_of_a_failure_counts() -> None:
    def receive() -> None:
        raise RuntimeError("[/somewhere/gloo/transport/tcp/pair.cc:5] Connection closed by peer [1.2.3.4]:5. This is")

    with pytest.raises(RuntimeError) as raised:
        try:
            receive()
        except RuntimeError as error:
            raise RuntimeError("stage 1 failed") from error
    line = describe_communication_failure(raised.value, 4)
    assert line is not None
    assert re.fullmatch(
        r"rank 4: receive \(test_watchdog.py:\d+\) failed: Connection closed by peer \[1.2.3.4\]:5", line
    )


def test_one_process_needs_no_watchdog() -> None:
    with pytest.raises(ValueError, match="as it was"), Watchdog(None, 0, 1, timedelta(seconds=1)) as watchdog:
        watchdog.step = 1
        raise ValueError("as it was")
    assert CommunicationError.exit_status == 3


def test_a_frame_between_two_lines_is_located() -> None:
    """The line number of a thread that runs is sometimes None."""
    place = locate([(sys._getframe(), None)])  # type: ignore[list-item]
    assert "test_a_frame_between_two_lines_is_located" in place.function and place.collective is None
