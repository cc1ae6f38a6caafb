import itertools

import pytest
from torch.distributed.pipelining.schedules import get_schedule_class

from megatron.core.errors import UserError
from megatron.core.pipeline_parallel.schedules import (
    SCHEDULES,
    Action,
    build_schedule,
    check_schedule,
    compute_actions,
    stage_ranks,
)

NAMES_IN_TORCH = {
    "interleaved": "Interleaved1F1B",
    "interleaved-zb": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


class Stage:
    """What torch's schedules read of a stage; `rank` 0 of `num_ranks`, without a process group."""

    submod = None

    def __init__(self, index, num_stages, rank, num_ranks):
        self.stage_index, self.num_stages = index, num_stages
        self.group_rank, self.group_size = rank, num_ranks
        self.is_first, self.is_last = index == 0, index == num_stages - 1


def torch_schedule(name, num_ranks, stages_per_rank, num_microbatches, rank=0):
    """torch's own object, made without our code."""
    num_stages = num_ranks * stages_per_rank
    indices = [s for s, r in enumerate(stage_ranks(name, num_ranks, stages_per_rank)) if r == rank]
    stages = [Stage(index, num_stages, rank, num_ranks) for index in indices]
    return get_schedule_class(NAMES_IN_TORCH[name])(stages, num_microbatches, loss_fn=lambda *_: None)


def stages_per_rank_of(name):
    fixed = SCHEDULES[name].stages_per_rank
    return [fixed] if fixed else [2, 3]


@pytest.mark.parametrize("name", NAMES_IN_TORCH)
@pytest.mark.parametrize("num_ranks, num_microbatches", [(2, 4), (4, 8)])
def test_action_lists_are_those_of_torchs_schedule_objects(name, num_ranks, num_microbatches):
    for stages_per_rank in stages_per_rank_of(name):
        ours = compute_actions(name, num_ranks, stages_per_rank, num_microbatches)
        for rank in range(num_ranks):
            schedule = torch_schedule(name, num_ranks, stages_per_rank, num_microbatches, rank)
            # What the rank executes, with the communication that torch added to it.
            executed = []
            for entry in schedule.pipeline_order_with_comms[rank]:
                if entry.is_compute_op:
                    executed += entry.sub_actions or [entry]
            assert [str(action) for action in executed] == [f"{a.stage}{a.kind}{a.microbatch}" for a in ours[rank]]


@pytest.mark.parametrize("name", NAMES_IN_TORCH)
def test_placement_is_torchs(name):
    for num_ranks, stages_per_rank in itertools.product([2, 3, 4], stages_per_rank_of(name)):
        schedule = torch_schedule(name, num_ranks, stages_per_rank, 2 * num_ranks)
        ranks = stage_ranks(name, num_ranks, stages_per_rank)
        assert schedule.stage_index_to_group_rank == dict(enumerate(ranks))


def test_schedules_of_one_stage_execute_what_their_papers_say():
    gpipe = compute_actions("gpipe", 3, 1, 4)
    for rank, actions in enumerate(gpipe):
        assert actions == tuple(Action(rank, kind, m) for kind in "FB" for m in range(4))
    one_f_one_b = compute_actions("1f1b", 3, 1, 4)
    assert ["".join(f"{a.kind}{a.microbatch}" for a in actions) for actions in one_f_one_b] == [
        "F0F1F2B0F3B1B2B3",
        "F0F1B0F2B1F3B2B3",
        "F0B0F1B1F2B2F3B3",
    ]


def test_joined_passes_are_held_until_both_are_done():
    actions = compute_actions("dualpipev", 2, 2, 6)
    held = [(a, b) for rank in actions for a, b in itertools.pairwise(rank) if a.held]
    assert held and all((a.kind, b.kind, b.held) == ("F", "B", False) for a, b in held)
    for name in ("zbv", "interleaved-zb"):
        assert not any(action.held for rank in compute_actions(name, 2, 2, 6) for action in rank)


@pytest.mark.parametrize("name", NAMES_IN_TORCH)
def test_microbatch_counts_are_refused_exactly_where_torch_refuses_them(name):
    for num_ranks, num_microbatches in itertools.product([2, 3, 4], range(1, 14)):
        stages_per_rank = stages_per_rank_of(name)[0]
        try:
            torch_schedule(name, num_ranks, stages_per_rank, num_microbatches)
        except ValueError:
            with pytest.raises(UserError, match=f"^--pipeline-schedule {name} [^\n]*microbatches[^\n]*$"):
                check_schedule(name, num_ranks, stages_per_rank, num_microbatches)
        else:
            check_schedule(name, num_ranks, stages_per_rank, num_microbatches)


def test_1f1b_needs_a_microbatch_a_rank():
    with pytest.raises(UserError, match="needs at least 4 microbatches a step on 4 pipeline ranks, not 3"):
        check_schedule("1f1b", 4, 1, 3)
    check_schedule("gpipe", 4, 1, 1)


@pytest.mark.parametrize(
    "name, stages_per_rank", [("1f1b", 2), ("gpipe", 3), ("interleaved", 1), ("zbv", 1), ("zbv", 3)]
)
def test_numbers_of_stages_are_refused(name, stages_per_rank):
    with pytest.raises(
        UserError, match=f"^--pipeline-schedule {name} [^\n]* stages? on each rank, not {stages_per_rank}"
    ):
        check_schedule(name, 4, stages_per_rank, 8)


def test_gradients_are_not_divided_by_the_number_of_microbatches():
    for name in SCHEDULES:
        ranks = stage_ranks(name, 2, stages_per_rank_of(name)[0])
        stages = [Stage(index, len(ranks), 0, 2) for index, rank in enumerate(ranks) if rank == 0]
        assert build_schedule(name, stages, 4).scale_grads is False
