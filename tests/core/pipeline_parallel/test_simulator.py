import itertools

import numpy as np
import pytest

from megatron.core.pipeline_parallel.schedules import SCHEDULES, compute_actions, stage_ranks
from megatron.core.pipeline_parallel.simulator import Link, StageCosts, step_simulator

CASES = [
    (name, num_ranks, stages_per_rank, num_microbatches)
    for name, rule in SCHEDULES.items()
    for num_ranks, stages_per_rank, num_microbatches in [
        (2, rule.stages_per_rank or 2, 4),
        (4, rule.stages_per_rank or 3, 8),
        (8, rule.stages_per_rank or 4, 32),
    ]
]


def equal_stages(name, num_ranks, stages_per_rank, num_microbatches, **kwargs):
    simulator = step_simulator(name, num_ranks, stages_per_rank, num_microbatches)
    return simulator.timeline(StageCosts.from_forward([1.0] * num_ranks * stages_per_rank), **kwargs)


@pytest.mark.parametrize("name, num_ranks, stages_per_rank, num_microbatches", CASES)
def test_idle_time_of_equal_stages_has_the_published_closed_form(name, num_ranks, stages_per_rank, num_microbatches):
    """With F = 1, B = 2, W = 1 for a stage, idle time is P - 1 times this:

    GPipe, 1F1B, interleaved (whose stages are smaller): F + B; zero-bubble: F; DualPipeV: F&B + B - 3 W.
    """
    timeline = equal_stages(name, num_ranks, stages_per_rank, num_microbatches)
    work = 3 * stages_per_rank * num_microbatches
    idle = {"zbv": 1, "interleaved-zb": 1, "dualpipev": 3 + 2 - 3}.get(name, 3)
    assert timeline.makespan == work + idle * (num_ranks - 1)
    assert timeline.busy_fraction == pytest.approx(work / timeline.makespan)


def test_activations_in_flight():
    assert equal_stages("gpipe", 4, 1, 8).peaks_in_flight == (8, 8, 8, 8)
    assert equal_stages("1f1b", 4, 1, 8).peaks_in_flight == (4, 3, 2, 1)
    # Never more than 1F1B's first rank: 2 P stages of half the size.
    assert equal_stages("zbv", 4, 2, 16).peaks_in_flight == (8, 8, 8, 8)
    sizes = [3.0, 5.0]
    timeline = equal_stages("1f1b", 2, 1, 4, activation_sizes=sizes)
    assert timeline.peaks_in_flight == (6.0, 5.0)
    for rank in range(2):
        assert timeline.in_flight(rank)[-1] == (timeline.actions[rank][-1].end, 0.0)


def test_weights_wait_for_their_activations():
    timeline = equal_stages("interleaved-zb", 2, 2, 4)
    held = dict.fromkeys(range(4), 0)
    for timed in timeline.actions[1]:
        held[timed.action.stage] += {"F": 1, "W": -1}.get(timed.action.kind, 0)
    assert held[1] == held[3] == 0
    assert max(amount for _, amount in timeline.in_flight(1)) > 2


def one_at_a_time(name, num_ranks, stages_per_rank, num_microbatches, costs, transfer_times):
    """The same simulation, written as directly as it can be: ends of all actions."""
    actions = compute_actions(name, num_ranks, stages_per_rank, num_microbatches)
    ranks = stage_ranks(name, num_ranks, stages_per_rank)
    num_stages = len(ranks)
    forward, backward_input, backward_weight = costs.forward, costs.backward_input, costs.backward_weight
    cost = {"F": forward, "B": backward_input + backward_weight, "I": backward_input, "W": backward_weight}
    ends, leaves, free, todo = {}, {}, [0.0] * num_ranks, [list(rank) for rank in actions]
    held = [[] for _ in actions]
    while any(todo):
        for rank, rest in enumerate(todo):
            if not rest:
                continue
            action = rest[0]
            s, m = action.stage, action.microbatch
            if action.kind == "W" or (action.kind == "F" and s == 0):
                arrival = 0.0
            else:
                last = action.kind != "F" and s == num_stages - 1
                way, source = ("F", s - 1) if action.kind == "F" else ("F", s) if last else ("B", s + 1)
                if ranks[source] == rank:
                    arrival = ends.get((way, source, m))
                else:
                    arrival = leaves.get((way, source, m))
                    arrival = None if arrival is None else arrival + transfer_times[min(s, source)]
            if arrival is None:
                continue
            rest.pop(0)
            free[rank] = max(free[rank], arrival) + cost[action.kind][s]
            kind = "B" if action.kind == "I" else action.kind
            ends[kind, s, m] = free[rank]
            held[rank].append((kind, s, m))
            if not action.held:
                leaves |= dict.fromkeys(held[rank], free[rank])
                held[rank].clear()
    return max(ends.values())


@pytest.mark.parametrize("name, num_ranks, stages_per_rank, num_microbatches", CASES)
def test_unequal_stages_and_slow_links_against_a_direct_simulation(
    name, num_ranks, stages_per_rank, num_microbatches
):  # fmt: skip
    generator = np.random.default_rng(0)
    num_stages = num_ranks * stages_per_rank
    simulator = step_simulator(name, num_ranks, stages_per_rank, num_microbatches)
    tables, expected = [], []
    transfer_times = generator.uniform(0.0, 0.3, num_stages - 1)
    for _ in range(2):
        costs = StageCosts(*generator.uniform(0.2, 2.0, (3, num_stages)))
        tables.append(costs.table())
        expected.append(one_at_a_time(name, num_ranks, stages_per_rank, num_microbatches, costs, transfer_times))
        timeline = simulator.timeline(costs, transfer_times)
        assert timeline.makespan == pytest.approx(expected[-1])
        for actions in timeline.actions:
            assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(actions))
    # Several candidates are timed together.
    assert simulator.makespans(np.array(tables).T, transfer_times) == pytest.approx(expected)


def test_transfers_cost_nothing_on_one_rank():
    # Stages 1 and 2 of a V are on the last rank: the two messages of a microbatch cross one link, each way.
    slow = equal_stages("zbv", 2, 2, 1, transfer_times=[10.0, 1000.0, 10.0])
    assert slow.makespan - equal_stages("zbv", 2, 2, 1).makespan == pytest.approx(40.0)


def test_link():
    assert Link().seconds(1e9) == 0.0
    assert Link(latency_s=1e-5, bytes_per_s=1e9).seconds(2e6) == pytest.approx(2.01e-3)
