"""Signals, requests and the time limit: what a rank notes, and what all ranks agree on."""

import functools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.config import ParallelConfig
from megatron.core.parallel_state import ParallelContext
from megatron.training import stopping
from megatron.training.config import TrainingConfig
from megatron.training.stopping import STOP_SIGNALS, Stop, StopControl
from tests.distributed import run_distributed

ALONE = ParallelContext(torch.device("cpu"))


@pytest.fixture
def every_signal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "SAME_REQUEST_S", 0.0)


def deliver(number: int) -> None:
    """The handler has run when this returns: a process's own signal arrives before the call ends."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_stops_after_the_step_and_a_second_at_once(number: signal.Signals, every_signal_counts: None) -> None:
    before = signal.getsignal(number)
    with StopControl(ALONE, TrainingConfig()) as control:
        assert (control.poll(), control.reason, control.signal_number) == (Stop.NO, "", None)
        deliver(number)
        assert (control.poll(), control.reason, control.signal_number) == (Stop.AFTER_STEP, number.name, number)
        assert control.poll() == Stop.AFTER_STEP
        deliver(number)
        assert (control.poll(), control.reason) == (Stop.AT_ONCE, number.name)
    assert signal.getsignal(number) == before


def test_a_forwarded_copy_of_a_signal_is_no_second_one() -> None:
    with StopControl(ALONE, TrainingConfig()) as control:
        deliver(signal.SIGINT)
        deliver(signal.SIGTERM)
        deliver(signal.SIGINT)
        assert (control.poll(), control.reason) == (Stop.AFTER_STEP, "SIGINT")


def test_processes_of_a_torchrun_that_was_killed_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getppid()
    alone = StopControl(ALONE, TrainingConfig())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    launched = StopControl(ALONE, TrainingConfig())
    assert launched.poll() == Stop.NO
    monkeypatch.setattr(os, "getppid", lambda: parent + 1)
    assert (launched.poll(), launched.reason) == (Stop.AFTER_STEP, "torchrun is gone")
    assert alone.poll() == Stop.NO


def test_a_third_interrupt_ends_the_program_but_not_a_third_sigterm(every_signal_counts: None) -> None:
    with StopControl(ALONE, TrainingConfig()) as control:
        for _ in range(3):
            deliver(signal.SIGTERM)
        assert control.poll() == Stop.AT_ONCE
        with pytest.raises(KeyboardInterrupt):
            deliver(signal.SIGINT)


def test_time_limit() -> None:
    with StopControl(ALONE, TrainingConfig(exit_duration_in_mins=0.5 / 60)) as control:
        assert control.poll() == Stop.NO
        time.sleep(0.5)
        assert control.poll() == Stop.NO  # until a step has been made
        control.check_time()
        assert (control.poll(), control.signal_number) == (Stop.AFTER_STEP, None)
        assert control.reason == "--exit-duration-in-mins 0.00833333"


def test_the_first_request_gives_the_reason_and_a_second_signal_still_hurries(every_signal_counts: None) -> None:
    with StopControl(ALONE, TrainingConfig()) as control:
        control.request("--exit-interval 10")
        control.request("something later")
        assert (control.poll(), control.reason) == (Stop.AFTER_STEP, "--exit-interval 10")
        deliver(signal.SIGTERM)
        deliver(signal.SIGTERM)
        assert (control.poll(), control.reason, control.signal_number) == (Stop.AT_ONCE, "SIGTERM", signal.SIGTERM)


def answers(rank: int) -> list[tuple[Stop, str, int | None]]:
    """What this of two ranks is told after each event."""
    stopping.SAME_REQUEST_S = 0.0
    context = ParallelContext(torch.device("cpu"), 2, rank, control_group=dist.group.WORLD)
    told: list[Any] = []

    def ask(control: StopControl) -> None:
        told.append((control.poll(), control.reason, control.signal_number))

    with StopControl(context, TrainingConfig()) as control:
        ask(control)
        if rank == 1:
            deliver(signal.SIGUSR1)
        ask(control)
        deliver(signal.SIGTERM)  # the first here, the second there
        ask(control)
    with StopControl(context, TrainingConfig()) as control:
        deliver(signal.SIGTERM)
        ask(control)
    with StopControl(context, TrainingConfig(exit_duration_in_mins=1e-9)) as control:
        control.check_time()
        ask(control)
    with StopControl(context, TrainingConfig()) as control:
        if rank == 0:
            control.request("the disk is slow")
        ask(control)
    return told


def test_ranks_agree() -> None:
    expected = [
        (Stop.NO, "", None),
        (Stop.AFTER_STEP, "SIGUSR1 on rank 1", signal.SIGUSR1),
        (Stop.AT_ONCE, "SIGTERM on rank 1", signal.SIGTERM),
        (Stop.AFTER_STEP, "SIGTERM", signal.SIGTERM),
        (Stop.AFTER_STEP, "--exit-duration-in-mins 1e-09", None),
        (Stop.AFTER_STEP, "the disk is slow on rank 0", None),
    ]
    assert run_distributed(answers, 2) == [expected, expected]


def interrupt(seconds: float, number: int) -> None:
    """Send this process a signal after so many seconds."""
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("wait", [time.sleep, threading.Event().wait, lambda _: queue.Queue().get()])
def test_work_is_interrupted_by_a_signal_and_only_work(wait: Callable[[float], Any]) -> None:
    done = []
    with StopControl(ALONE, TrainingConfig()) as control:
        assert control.interruptible(lambda: done.append(1)) and done == [1]
        interrupt(0.2, signal.SIGTERM)
        assert not control.interruptible(lambda: wait(60))
        assert (control.poll(), control.reason) == (Stop.AFTER_STEP, "SIGTERM")
        assert not control.interruptible(lambda: done.append(2)) and done == [1]
        control._last_signal = 0
        deliver(signal.SIGTERM)  # raises nothing here
        assert control.poll() == Stop.AT_ONCE


def test_work_sees_a_keyboard_interrupt_and_its_errors_come_through() -> None:
    seen = []

    def work() -> None:
        try:
            deliver(signal.SIGHUP)
        except KeyboardInterrupt:
            seen.append("interrupt")
            raise

    with StopControl(ALONE, TrainingConfig()) as control:
        with pytest.raises(ZeroDivisionError):
            control.interruptible(lambda: 1 / 0)
        assert not control.interruptible(work) and seen == ["interrupt"]


def test_work_ends_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    parent = os.getppid()
    with StopControl(ALONE, TrainingConfig()) as control:
        threading.Timer(0.2, monkeypatch.setattr, (os, "getppid", lambda: parent + 1)).start()
        assert not control.interruptible(lambda: time.sleep(60))
        assert (control.poll(), control.reason, control.signal_number) == (Stop.AFTER_STEP, "torchrun is gone", None)


def interrupted_work(rank: int, folder: Path) -> list[tuple[Any, ...]]:
    """How three ranks stop when the second has a signal: while the first works, or the first and the third."""
    told = []
    for name in ("main", "local"):
        store = dist.FileStore(str(folder / name), 3)
        context = ParallelContext.create(ParallelConfig(), torch.device("cpu"), store)
        os.environ["LOCAL_RANK"] = str(rank % 2)
        with StopControl(context, TrainingConfig()) as control:
            work = functools.partial(control.interruptible, lambda: time.sleep(60))
            if rank == 1:
                interrupt(0.2, signal.SIGUSR1)
            wait = context.on_main if name == "main" else context.on_local_main
            wait(work, "a name", control.tell_others)
            told.append((control.poll(), control.reason, control.signal_number))
    return told


def test_work_is_interrupted_by_a_signal_to_any_rank(tmp_path: Path) -> None:
    expected = [(Stop.AFTER_STEP, "SIGUSR1 on rank 1", signal.SIGUSR1)] * 2
    assert run_distributed(interrupted_work, 3, tmp_path, timeout=40) == [expected] * 3


PROGRAM = """
import time
import torch
from megatron.core.parallel_state import ParallelContext
from megatron.training.config import TrainingConfig
from megatron.training.stopping import StopControl
with StopControl(ParallelContext(torch.device("cpu")), TrainingConfig()) as control:
    print("ready", flush=True)
    while not control.poll():
        time.sleep(0.01)
print(control.reason)
"""


def test_a_real_signal_from_outside() -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert (process.communicate(timeout=60)[0], process.returncode) == ("SIGUSR1\n", 0)
