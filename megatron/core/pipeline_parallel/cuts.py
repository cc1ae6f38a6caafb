"""Where to cut a list of units into stages, so that the simulated step of a schedule is short.

What has to be balanced is the work of the ranks, over time, not of the stages; so the simulator judges every candidate.
The search is deterministic on every machine: the amount of work is fixed, and costs are whole numbers, of which floats
hold all sums exactly.

U units, S stages, C candidates. Cuts `[S + 1]` are the units at which the stages start, and U: stage i holds the units
`cuts[i]` to `cuts[i + 1] - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.core.pipeline_parallel.simulator import Floats, StageCosts, StepSimulator

Cuts = NDArray[np.int64]

_TIMED_TOGETHER = 256  # candidates; more of them fall out of the processor's caches
_STARTS = 6  # that are improved, out of those given
_BEAM = 2  # candidates whose neighbours are looked at in each round
_PATIENCE = 3  # rounds without an improvement after which a start is given up
_BUDGET = 200_000_000  # timed actions, about 2 seconds


def even_cuts(costs: Sequence[int], num_stages: int) -> Cuts:
    """Cuts into stages of about equal cost, none of them empty, `[S + 1]`."""
    num_units = len(costs)
    assert num_units >= num_stages
    starts = np.concatenate([[0], np.cumsum(costs)])  # [U + 1]
    targets = starts[-1] * np.arange(num_stages + 1) / num_stages
    cuts = np.abs(starts[:, None] - targets).argmin(axis=0)
    steps = np.arange(num_stages + 1)
    cuts = np.maximum.accumulate(cuts - steps) + steps  # each above the cut before
    return np.minimum(cuts, num_units - steps[::-1]).astype(np.int64)  # and room for those that follow


class CutSearch:
    """Search for the best cuts for one schedule.

    Args:
        simulator: Of the schedule.
        costs: Forward cost of each unit, whole numbers that sum to less than 2**30, `[U]`. The last unit is the head,
            whose gradients are computed in its forward pass.
        backward_input: Gradients of the input in forward passes, 2 when the forward pass is recomputed for them.
            Gradients of the weights cost one forward pass.
        shorter: Simulator of a step of fewer microbatches, for long steps: further microbatches repeat the difference.
        repetitions: How many times, a whole number or not.
    """

    def __init__(
        self,
        simulator: StepSimulator,
        costs: Sequence[int],
        *,
        backward_input: int = 1,
        shorter: StepSimulator | None = None,
        repetitions: float = 0.0,
    ) -> None:
        self.simulator = simulator
        self.shorter = shorter
        self.repetitions = repetitions
        self.backward_input = backward_input
        self.head = costs[-1]
        self.unit_starts = np.concatenate([[0], np.cumsum(costs)]).astype(np.float64)
        self.shifts = _shifts(simulator.num_stages)
        self.remaining = _BUDGET // (len(simulator.order) + (0 if shorter is None else len(shorter.order)))

    def step_times(self, cuts: Cuts) -> Floats:
        """Time of a step with each of the candidates `[C, S + 1]`, in the unit of the costs, `[C]`."""
        times = [self._step_times(cuts[i : i + _TIMED_TOGETHER]) for i in range(0, len(cuts), _TIMED_TOGETHER)]
        return np.concatenate(times)

    def _step_times(self, cuts: Cuts) -> Floats:
        forward = np.diff(self.unit_starts[cuts], axis=1).T  # [S, C]
        table = StageCosts.from_forward(forward, self.backward_input, head=self.head).table()
        times = self.simulator.makespans(table)
        if self.shorter is not None:
            times = times + self.repetitions * (times - self.shorter.makespans(table))
        return times

    def best(self, starts: Sequence[Cuts]) -> tuple[Cuts, float]:
        """The best cuts found from any of `starts`, and the time of a step with them."""
        candidates = np.unique(np.array(starts), axis=0)
        times = self.step_times(candidates)
        found = [self._improve(candidates[i], float(times[i])) for i in np.argsort(times, kind="stable")[:_STARTS]]
        return min(found, key=lambda pair: pair[1])

    def _improve(self, start: Cuts, time: float) -> tuple[Cuts, float]:
        """Beam search from one start, as far as the budget goes."""
        best, best_time = start, time
        beam, beam_times = start[None], np.array([time])
        seen = {start.tobytes()}
        stale = 0
        while stale < _PATIENCE and self.remaining > 0:
            candidates = (beam[:, None] + self.shifts).reshape(-1, len(start))
            candidates = candidates[(np.diff(candidates, axis=1) > 0).all(axis=1)]
            candidates = np.array([row for row in np.unique(candidates, axis=0) if row.tobytes() not in seen])
            if not len(candidates):
                break
            seen.update(row.tobytes() for row in candidates)
            self.remaining -= len(candidates)
            candidates = np.concatenate([beam, candidates])
            times = np.concatenate([beam_times, self.step_times(candidates[len(beam) :])])
            order = np.argsort(times, kind="stable")[:_BEAM]
            beam, beam_times = candidates[order], times[order]
            stale += 1
            if beam_times[0] < best_time:
                best, best_time, stale = beam[0], float(beam_times[0]), 0
        return best, best_time


def _shifts(num_stages: int) -> Cuts:
    """Changes of cuts that move one or two units' worth from a stage to another, across those between, `[K, S + 1]`."""
    shifts = []
    for first in range(1, num_stages):
        for last in range(first, num_stages):
            for step in (1, -1, 2, -2):
                shift = np.zeros(num_stages + 1, dtype=np.int64)
                shift[first : last + 1] = step
                shifts.append(shift)
    return np.array(shifts).reshape(-1, num_stages + 1)
