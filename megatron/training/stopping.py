"""Stopping a run in order: signals, requests and the time limit, agreed on by all ranks.

A signal reaches some ranks or all of them, at different instants; ranks that drew different conclusions would wait for
each other for ever. So handlers only take a note, and the loop asks at places that all ranks pass in the same order.

The first signal lets the step end. A second one, for when that takes too long, gives up the step under way. Signals
that follow each other within `SAME_REQUEST_S` count as one: a launcher that forwards a signal that its processes got
already, Ctrl-C in a terminal for one, is not a second wish.

Before the first step, some ranks may prepare data for hours while the others wait for them. There a note would not do:
the first signal, whichever rank it reaches, interrupts the work.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any

import torch

from megatron.core.parallel_state import ParallelContext
from megatron.training.config import TrainingConfig

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""SIGTERM: launchers and schedulers; SIGINT: Ctrl-C; SIGUSR1: Slurm's warning before the time limit; SIGHUP: the end of
a terminal, unless `nohup` has it ignored."""

SAME_REQUEST_S = 1.0
"""Signals that are closer to each other are one wish to stop."""

SECONDS_BETWEEN_LOOKS = 0.2
"""At what other ranks want, while this one does work that can be interrupted."""

_WANTED = "stopping/wanted"  # key of the job's store


class Stop(IntEnum):
    """How urgently a run is to stop; ranks agree on the maximum."""

    NO = 0
    AFTER_STEP = 1
    AT_ONCE = 2


@dataclass(frozen=True)
class _Wish:
    """What one rank wants, and why: for the others to tell."""

    stop: Stop = Stop.NO
    reason: str = ""
    signal_number: int | None = None


class _Interrupted(KeyboardInterrupt):
    """The work is to be given up; a KeyboardInterrupt for whatever clears up after one."""


class StopControl:
    """Notes the wishes to stop on this rank and finds out about the others'; handles signals inside a `with` block.

    Args:
        context: All its ranks make one.
        training: Holds the time limit, which counts from here.

    Attributes:
        reason: Why the run stops, such as "SIGTERM on rank 1" or "--exit-duration-in-mins 30", the same on all ranks;
            empty until `poll` told them to stop.
        signal_number: The signal that was the reason, or None; the same on all ranks.
    """

    def __init__(self, context: ParallelContext, training: TrainingConfig) -> None:
        self.context = context
        self.reason = ""
        self.signal_number: int | None = None
        self._minutes = training.exit_duration_in_mins
        self._start = time.monotonic()
        # A torchrun that is killed leaves its processes behind: they must not go on beside a job that is started anew.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._agreed = Stop.NO
        self._requested = self._signalled = _Wish()
        self._signals = 0
        self._last_signal = float("-inf")
        self._replaced: dict[signal.Signals, Any] = {}
        self._interrupts = False  # signals raise `_Interrupted`
        self._passing_on = False  # the next one is another rank's

    def __enter__(self) -> StopControl:
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._replaced[number] = signal.signal(number, self._on_signal)
            # Library code that is reading or writing a file in another thread goes on instead of failing with EINTR.
            signal.siginterrupt(number, False)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._passing_on:
            self._passing_on = False
            self._interrupt()
            return
        now = time.monotonic()
        if now - self._last_signal < SAME_REQUEST_S:
            return
        self._last_signal = now
        self._signals += 1
        if self._signals > 2 and number == signal.SIGINT:
            raise KeyboardInterrupt  # the way out of a run that does not get as far as asking
        self._signalled = _Wish(Stop(min(self._signals, Stop.AT_ONCE)), signal.Signals(number).name, number)
        self._interrupt()

    def _interrupt(self) -> None:
        if self._interrupts:
            raise _Interrupted

    def interruptible(self, work: Callable[[], object]) -> bool:
        """Do `work` in the main thread unless or until this rank or another is to stop.

        `work` then sees a KeyboardInterrupt, and the next `poll` tells all ranks to stop. Those that wait meanwhile
        have to call `tell_others` every now and then.

        Returns:
            Whether it came to its end.
        """
        over = threading.Event()
        watcher = threading.Thread(target=self._watch_others, args=(over,), daemon=True)
        try:
            with self._interrupting():
                if self._wish().stop:
                    return False
                watcher.start()
                work()
        except _Interrupted:
            return False
        finally:
            over.set()
            if watcher.ident is not None:
                watcher.join()  # no signal comes from it any more
        return True

    @contextmanager
    def _interrupting(self) -> Iterator[None]:
        """Signals interrupt the block, calls of the system that wait too."""
        for number in self._replaced:
            signal.siginterrupt(number, True)
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False
            for number in self._replaced:
                signal.siginterrupt(number, False)

    def _watch_others(self, over: threading.Event) -> None:
        """In a thread: interrupt the main thread once another rank wants to stop or the launcher is gone."""
        store = self.context.store
        with suppress(RuntimeError):  # the store is gone; the watchdog tells
            while not over.wait(SECONDS_BETWEEN_LOOKS):
                if self._is_orphaned() or (store is not None and store.check([_WANTED])):
                    self._passing_on = True
                    # A signal, since only that wakes a main thread that waits.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                    return

    def tell_others(self) -> None:
        """Interrupt the work of other ranks if this one is to stop."""
        if self._wish().stop and self.context.store is not None:
            self.context.store.set(_WANTED, "")

    def request(self, reason: str) -> None:
        """Stop after the step because this rank wants to; the first reason counts."""
        if not self._requested.stop:
            self._requested = _Wish(Stop.AFTER_STEP, reason)

    def check_time(self) -> None:
        """Stop if the time limit is over; called after a step, so that each start of a run makes one at least."""
        if self._minutes is not None and time.monotonic() - self._start >= self._minutes * 60:
            self.request(f"--exit-duration-in-mins {self._minutes:g}")

    def poll(self) -> Stop:
        """Whether and how urgently to stop; all ranks call it together and get the same answer, which never falls."""
        wish = self._wish()
        stop = wish.stop
        if self.context.control_group is not None:
            highest = torch.tensor(stop, dtype=torch.int32)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=self.context.control_group)
            stop = Stop(int(highest.item()))
        if stop > self._agreed:
            self._agreed = stop
            self._agree_on_reason(wish)
        return stop

    def _wish(self) -> _Wish:
        """What this rank wants."""
        if self._is_orphaned():
            self.request("torchrun is gone")
        return max(self._requested, self._signalled, key=lambda wish: wish.stop)

    def _is_orphaned(self) -> bool:
        return self._launcher is not None and os.getppid() != self._launcher

    def _agree_on_reason(self, own: _Wish) -> None:
        """Take the reason from the lowest rank with the most urgent wish."""
        wishes: list[_Wish] = [own]
        if self.context.control_group is not None:
            wishes = [_Wish()] * self.context.world_size
            torch.distributed.all_gather_object(wishes, own, group=self.context.control_group)
        rank = next(rank for rank, wish in enumerate(wishes) if wish.stop == self._agreed)
        self.signal_number = wishes[rank].signal_number
        # What happened on every rank, a time limit or a signal to the whole job, needs no rank.
        where = "" if all(wish == wishes[rank] for wish in wishes) else f" on rank {rank}"
        self.reason = wishes[rank].reason + where
