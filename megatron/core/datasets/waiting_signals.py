"""Signals that wait while files get their final names."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""Those that end a tool (`megatron/training/arguments.py`)."""


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals are handled when the block is left, whichever thread they reach."""
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield
        return
    arrived: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    for number in before:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])
