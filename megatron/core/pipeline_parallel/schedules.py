"""The pipeline schedules: what each needs, where it puts the stages, and the actions that each rank executes.

The schedules are those of `torch.distributed.pipelining`. This is the one place that knows their classes, and the
action lists are taken from those very classes, so that what is simulated is what runs.

P pipeline ranks, v stages on each of them, S = P v stages, M microbatches a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from megatron.core.errors import UserError

Kind = Literal["F", "B", "I", "W"]  # forward, full backward, backward of the input, backward of the weights


@dataclass(frozen=True)
class ScheduleRule:
    """What a schedule asks for.

    Attributes:
        torch_class: Name of the class in `torch.distributed.pipelining.schedules`.
        stages_per_rank: Number of stages that each rank has to hold; None for any number from 2.
        placement: Rank of stage s: "loop" is s mod P; "v" goes down the ranks and back up, r and 2P-1-r on rank r.
        splits_backward: Whether gradients of inputs and of weights are computed apart.
        summary: What it is, for tables and help.
    """

    torch_class: str
    stages_per_rank: int | None
    placement: Literal["loop", "v"]
    splits_backward: bool
    summary: str


SCHEDULES: dict[str, ScheduleRule] = {
    "1f1b": ScheduleRule("Schedule1F1B", 1, "loop", False, "one forward, one backward, in turn"),
    "gpipe": ScheduleRule("ScheduleGPipe", 1, "loop", False, "all forwards, then all backwards"),
    "interleaved": ScheduleRule("ScheduleInterleaved1F1B", None, "loop", False, "1F1B over several stages a rank"),
    "zbv": ScheduleRule("ScheduleZBVZeroBubble", 2, "v", True, "backward split in two, two stages a rank in a V"),
    "interleaved-zb": ScheduleRule(
        "ScheduleInterleavedZeroBubble", None, "loop", True, "interleaved with the backward split in two"
    ),
    "dualpipev": ScheduleRule("ScheduleDualPipeV", 2, "v", True, "a forward and a backward joined, in a V"),
}  # simplest first


class Action(NamedTuple):
    """One piece of work of a rank.

    Attributes:
        stage: Stage, 0 to S-1.
        kind: What is computed.
        microbatch: Microbatch, 0 to M-1.
        held: Whether the result leaves the rank only after the next action (a joined forward and backward).
    """

    stage: int
    kind: Kind
    microbatch: int
    held: bool = False


def stage_ranks(name: str, num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The rank of each stage, `[S]`."""
    num_stages = num_ranks * stages_per_rank
    if SCHEDULES[name].placement == "loop":
        return tuple(stage % num_ranks for stage in range(num_stages))
    assert stages_per_rank == 2
    return tuple(min(stage, num_stages - 1 - stage) for stage in range(num_stages))


def check_schedule(name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> None:
    """Raise `UserError` when the schedule cannot run with these numbers."""
    needed = SCHEDULES[name].stages_per_rank
    if needed is not None and stages_per_rank != needed:
        raise UserError(
            f"--pipeline-schedule {name} has exactly {needed} stage{'s' * (needed > 1)} on each rank, not "
            f"{stages_per_rank}; change --num-virtual-stages-per-pipeline-rank (or --pipeline-layout) or the schedule"
        )
    if needed is None and stages_per_rank < 2:
        raise UserError(
            f"--pipeline-schedule {name} needs at least 2 stages on each rank, not {stages_per_rank}; "
            "raise --num-virtual-stages-per-pipeline-rank or use 1f1b"
        )
    least = {"1f1b": num_ranks, "dualpipev": 2 * num_ranks}.get(name, 1)
    if num_microbatches < least:
        raise UserError(
            f"--pipeline-schedule {name} needs at least {least} microbatches a step on {num_ranks} pipeline ranks, not "
            f"{num_microbatches}; raise --global-batch-size, or use --pipeline-schedule auto"
        )
    rounds = max(1, num_microbatches // num_ranks)
    if needed is None and num_microbatches % rounds:
        raise UserError(
            f"--pipeline-schedule {name} cannot divide {num_microbatches} microbatches a step into {rounds} equal "
            f"rounds over {num_ranks} pipeline ranks; choose --global-batch-size such that they are a multiple of "
            f"{num_ranks}"
        )


def build_schedule(
    name: str, stages: Sequence[Any], num_microbatches: int, loss_fn: Callable[..., Any] | None = None
) -> Any:
    """torch's schedule over the stages of this rank; losses and gradients are sums, never divided.

    Args:
        name: A key of `SCHEDULES`.
        stages: This rank's `PipelineStage`s, in ascending order.
        num_microbatches: Microbatches a step.
        loss_fn: Loss of a microbatch from the last stage's output and its target; None runs forward passes only.
    """
    from torch.distributed.pipelining import schedules

    rule = SCHEDULES[name]
    schedule_class = getattr(schedules, rule.torch_class)
    stages_or_stage = stages[0] if rule.stages_per_rank == 1 else list(stages)
    return schedule_class(stages_or_stage, num_microbatches, loss_fn=loss_fn, scale_grads=False)


@lru_cache(maxsize=64)
def compute_actions(
    name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """What each rank computes in a step, in order, read from torch's schedule; `[P][actions]`.

    Raises:
        UserError: The schedule cannot run with these numbers.
    """
    check_schedule(name, num_ranks, stages_per_rank, num_microbatches)
    ranks = stage_ranks(name, num_ranks, stages_per_rank)
    by_rank = [[s for s, rank in enumerate(ranks) if rank == r] for r in range(num_ranks)]
    if SCHEDULES[name].stages_per_rank == 1:
        return tuple(_executed(name, stage, num_ranks, num_microbatches) for (stage,) in by_rank)
    # Each rank's schedule object holds the lists of all ranks.
    stages = [_StandInStage(s, 0, num_ranks, len(ranks)) for s in by_rank[0]]
    order = build_schedule(name, stages, num_microbatches, loss_fn=_no_loss).pipeline_order
    return tuple(tuple(_flatten(order[rank])) for rank in range(num_ranks))


def _flatten(torch_actions: Sequence[Any]) -> list[Action]:
    """torch's actions without the idle steps, which only pad its tables, and with joined actions as two in a row."""
    actions = []
    for entry in torch_actions:
        if entry is None:
            continue
        parts = entry.sub_actions or (entry,)
        for part in parts:
            kind = part.computation_type.value
            actions.append(Action(part.stage_index, kind, part.microbatch_index, held=part is not parts[-1]))
    return actions


class _StandInStage:
    """As much of a `PipelineStage` as a schedule looks at when it makes its action lists."""

    submod = None

    def __init__(self, stage_index: int, rank: int, num_ranks: int, num_stages: int) -> None:
        self.stage_index = stage_index
        self.group_rank = rank
        self.group_size = num_ranks
        self.num_stages = num_stages
        self.is_first = stage_index == 0
        self.is_last = stage_index == num_stages - 1
        self.stage_index_to_group_rank: dict[int, int] = {}


class _RecordingStage(_StandInStage):
    """A stage that computes nothing and writes down what it is told to."""

    def __init__(self, stage_index: int, num_ranks: int) -> None:
        super().__init__(stage_index, stage_index, num_ranks, num_ranks)
        self.actions: list[Action] = []

    def no_transfers(self, microbatch: int) -> list[Any]:
        """Nothing is sent or received."""
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_transfers

    def forward_one_chunk(self, microbatch: int, *_: Any, **__: Any) -> None:
        """Write down a forward pass."""
        self.actions.append(Action(self.stage_index, "F", microbatch))

    def backward_one_chunk(self, microbatch: int, *_: Any, **__: Any) -> None:
        """Write down a backward pass."""
        self.actions.append(Action(self.stage_index, "B", microbatch))

    def perform_reduce_grad(self, factor: int) -> None:
        """Gradients are none of the simulation's concern."""


def _executed(name: str, stage_index: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    """The actions of a schedule with one stage a rank, by letting it run on a stage that records them.

    These schedules are loops, not lists; the lists that torch also gives for them are not what the loops do (that of
    1F1B's last rank starts with microbatch 1).
    """
    stage = _RecordingStage(stage_index, num_ranks)
    schedule = build_schedule(name, [stage], num_microbatches, loss_fn=_no_loss)
    schedule._initialize_stage = lambda *_, **__: None  # it would exchange shapes with the neighbours
    schedule._step_microbatches(target_mbs=[None] * num_microbatches, return_outputs=False)
    return tuple(stage.actions)


def _no_loss(output: Any, target: Any) -> None:
    """A loss function for schedules that are only looked at."""
