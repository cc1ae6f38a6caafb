"""Whole jobs that can be killed: `pretrain_t5.py` with its flags, forked from a server or as real programs."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from tests.distributed import PRELOAD

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "pretrain_t5.py")
GRACE_S = 30.0  # what torchrun gives the other ranks, after SIGTERM, when one has failed
STARTED_WITHIN_S = 60.0


class Job(Protocol):
    """A running job; ranks are counted from 0."""

    def pids(self) -> list[int]:
        """Process ids of the ranks, as far as they have been started."""

    def ended(self, timeout: float) -> bool:
        """Whether all processes of the job are gone, after waiting so many seconds for it at most."""

    def kill(self, rank: int | None) -> bool:
        """SIGKILL to one rank, or to every process of the job; whether there was still something to kill."""

    def statuses(self) -> list[int]:
        """Exit statuses of the ranks of an ended job, -n for signal n; empty when the job was killed as a whole."""


class ForkedJob:
    """A job as torchrun would run it, without the seconds that it and its imports take.

    A small launcher and the ranks are forks of a process that has imported everything already. The launcher is the
    leader of a process group of its own. It holds the store through which the ranks find each other, and does what
    torchrun does: when one rank fails, the others get SIGTERM and, after a grace period, SIGKILL.

    Args:
        arguments: Flags of the program.
        ranks: Number of processes; one has no launcher's environment, like a program started by hand.
        log: File that takes what the processes print.
        program: What every rank runs.
    """

    def __init__(self, arguments: list[str], ranks: int, log: Path, program: str = PROGRAM) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "megatron.training.training", "tests.reliability.jobs"])
        self._receiver, sender = context.Pipe(duplex=False)
        launcher = context.Process(target=_launch, args=([program, *arguments], ranks, str(log), sender))
        launcher.start()
        sender.close()  # the launcher and the ranks have it now: the stream ends when the last of them is gone
        if not self._receiver.poll(STARTED_WITHIN_S):
            raise TimeoutError(f"no rank was started within {STARTED_WITHIN_S:.0f} s")
        self._launcher, self._pids = self._receiver.recv()
        self._statuses: list[int] = []
        self._ended = False

    def pids(self) -> list[int]:
        return list(self._pids)

    def ended(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        try:
            while not self._ended and self._receiver.poll(max(0.0, deadline - time.monotonic())):
                self._statuses = self._receiver.recv()
        except EOFError:
            self._ended = True
        return self._ended

    def kill(self, rank: int | None) -> bool:
        if rank is not None:
            return _signal(self._pids[rank], signal.SIGKILL)
        try:
            os.killpg(self._launcher, signal.SIGKILL)
        except ProcessLookupError:  # ended at this very moment; its statuses tell
            return False
        return True

    def statuses(self) -> list[int]:
        return self._statuses


def _launch(command: list[str], ranks: int, log: str, sender: Any) -> None:
    """The launcher: starts the ranks, waits for them, reports their statuses."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")  # nothing has made a thread so far
    processes = [context.Process(target=_rank, args=(command, rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    if ranks > 1:
        from torch.distributed import TCPStore

        _store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    sender.send((os.getpid(), [process.pid for process in processes]))
    running = {process.sentinel: process for process in processes}
    deadline = None
    while running:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait(list(running), timeout)
        for sentinel in ready:
            assert isinstance(sentinel, int)
            process = running.pop(sentinel)
            process.join()
            if process.exitcode and deadline is None:
                deadline = time.monotonic() + GRACE_S
                for other in running.values():
                    other.terminate()
        if not ready:
            for process in running.values():
                process.kill()
    sender.send([process.exitcode for process in processes])


def _rank(command: list[str], rank: int, ranks: int, port: int) -> None:
    """One process of the job: the program as `python pretrain_t5.py` runs it."""
    import torch

    torch.set_num_threads(1)
    if ranks > 1:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), TORCHELASTIC_USE_AGENT_STORE="True",
        )  # fmt: skip
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class ProgramJob:
    """The real programs: `python pretrain_t5.py`, or `torchrun`, which starts failed ranks again, for several ranks.

    Args:
        arguments: Flags of the program.
        ranks: Number of processes.
        log: File that takes what the processes print.
        max_restarts: How often torchrun starts the ranks again.
        program: What every rank runs.
        options: Further options of torchrun.

    Attributes:
        pid: Of torchrun, or of the only rank.
    """

    def __init__(
        self,
        arguments: list[str],
        ranks: int,
        log: Path,
        max_restarts: int = 3,
        program: str = PROGRAM,
        options: tuple[str, ...] = (),
    ) -> None:
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command += ["--max-restarts", str(max_restarts), *options]
        self.ranks = ranks
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, program, *arguments], stdout=output, stderr=output, env=environment, cwd=ROOT
            )
        self.pid = self._process.pid

    def pids(self) -> list[int]:
        return [pid for _, pid in sorted(self._by_rank().items())]

    def _by_rank(self) -> dict[int, int]:
        if self.ranks == 1:
            return {0: self._process.pid}
        ranks = {pid: _environment(pid, "LOCAL_RANK") for pid in descendants(self._process.pid)}
        return {int(rank): pid for pid, rank in ranks.items() if rank is not None}

    def ended(self, timeout: float) -> bool:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self, rank: int | None) -> bool:
        if rank is not None:
            pid = self._by_rank().get(rank)
            return pid is not None and _signal(pid, signal.SIGKILL)
        # torchrun makes each rank a session of its own, so that there is no group of the whole job.
        was_there = _signal(self._process.pid, signal.SIGSTOP)  # it starts nothing meanwhile
        started = descendants(self._process.pid)
        for pid in (self._process.pid, *started):
            _signal(pid, signal.SIGKILL)
        while any(is_running(pid) for pid in started):
            time.sleep(0.01)
        return was_there

    def statuses(self) -> list[int]:
        return [self._process.returncode]


def _signal(pid: int, number: signal.Signals) -> bool:
    """Send a signal; whether the process was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def descendants(pid: int) -> list[int]:
    """Processes that `pid` and its descendants have started, threads of theirs included as starters."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:  # it ended meanwhile
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def _environment(pid: int, name: str) -> str | None:
    """Value of a variable in the environment that a process was started with."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    prefix = name.encode() + b"="
    return next((entry[len(prefix) :].decode() for entry in entries if entry.startswith(prefix)), None)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
