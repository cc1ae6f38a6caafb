"""Hang detection: every process watches where it waits, and the ranks that keep the others waiting are named.

torch's own timeouts end a hanging job too, but say neither which call of ours waits nor which rank it waits for. Here a
thread of each process samples Python stacks and a second one tells the other ranks, through the store of the job, where
this one is. When a collective has lasted for the timeout, the first process to notice compares all reports, prints one
line and ends the job; every other process, also the one that hangs, reads that in the store and leaves.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import re
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from torch.distributed import DistError, PrefixStore, Store

from megatron.core.errors import CommunicationError, RunError, UserError
from megatron.training.consistency import rank_ranges

T = TypeVar("T")

PACKAGE = str(Path(__file__).parents[1]) + os.sep  # megatron/
TORCH = str(Path(torch.__file__).parent) + os.sep
TORCH_DISTRIBUTED = str(Path(TORCH, "distributed")) + os.sep
TORCH_OPERATORS = str(Path(TORCH, "_ops.py"))  # calls compiled code on behalf of whoever is outside
LIBRARIES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
DECORATOR = "wrapper"  # name of the frames that torch puts around its collectives

# Calls outside torch that wait for other ranks: for the handle of a collective or for a device that executes one.
WAITING_CALL = re.compile(r"\.(wait|item|tolist|cpu|synchronize)\(")

COMMUNICATION_FAILURE = re.compile("gloo|nccl", re.IGNORECASE)  # their messages name them, or their source files
SOURCE_LOCATION = re.compile(r"^\[[^\]]*\.(cc|cpp|h):\d+\] ")  # in front of gloo's messages

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.2, 1.0
SUSPICIOUS = 0.1  # part of the timeout after which a call is looked at more closely
GRACE_S = 2.0  # for a process to leave in its own way once another has ended the job
GRACE_FOR_SAME_ERROR_S = 5.0  # ... with an error that this one will probably raise too
STORE_ANSWERS_WITHIN_S = 1.0
MAX_GROUPS = 4  # of ranks that a message spells out


@dataclass(frozen=True)
class Place:
    """Where a thread is.

    Attributes:
        collective: Name of the call in which it waits for other ranks, or None when it does not.
        function: The innermost function that is no library's, with file and line.
    """

    collective: str | None
    function: str

    def __str__(self) -> str:
        return self.function if self.collective is None else f"{self.collective} of {self.function}"


def locate(stack: Iterable[tuple[FrameType, int]]) -> Place:
    """Place of a stack of (frame, line), innermost first."""
    # A frame that is seen from another thread may be between two lines; it then has none.
    frames = [(frame.f_code, line or 0) for frame, line in stack if frame.f_code.co_filename != TORCH_OPERATORS]
    collective = None
    for code, _ in frames:
        if not code.co_filename.startswith(TORCH_DISTRIBUTED):
            break
        if code.co_name != DECORATOR:
            collective = code.co_name
            break
    ours = [frame for frame in frames if _is_ours(frame[0].co_filename)]
    code, line = (ours or frames)[0]
    innermost = linecache.getline(frames[0][0].co_filename, frames[0][1])
    if collective is None and (called := WAITING_CALL.search(innermost)):
        collective = called[1]
    path = Path(code.co_filename)
    shown = path.relative_to(Path(PACKAGE).parent).as_posix() if code.co_filename.startswith(PACKAGE) else path.name
    return Place(collective, f"{code.co_name} ({shown}:{line})")


def _is_ours(path: str) -> bool:
    """Whether a source file belongs to this package or to the program around it, not to Python or a library."""
    return path.startswith(PACKAGE) or not path.startswith((TORCH, *LIBRARIES, "<"))


def describe_communication_failure(error: BaseException, rank: int) -> str | None:
    """One line with rank, collective and place when `error`, or what caused it, came out of a collective; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RunError):  # described already
            return None
        if isinstance(cause, DistError) or (
            isinstance(cause, RuntimeError) and COMMUNICATION_FAILURE.search(str(cause))
        ):
            stack = list(traceback.walk_tb(cause.__traceback__))[::-1]
            place = locate(stack) if stack else None
            where = "communication" if place is None else str(place)
            reason = SOURCE_LOCATION.sub("", str(cause)).splitlines()[0].split(". ")[0].rstrip(".")
            return f"rank {rank}: {where} failed: {reason}"
        cause = cause.__cause__ or cause.__context__
    return None


class _Observation:
    """A call in which a thread was seen, and since when."""

    def __init__(self, frame: FrameType, step: int | None, now: float) -> None:
        self.call = (id(frame), frame.f_lasti, step)
        self.since = now
        self.place = locate(traceback.walk_stack(frame))
        self.frame: FrameType | None = None

    def is_of(self, frame: FrameType, step: int | None) -> bool:
        """Whether the thread is still in this call.

        A frame that has returned can leave its address to the next call of the same function; a frame that `hold` keeps
        alive cannot.
        """
        return self.call == (id(frame), frame.f_lasti, step) and (self.frame is None or self.frame is frame)

    def hold(self, frame: FrameType) -> None:
        """Keep the frame, and with it its tensors, until it is left: only of calls that last suspiciously long."""
        self.frame = frame


@dataclass
class _Report:
    """What another rank said last, and when that reached this one."""

    values: dict[str, Any]
    at: float


class Watchdog:
    """Watches this process and the reports of the others, from `__enter__` to `__exit__`.

    An exception that leaves the block ends the job for the other ranks too. One that came out of a collective turns
    into `CommunicationError`; when another rank has said already what is wrong, it ends the process with its status.

    Attributes:
        step: Step that the training loop makes, for the messages; a new one also shows that the loop goes on.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int, timeout: timedelta) -> None:
        """Watchdog of `rank`.

        Args:
            store: Of this start of the job; without one, or with a single process, the watchdog does nothing.
            rank: This process.
            world_size: Number of processes.
            timeout: How long a collective may last.
        """
        self.step: int | None = None
        self.rank, self.world_size = rank, world_size
        self.timeout_s = timeout.total_seconds()
        self.interval_s = min(max(self.timeout_s / 20, MIN_INTERVAL_S), MAX_INTERVAL_S)
        self.silence_s = 3 * self.interval_s + 2  # after which a rank counts as gone
        self._job_store = store if world_size > 1 else None
        self._node = os.environ.get("GROUP_RANK", "0")
        self._observations: dict[int, _Observation] = {}
        self._main = threading.main_thread().ident
        self._reports: dict[int, _Report] = {}
        self._listens = False
        self._contact = time.monotonic()  # with the store
        self._now = 0.0  # seconds that this process has been watched for
        self._store_is_gone = False
        self._abort: dict[str, Any] | None = None  # what the rank that ended the job said
        self._sent = 0
        self._leaving = False
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        if self._job_store is not None:
            # A connection of its own: the job's blocks while another thread waits for a key.
            self._store = PrefixStore("watchdog", self._job_store.clone())  # type: ignore[attr-defined]  # not in the stubs
            self._tell("running")  # at once: the others shall know of this process whatever happens to it
            self._contact = time.monotonic()
            for target in (self._watch, self._talk):
                self._threads.append(threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._job_store is None:
            return
        self._leaving = True
        try:
            if error is None:
                self._within_limits(lambda: self._tell("ended"))
            else:
                self._leave_with(error)
        finally:
            self._stopped.set()
            for thread in self._threads:
                thread.join(STORE_ANSWERS_WITHIN_S)
            self._observations.clear()

    def _leave_with(self, error: BaseException) -> None:
        message = describe_communication_failure(error, self.rank)
        if message is None:
            first_line = (str(error).splitlines() or [""])[0]
            if isinstance(error, (UserError, RunError)):
                # Mostly all ranks raise it, each in its time, and one process of a node shows it.
                self._within_limits(lambda: self._tell("ended"))
                self.abort(
                    f"{first_line} (rank {self.rank})",
                    error.exit_status,
                    shown=os.environ.get("LOCAL_RANK", "0") == "0",
                )
            else:
                message = f"rank {self.rank} ended with {type(error).__name__}: {first_line}"
                if self.abort(message) and not isinstance(error, SystemExit):
                    print(
                        f"error: {message}", file=sys.stderr, flush=True
                    )  # the traceback, which follows, names no rank
            self._linger()
            return
        message += self._missing_ranks()
        if self.abort(message):
            self._linger()
            raise CommunicationError(message) from error
        self._end(self._repeated())

    def abort(self, message: str, status: int = CommunicationError.exit_status, shown: bool = True) -> bool:
        """Make all other ranks leave.

        Args:
            message: One line that says why.
            status: Their exit status. With another than 3, they are given time to raise the same error themselves.
            shown: Whether this process shows the line on its node.

        Returns:
            Whether this rank was the first to say so, or cannot know: then the line is to be shown.
        """
        said = {"rank": self.rank, "node": self._node, "message": message, "silent": self._silent_processes()}
        said |= {"status": status, "shown": shown}
        sent = json.dumps(said)
        first = self._within_limits(lambda: self._store.compare_set("abort", "", sent))
        if first is not None and first.decode() != sent:
            self._abort = json.loads(first)
            if self._abort["rank"] == self.rank:
                time.sleep(GRACE_S)  # another thread of this process was first: it prints and ends the process
            return False
        return True

    def _linger(self) -> None:
        """Let the other ranks read what this one said before the store is gone, if this process holds it."""
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * self.interval_s)

    # What happens in the thread that watches; it must never wait for the store.

    def _watch(self) -> None:
        leave_at = None
        before = time.monotonic()
        while not self._stopped.wait(self.interval_s):
            # A process that was stopped for a while did not wait in that time.
            elapsed = time.monotonic() - before
            self._now, before = self._now + min(elapsed, self.silence_s), before + elapsed
            self._observe()
            waited = self._waited_s()
            if self._leaving:
                continue
            self._listen_from_now_on(waited > SUSPICIOUS * self.timeout_s)
            if self._abort is not None or self._store_is_gone:
                own_error = self._abort is not None and self._abort["status"] != CommunicationError.exit_status
                leave_at = leave_at or self._now + (GRACE_FOR_SAME_ERROR_S if own_error else GRACE_S)
                if self._now >= leave_at:
                    gone = f"rank {self.rank} leaves {self._current_place()}, the store of the job is gone"
                    self._end(gone if self._abort is None else self._repeated())
            elif waited >= self.timeout_s - 2 * self.interval_s:  # its beginning was seen up to one interval late
                message = self._accusation()
                self._end(message if self.abort(message) else self._repeated())

    def _observe(self) -> None:
        """Look where the main thread and those of the autograd engine are.

        Not the other threads, such as the writer of checkpoints: they may wait as long as they like.
        """
        started = {t.ident for t in threading.enumerate() if not isinstance(t, threading._DummyThread)} - {self._main}
        observations = {}
        for ident, frame in sys._current_frames().items():
            if ident in started:
                continue
            known = self._observations.get(ident)
            if known is None or not known.is_of(frame, self.step):
                known = _Observation(frame, self.step, self._now)
            elif self._now - known.since > SUSPICIOUS * self.timeout_s and known.place.collective is not None:
                known.hold(frame)
            observations[ident] = known
        self._observations = observations

    def _current(self) -> _Observation | None:
        """The collective that has lasted longest, or else what the main thread does."""
        waiting = [seen for seen in self._observations.values() if seen.place.collective is not None]
        if waiting:
            return min(waiting, key=lambda seen: seen.since)
        return self._observations.get(self._main or 0)

    def _current_place(self) -> Place | str:
        seen = self._current()
        return "its start" if seen is None else seen.place

    def _waited_s(self) -> float:
        seen = self._current()
        return 0.0 if seen is None or seen.place.collective is None else self._now - seen.since

    def _end(self, message: str | None) -> None:
        """Leave at once, without the clean-up of an orderly end, which may wait for other ranks."""
        if message is not None:
            print(f"error: {message}", file=sys.stderr, flush=True)
        self._kill_silent_neighbours()
        self._linger()
        os._exit(CommunicationError.exit_status if self._abort is None else self._abort["status"])

    def _kill_silent_neighbours(self) -> None:
        """End processes of this node that cannot end themselves: a launcher would wait for them."""
        for node, pid in (self._abort or {}).get("silent", []) + self._silent_processes():
            if node == self._node and _parent_of(pid) == os.getppid():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)

    # What happens in the thread that talks to the store, which may wait for it forever.

    def _talk(self) -> None:
        try:
            while not self._stopped.wait(self.interval_s):
                self._tell("running")
                if self._listens:
                    self._listen()
                if self._store.check(["abort"]):
                    self._abort = json.loads(self._store.get("abort"))
                self._contact = time.monotonic()
        except RuntimeError:
            self._store_is_gone = True  # and with it rank 0 or the launcher, whichever held it

    def _tell(self, state: str) -> None:
        self._sent += 1
        seen = self._current()
        report = {"number": self._sent, "state": state, "process": [self._node, os.getpid()], "step": self.step}
        if seen is not None:
            report |= {"collective": seen.place.collective, "function": seen.place.function}
            report["waited_s"] = self._now - seen.since
        self._store.set(str(self.rank), json.dumps(report))

    def _listen_from_now_on(self, listens: bool) -> None:
        if listens and not self._listens:
            self._reports = {}  # what was heard long ago would make its rank seem silent
        self._listens = listens

    def _listen(self) -> None:
        """Read what the other ranks say. Their clocks do not matter: what counts is when a new report came."""
        present = [rank for rank in range(self.world_size) if rank != self.rank and self._store.check([str(rank)])]
        if not present:
            return
        for rank, text in zip(present, self._store.multi_get([str(rank) for rank in present]), strict=True):
            values = json.loads(text)
            known = self._reports.get(rank)
            if known is None or known.values["number"] != values["number"]:
                self._reports[rank] = _Report(values, time.monotonic())

    def _within_limits(self, function: Callable[[], T]) -> T | None:
        """What a call to the store returns, or None when it fails or takes too long."""
        results: list[T] = []

        def call() -> None:
            try:
                results.append(function())
            except RuntimeError:  # the store is gone
                return

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(STORE_ANSWERS_WITHIN_S)
        return results[0] if results else None

    # Messages.

    def _is_silent(self, report: _Report) -> bool:
        reached = time.monotonic() - self._contact < self.silence_s
        return reached and report.values["state"] == "running" and time.monotonic() - report.at > self.silence_s

    def _silent_processes(self) -> list[list[Any]]:
        """Node and process id of each rank that is silent."""
        # A copy: the other thread adds reports meanwhile.
        return [report.values["process"] for report in list(self._reports.values()) if self._is_silent(report)]

    def _accusation(self) -> str:
        """The line about a collective that has lasted too long: this rank, the call, and who is not there."""
        seen = self._current()
        assert seen is not None
        message = f"rank {self.rank} has waited {self._now - seen.since:.0f} s in {seen.place}"
        if self.step is not None:
            message += f" at step {self.step}"
        if time.monotonic() - self._contact > self.silence_s:
            return message + "; the other ranks cannot be asked, the store of the job does not answer"
        absent: dict[str, list[int]] = {}
        waiting: dict[str, list[int]] = {}
        for rank in range(self.world_size):
            if rank != self.rank:
                text, is_absent = self._describe(self._reports.get(rank), seen.place)
                (absent if is_absent else waiting).setdefault(text, []).append(rank)
        return message + _describe_groups(absent or waiting)

    def _describe(self, report: _Report | None, place: Place) -> tuple[str, bool]:
        """What another rank does while this one waits at `place`, and whether it is to blame."""
        if report is None:
            return "has never been heard of", True
        values = report.values
        there = Place(values.get("collective"), values.get("function", "its start-up"))
        at_step = "" if values["step"] in (self.step, None) else f" at step {values['step']}"
        if values["state"] == "ended":
            return f"has ended{at_step}", True
        if self._is_silent(report):
            return f"has not been heard of for {time.monotonic() - report.at:.0f} s, last in {there}{at_step}", True
        if there.collective is None:
            return f"is elsewhere{at_step}: {there} since {values.get('waited_s', 0.0):.0f} s", True
        return ("waits there too" if there == place and not at_step else f"waits in {there}{at_step}"), False

    def _missing_ranks(self) -> str:
        """After a broken connection: the end of a line about the ranks that are gone, once they can be known."""
        self._listen_from_now_on(True)
        deadline = time.monotonic() + self.silence_s + 2 * self.interval_s
        missing: dict[str, list[int]] = {}
        while not missing and self._abort is None and time.monotonic() < deadline:
            time.sleep(self.interval_s / 2)
            for rank, report in list(self._reports.items()):
                if report.values["state"] == "ended" or self._is_silent(report):
                    missing.setdefault(self._describe(report, Place(None, ""))[0], []).append(rank)
        return _describe_groups(missing)

    def _repeated(self) -> str | None:
        """What another rank said and does not show on this node, on the one process of this node that shows it."""
        said = self._abort
        if said is None or os.environ.get("LOCAL_RANK", "0") != "0":
            return None
        if said["node"] == self._node:
            return None if said["shown"] else str(said["message"])
        return f"{said['message']} (said by rank {said['rank']})"


def _describe_groups(groups: dict[str, list[int]]) -> str:
    parts = []
    for text, ranks in list(groups.items())[:MAX_GROUPS]:
        parts.append(f"; {rank_ranges(ranks)} {text}")
    if len(groups) > MAX_GROUPS:
        parts.append(f"; {len(groups) - MAX_GROUPS} other descriptions of ranks are left out")
    return "".join(parts)


def _parent_of(pid: int) -> int | None:
    """Parent of a process of this machine, where /proc tells."""
    try:
        return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
