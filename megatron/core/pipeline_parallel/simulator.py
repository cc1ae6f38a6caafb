"""Simulation of a step of a pipeline: when each rank does what, how long it is idle, how much it holds.

It takes the actions that the schedule executes and the cost of each stage, in any unit (seconds, operations). An action
starts when the one before it on its rank has ended and its input is there; a result that goes to another rank arrives
some time after it was sent. Contention between transfers is not modelled.

P pipeline ranks, v stages on each, S = P v stages, M microbatches, N actions, C candidates that are timed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.core.pipeline_parallel.schedules import Action, Kind, compute_actions, stage_ranks

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class StageCosts:
    """What each stage costs for one microbatch, all in one unit.

    Attributes:
        forward: Forward pass, `[S]`.
        backward_input: Gradients of the input, `[S]`.
        backward_weight: Gradients of the weights, `[S]`. A backward pass that is not split costs the sum of the two.
    """

    forward: Floats
    backward_input: Floats
    backward_weight: Floats

    @classmethod
    def from_forward(
        cls,
        forward: Sequence[float] | Floats,
        backward_input: float = 1.0,
        backward_weight: float = 1.0,
        *,
        head: float = 0.0,
    ) -> StageCosts:
        """Backward costs as multiples of forward costs: the backward of a matrix product is two of the same size.

        `head` is what a head with its loss adds to the last of `forward`, `[S]` or `[S, C]`. Its gradients are computed
        in its forward pass, which costs three times as much, and nothing in the backward pass.
        """
        layers = np.array(forward, dtype=np.float64)
        layers[-1] -= head
        costs = layers.copy()
        costs[-1] += 3.0 * head
        return cls(costs, backward_input * layers, backward_weight * layers)

    def table(self) -> Floats:
        """Costs by kind of action and stage, in the order of `_KINDS`: `[4 S]`, or `[4 S, C]` of costs `[S, C]`."""
        return np.concatenate(
            [self.forward, self.backward_input + self.backward_weight, self.backward_input, self.backward_weight]
        )


_KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


@dataclass(frozen=True)
class Link:
    """How fast ranks send to each other."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    def seconds(self, num_bytes: float) -> float:
        """Time from the end of the work whose result is sent to its arrival."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class TimedAction:
    """An action with its times, in the unit of the costs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes:
        actions: What each rank does, in order, `[P][...]`.
        activation_sizes: What a stage holds of one microbatch from its forward pass to the end of its backward pass
            (that of the weights, where it is split), in any unit, `[S]`.
    """

    actions: tuple[tuple[TimedAction, ...], ...]
    activation_sizes: tuple[float, ...]

    @cached_property
    def makespan(self) -> float:
        """Time of the step."""
        return max(timed.end for rank in self.actions for timed in rank)

    @cached_property
    def busy_fractions(self) -> tuple[float, ...]:
        """Share of the step that each rank works."""
        return tuple(sum(timed.end - timed.start for timed in rank) / self.makespan for rank in self.actions)

    @property
    def busy_fraction(self) -> float:
        """Share of the step that ranks work, on average: all work / (P x makespan)."""
        return sum(self.busy_fractions) / len(self.busy_fractions)

    def in_flight(self, rank: int) -> list[tuple[float, float]]:
        """(time, activations held from then on) of a rank, whenever that changes."""
        held, changes = 0.0, []
        for timed in self.actions[rank]:
            size = self.activation_sizes[timed.action.stage]
            if timed.action.kind == "F":
                held += size
                changes.append((timed.start, held))
            elif timed.action.kind in "BW":
                held -= size
                changes.append((timed.end, held))
        return changes

    @cached_property
    def peaks_in_flight(self) -> tuple[float, ...]:
        """The most activations that each rank holds at a time, in the unit of `activation_sizes`."""
        return tuple(max(held for _, held in self.in_flight(rank)) for rank in range(len(self.actions)))


class _Result(NamedTuple):
    """What a pass over a stage passes on: activations forward, gradients backward."""

    forward: bool
    stage: int
    microbatch: int


def _source(action: Action, num_stages: int) -> _Result | None:
    """The result that an action waits for, besides the action before it on its rank."""
    if action.kind == "F":
        return _Result(True, action.stage - 1, action.microbatch) if action.stage else None
    if action.kind == "W":
        return None  # follows the backward pass of the input, on its own rank
    if action.stage == num_stages - 1:
        return _Result(True, action.stage, action.microbatch)
    return _Result(False, action.stage + 1, action.microbatch)


class StepSimulator:
    """The actions of a schedule, arranged so that many candidate costs are timed at once.

    Which action waits for which does not depend on costs. So actions are put into levels, each waiting only for lower
    ones, and a level is timed for all candidates in a few array operations.
    """

    def __init__(self, actions: Sequence[Sequence[Action]], ranks: Sequence[int]) -> None:
        """`actions` of each rank, in order, `[P][...]`; the rank of each stage, `[S]`."""
        self.num_stages = len(ranks)
        self.order: list[tuple[Action, int]] = []  # every action with its rank; an action comes after what it waits for
        self._levels: list[tuple[slice, Indices, Indices, Indices, Indices]] = []
        done: dict[_Result, int] = {}  # where each result is computed; position 0 is the start of the step
        sent: dict[_Result, int] = {}  # after which action each result leaves its rank
        waiting: list[list[_Result]] = [[] for _ in actions]
        last, next_index = [0] * len(actions), [0] * len(actions)
        while any(index < len(rank) for index, rank in zip(next_index, actions, strict=True)):
            level = []
            for rank, index in enumerate(next_index):
                if index < len(actions[rank]):
                    action = actions[rank][index]
                    source = _source(action, self.num_stages)
                    remote = source is not None and ranks[source.stage] != rank
                    position = 0 if source is None else (sent if remote else done).get(source)
                    if position is not None:
                        level.append((rank, action, position, remote))
            assert level, "the schedule's actions wait for each other"
            start = len(self.order) + 1
            for rank, action, _, _ in level:
                self.order.append((action, rank))
                result = _Result(action.kind == "F", action.stage, action.microbatch)
                if action.kind != "W":
                    done[result] = len(self.order)
                    waiting[rank].append(result)
                if not action.held:
                    sent |= dict.fromkeys(waiting[rank], len(self.order))
                    waiting[rank].clear()
            rows = [
                (
                    last[rank],
                    position,
                    # Boundary s lies between stages s and s + 1; S - 1 stands for no transfer.
                    (action.stage - (action.kind == "F")) if remote else self.num_stages - 1,
                    _KINDS.index(action.kind) * self.num_stages + action.stage,
                )
                for rank, action, position, remote in level
            ]
            for position, (rank, *_) in enumerate(level, start):
                last[rank] = position
                next_index[rank] += 1
            self._levels.append((slice(start, start + len(level)), *np.array(rows, dtype=np.intp).T))

    def end_times(self, costs: Floats, transfer_times: Floats | None = None) -> Floats:
        """When each action ends, `[N + 1, C]`: row 0 is the start, row i + 1 is `order[i]`.

        Args:
            costs: Tables of `StageCosts`, `[4 S, C]`.
            transfer_times: Of a message between stages s and s + 1 on different ranks, either way, `[S - 1]`.
        """
        ends = np.zeros((len(self.order) + 1, costs.shape[1]))
        delays = None if transfer_times is None else np.append(transfer_times, 0.0)[:, None]
        for level, before, inputs, transfers, cost in self._levels:
            ready = ends[inputs] if delays is None else ends[inputs] + delays[transfers]
            ends[level] = np.maximum(ready, ends[before]) + costs[cost]
        return ends

    def makespans(self, costs: Floats, transfer_times: Floats | None = None) -> Floats:
        """Time of the step for each candidate, `[C]`; arguments as for `end_times`."""
        makespans: Floats = self.end_times(costs, transfer_times).max(axis=0)
        return makespans

    def timeline(
        self,
        costs: StageCosts,
        transfer_times: Sequence[float] | None = None,
        activation_sizes: Sequence[float] | None = None,
    ) -> Timeline:
        """The step in full, for one set of costs; activations count 1 a stage and microbatch unless sizes are given."""
        table = costs.table()
        ends = self.end_times(table[:, None], None if transfer_times is None else np.asarray(transfer_times))[1:, 0]
        num_ranks = 1 + max(rank for _, rank in self.order)
        timed: list[list[TimedAction]] = [[] for _ in range(num_ranks)]
        for (action, rank), end in zip(self.order, ends.tolist(), strict=True):
            cost = float(table[_KINDS.index(action.kind) * self.num_stages + action.stage])
            timed[rank].append(TimedAction(action, end - cost, end))
        sizes = [1.0] * self.num_stages if activation_sizes is None else activation_sizes
        return Timeline(tuple(map(tuple, timed)), tuple(sizes))


@lru_cache(maxsize=32)
def step_simulator(name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> StepSimulator:
    """The simulator of one of `SCHEDULES`; `UserError` when it cannot run with these numbers."""
    actions = compute_actions(name, num_ranks, stages_per_rank, num_microbatches)
    return StepSimulator(actions, stage_ranks(name, num_ranks, stages_per_rank))
