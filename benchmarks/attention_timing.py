"""Time of a call on a GPU, by events around many of it; on a CPU by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

TURN_MS = 15.0  # a turn repeats the call for about this long
WARM_UPS = 3


class Call(NamedTuple):
    """Something to time.

    Attributes:
        run: Makes `calls` calls.
        calls: How many.
        repeats: How often a turn runs it.
        graph: Whether it replays a CUDA graph.
        device: Where.
    """

    run: Callable[[], Any]
    calls: int
    repeats: int
    graph: bool
    device: torch.device

    def milliseconds(self) -> float:
        """Of one call, in a turn of `repeats` runs."""
        return elapsed_ms(self.run, self.repeats, self.device) / (self.repeats * self.calls)


def elapsed_ms(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Milliseconds that so many runs, one after another, take the device."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of what `run` does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed_call(functions: Sequence[Callable[[], Any]], device: torch.device, *, graph: bool) -> Call:
    """The functions one after another as something to time, warmed up, with as many repeats as a turn takes.

    Args:
        functions: The same call with different arguments.
        device: Where it runs.
        graph: Replay a CUDA graph of it; ignored on CPUs.
    """

    def run() -> None:
        for function in functions:
            function()

    graph = graph and device.type == "cuda"
    replay = _captured(run) if graph else run
    if device.type == "cuda":
        elapsed_ms(replay, 1, device)
    once = elapsed_ms(replay, 1, device)
    repeats = max(1, round(TURN_MS / once)) if device.type == "cuda" else 1
    return Call(replay, len(functions), repeats, graph, device)
