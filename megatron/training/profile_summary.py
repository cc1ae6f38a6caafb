"""Where the time of profiled steps goes: interval arithmetic over the events of a Chrome trace.

Without a GPU the timeline is the main thread's: an instant belongs to the innermost operator that runs there. With one
it is that of the kernels of all streams. Either way an instant with an operator or kernel that computes is compute,
however much communication runs beside it; communication is exposed while nothing computes. A `torch.autograd.Function`
may compute without an operator, and may wait: its own time is compute unless communication is under way.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

Interval = tuple[float, float]  # start and end in microseconds of the trace
Intervals = list[Interval]  # disjoint, ascending


class Phase:
    """Names of the loop's phases in a trace."""

    STEP = "step"
    DATA = "data"
    FORWARD_BACKWARD = "forward-backward"
    GRADIENT_REDUCTION = "gradient reduction"
    CLIP = "norm and clip"
    OPTIMIZER = "optimizer"
    REPORT = "report"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"


OPTIMIZER_PHASES = (Phase.CLIP, Phase.OPTIMIZER)  # what the optimizer's time is

CATEGORIES = ("compute", "communication_exposed", "data_wait", "optimizer", "rest")
"""What the time of a step is divided into, without remainder."""

LABELS = {
    "compute": "compute",
    "communication_exposed": "communication, exposed",
    "data_wait": "waiting for data",
    "optimizer": "optimizer, norm, clipping",
    "rest": "the rest (Python, reports)",
}

COLLECTIVES = "collectives"
FUNCTIONS = "autograd functions"
MOST_OPERATORS = 10  # in the text

# The first pattern that is found in an operator's name counts.
_GROUPS = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        (COLLECTIVES, r"^(nccl|gloo|mpi|ucc)[:_A-Z]|ncclDev|^_?c10d|record_param_comms"),
        # Names of classes; the nodes of torch's own operators end in a number.
        (FUNCTIONS, r"^_*(?-i:[A-Z])\w*(?<!\d)$"),
        ("optimizer", r"adam|adafactor|multi_tensor_apply"),
        ("attention kernels", r"attention|flash|fmha|softmax"),
        (
            "matrix products",
            r"::(mm|addmm|bmm|baddbmm|linear|matmul|mv|addmv|dot)$|::mkl|gemm|cutlass|cublas|nvjet|xmma|wgmma",
        ),
        (
            "copies, casts, fills",
            r"::(copy_|to|_to_copy|clone|contiguous|cat|stack|fill_|zero_|zeros.*|empty.*|resize_)$|mem(cpy|set)|copy|fill",
        ),
        ("compiled graphs", r"compiled|cpp_fused|triton"),
        (
            "elementwise and reductions",
            r"::_?(foreach_)?(add|sub|rsub|mul|div|neg|pow|sqrt|rsqrt|exp|log|tanh|sigmoid|gelu|silu|relu|where|masked_fill"
            r"|sum|mean|max|amax|norm|.*norm.*|clamp.*|dropout|square|eq|ge|le|lt|gt|isfinite)(_backward|_)?$"
            r"|megatron_t5::|elementwise|reduce",
        ),
    )
)
OTHER = "other operators"


@lru_cache(maxsize=4096)
def group_of(name: str) -> str:
    """The kind of work of an operator or kernel, by its name."""
    return next((group for group, pattern in _GROUPS if pattern.search(name)), OTHER)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def merged(intervals: Iterable[Interval]) -> Intervals:
    """The union of `intervals`, which may overlap."""
    result: Intervals = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        elif end > start:
            result.append((start, end))
    return result


def intersection(a: Intervals, b: Intervals) -> Intervals:
    """What lies in both."""
    result: Intervals = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            result.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return result


def difference(a: Intervals, b: Intervals) -> Intervals:
    """What lies in `a` and not in `b`."""
    if not a:
        return []
    # The complement of b, as far as a reaches.
    edges = [a[0][0], *(edge for interval in b for edge in interval), a[-1][1]]
    return intersection(a, [(s, e) for s, e in zip(edges[::2], edges[1::2], strict=True) if s < e])


def length_us(intervals: Intervals) -> float:
    """Their summed length."""
    return sum(end - start for start, end in intervals)


# ---------------------------------------------------------------------------------------------------------------------
# Events


class Segment(NamedTuple):
    """A stretch of time in which an operator runs, outside the operators that it calls; microseconds."""

    start: float
    end: float
    operator: str


def operator_of(event: dict[str, Any]) -> str:
    """The operator that an event of a thread is; empty when it only encloses operators, and else waits or is Python."""
    name: str = event["name"]
    if name.startswith("## Call CompiledFxGraph"):
        return "compiled graph"
    computes = ("::" in name and not name.startswith(("autograd::", "torch::autograd"))) or group_of(name) == FUNCTIONS
    return name if (event["cat"] == "cpu_op" and computes) or "cpp_fused" in name else ""


def innermost(events: Iterable[dict[str, Any]]) -> list[Segment]:
    """Which operator of a thread runs when.

    What a collective calls, such as copies, is part of it.

    Args:
        events: Of one thread, by ascending start and, where that is the same, descending duration.
    """
    segments: list[Segment] = []
    stack: list[tuple[float, str]] = []  # ends and operators of the events that have begun
    now = -math.inf

    def advance(until: float) -> None:
        nonlocal now
        while stack:
            end, operator = stack[-1]
            stop = min(end, until)
            if operator and stop > now:
                segments.append(Segment(now, stop, operator))
            now = max(now, stop)
            if end > until:
                return
            stack.pop()
        now = max(now, until)

    for event in events:
        advance(event["ts"])
        outer_end, outer = stack[-1] if stack else (math.inf, "")
        operator = outer if group_of(outer) == COLLECTIVES else operator_of(event) or outer
        stack.append((min(event["ts"] + event["dur"], outer_end), operator))
    advance(math.inf)
    return segments


@dataclass(frozen=True)
class _Trace:
    """The events of a trace that matter, by ascending start and, where that is the same, descending duration."""

    host: list[dict[str, Any]]  # of the main thread
    gloo: list[
        dict[str, Any]
    ]  # collectives, from their start to their end, on whatever thread and across what runs there
    device: list[dict[str, Any]]  # kernels and copies of a GPU
    device_phases: list[dict[str, Any]]  # the optimizer's phases there

    @staticmethod
    def of(events: Iterable[dict[str, Any]]) -> _Trace:
        """Sort the events of a Chrome trace."""
        spans = sorted((e for e in events if e.get("ph") == "X"), key=lambda event: (event["ts"], -event["dur"]))
        main = next(
            (e["pid"], e["tid"]) for e in spans if e.get("cat") == "user_annotation" and e["name"] == Phase.STEP
        )
        on_host = [e for e in spans if e.get("cat") in ("cpu_op", "user_annotation")]
        return _Trace(
            host=[e for e in on_host if (e["pid"], e["tid"]) == main and not e["name"].startswith("gloo:")],
            gloo=[e for e in on_host if e["name"].startswith("gloo:")],
            device=[e for e in spans if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")],
            device_phases=[e for e in spans if e.get("cat") == "gpu_user_annotation" and e["name"] in OPTIMIZER_PHASES],
        )

    def phase(self, *names: str, on_device: bool = False) -> Intervals:
        """When the loop is in one of these phases; on a GPU, when it computes what they started."""
        events = self.device_phases if on_device else self.host
        return merged(_interval(e) for e in events if e["name"] in names and e["cat"] != "cpu_op")

    def segments(self) -> list[Segment]:
        """When which operator runs: kernels on a GPU, operators of the main thread without one; and collectives."""
        of_gloo = [Segment(*_interval(event), event["name"]) for event in self.gloo]
        if self.device:
            return [Segment(*_interval(event), event["name"]) for event in self.device] + of_gloo
        return innermost(self.host) + of_gloo

    def calls(self) -> list[tuple[float, str]]:
        """Start and name of each call of what `segments` has."""
        if self.device:
            return [(event["ts"], event["name"]) for event in self.device + self.gloo]
        host = [(event["ts"], operator_of(event)) for event in self.host]
        return host + [(event["ts"], event["name"]) for event in self.gloo]


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _contains(intervals: Intervals, time: float) -> bool:
    at = bisect_right(intervals, (time, math.inf)) - 1
    return at >= 0 and time < intervals[at][1]


# ---------------------------------------------------------------------------------------------------------------------
# The summary


class OperatorTime(NamedTuple):
    """What one operator takes a step, outside the operators that it calls."""

    name: str
    group: str
    time_ms: float
    calls: float


@dataclass(frozen=True)
class ProfileSummary:
    """Where the time of the profiled steps of one rank went.

    Attributes:
        steps: How many there were.
        step_time_ms: A step's mean time, without evaluation and saving.
        times_ms: Of each of `CATEGORIES`, a step; they sum up to `step_time_ms`.
        operators: Most expensive first.
        groups_ms: Time a step of each kind of operator; collectives also run beside the others.
    """

    steps: int
    step_time_ms: float
    times_ms: dict[str, float]
    operators: list[OperatorTime]
    groups_ms: dict[str, float]

    def row(self) -> dict[str, float]:
        """The metrics."""
        times = {f"profile_{category}_ms": self.times_ms[category] for category in CATEGORIES}
        return {"profile_steps": self.steps, "profile_step_time_ms": self.step_time_ms} | times


def summarize(events: Sequence[dict[str, Any]]) -> ProfileSummary | None:
    """Summarize the events of a Chrome trace; None when it holds no step."""
    if not any(e.get("name") == Phase.STEP and e.get("cat") == "user_annotation" for e in events):
        return None
    trace = _Trace.of(events)
    steps = [_interval(e) for e in trace.host if e["name"] == Phase.STEP]
    # Between the steps, ranks agree on whether to go on. The host leaves the last before a GPU has done all of it.
    end = max([steps[-1][1], *(_interval(e)[1] for e in trace.device)])
    window = difference([(steps[0][0], end)], trace.phase(Phase.EVALUATION, Phase.CHECKPOINT))
    segments = trace.segments()
    functions, communication, operators = _by_kind(segments)
    optimizer = trace.phase(*OPTIMIZER_PHASES, on_device=bool(trace.device))
    times_ms = _divide(
        window,
        {
            "communication_exposed": difference(communication, operators),
            "optimizer": optimizer,
            "compute": merged(operators + functions),
            "data_wait": trace.phase(Phase.DATA),
        },
        len(steps),
    )
    operator_times, groups_ms = _operator_times(segments, trace.calls(), window, optimizer, len(steps))
    return ProfileSummary(
        steps=len(steps),
        step_time_ms=length_us(window) / 1e3 / len(steps),
        times_ms=times_ms,
        operators=operator_times,
        groups_ms=groups_ms,
    )


def _by_kind(segments: Iterable[Segment]) -> tuple[Intervals, Intervals, Intervals]:
    """When functions run outside of operators, when collectives do, and when all other operators."""
    found: dict[str, Intervals] = defaultdict(list)
    for start, end, operator in segments:
        group = group_of(operator)
        found[group if group in (FUNCTIONS, COLLECTIVES) else OTHER].append((start, end))
    return merged(found[FUNCTIONS]), merged(found[COLLECTIVES]), merged(found[OTHER])


def _divide(window: Intervals, claims: dict[str, Intervals], steps: int) -> dict[str, float]:
    """Milliseconds a step of each category: an instant of the window belongs to the first that claims it."""
    left, times_ms = window, {}
    for category, intervals in claims.items():
        times_ms[category] = length_us(intersection(left, intervals)) / 1e3 / steps
        left = difference(left, intervals)
    times_ms["rest"] = length_us(left) / 1e3 / steps
    return {category: times_ms[category] for category in CATEGORIES}


def _operator_times(
    segments: Sequence[Segment], calls: Sequence[tuple[float, str]], window: Intervals, optimizer: Intervals, steps: int
) -> tuple[list[OperatorTime], dict[str, float]]:
    """Operators and their groups. What several streams or messages do at the same time counts once in each."""

    def key(time: float, name: str) -> tuple[str, str]:
        group = group_of(name)
        return name, "optimizer" if group != COLLECTIVES and _contains(optimizer, time) else group

    def time_ms(intervals: Intervals) -> float:
        return length_us(merged(intervals)) / 1e3 / steps

    by_operator: dict[tuple[str, str], Intervals] = defaultdict(list)
    by_group: dict[str, Intervals] = defaultdict(list)
    for start, end, name in segments:
        if _contains(window, start):
            operator = key(start, name)
            by_operator[operator].append((start, end))
            by_group[operator[1]].append((start, end))
    counts = Counter(key(time, name) for time, name in calls if _contains(window, time))
    operators = [OperatorTime(*k, time_ms(found), counts[k] / steps) for k, found in by_operator.items()]
    return (
        sorted(operators, key=lambda operator: -operator.time_ms),
        {group: time_ms(found) for group, found in by_group.items()},
    )


def describe(summaries: dict[int, ProfileSummary], first: int, last: int) -> list[str]:
    """The lines that are printed about steps `first` to `last`.

    Args:
        summaries: By rank; the lowest rank's is told, of the others the extremes.
        first: Number of the first step.
        last: Number of the last step.
    """
    rank = min(summaries)
    summary = summaries[rank]
    total_ms = summary.step_time_ms
    where = f" on rank {rank}, and the range over {len(summaries)} ranks" if len(summaries) > 1 else ""
    lines = [f"profile of steps {first} to {last}: {total_ms:.1f} ms a step{where}"]
    for category in CATEGORIES:
        time_ms, times = summary.times_ms[category], [s.times_ms[category] for s in summaries.values()]
        extremes = f"  {min(times):.1f} to {max(times):.1f}" if len(summaries) > 1 else ""
        lines.append(f"  {LABELS[category]:28} {time_ms:10.1f} ms {time_ms / total_ms:6.1%}{extremes}")
    lines.append("operators by kind, without those they call (collectives: from start to end, beside others too)")
    for group, time_ms in sorted(summary.groups_ms.items(), key=lambda item: -item[1]):
        lines.append(f"  {group:28} {time_ms:10.1f} ms {time_ms / total_ms:6.1%}")
    lines.append("most expensive operators")
    for name, group, time_ms, calls in summary.operators[:MOST_OPERATORS]:
        lines.append(f"  {name[:60]:60} {time_ms:10.1f} ms {time_ms / total_ms:6.1%} {calls:8.0f} calls  {group}")
    return lines
