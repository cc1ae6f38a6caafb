"""Numerical faults: steps that are not finite, losses that jump, steps that do not repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron.core.errors import NumericalError
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ModelParameter, local_tensor

T = TypeVar("T")

# A loss is compared with so many before it, once there are enough of them to tell their deviation.
HISTORY_STEPS = 128
MIN_HISTORY_STEPS = 32
# Deviations are taken to be at least this part of the mean, or a flat curve would raise alarms about nothing.
MIN_RELATIVE_DEVIATION = 0.01
# What a spike enters the history as, in deviations.
SPIKE_COUNTS_AS = 2.0
# So many tensors of a rank are named in a message.
MAX_NAMED = 3

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element: integer type


def _from_all_ranks(value: T, context: ParallelContext) -> list[T]:
    """`value` of every rank; all call it together."""
    values: list[Any] = [value] * context.world_size
    if context.world_size > 1:
        torch.distributed.all_gather_object(values, value, group=context.control_group)
    return values


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are not finite


def describe_nonfinite(parameters: Sequence[ModelParameter], loss_sums: Tensor, context: ParallelContext) -> str:
    """What of a step is not finite and where, in words; the same on all ranks, which call it together.

    Args:
        parameters: What this rank holds, with the gradients of the step.
        loss_sums: The step's losses on this rank.
        context: The layout.
    """
    tensors = [
        p.name
        for p in parameters
        if p.parameter.grad is not None and not bool(local_tensor(p.parameter.grad).isfinite().all())
    ]
    return describe_faults(bool(loss_sums.isfinite().all()), tensors, context)


def describe_faults(loss_is_finite: bool, tensors: Sequence[str], context: ParallelContext) -> str:
    """`describe_nonfinite` of what is known already.

    Args:
        loss_is_finite: Of this rank.
        tensors: Parameters whose gradients on this rank are not finite.
        context: The layout.
    """
    found = _from_all_ranks((not loss_is_finite, list(tensors[:1]), len(tensors)), context)
    faults = []
    if ranks := [rank for rank, (bad_loss, _, _) in enumerate(found) if bad_loss]:
        faults.append(f"loss ({_ranks(ranks)})")
    if ranks := [rank for rank, (_, _, count) in enumerate(found) if count]:
        _, (name,), count = found[ranks[0]]
        more = f" and {count - 1} more" if count > 1 else ""
        faults.append(f"gradient of {name}{more} ({_ranks(ranks)})")
    return " and ".join(faults) or "gradient norm (all gradients are finite)"


class SkipCounter:
    """Counts steps in a row that were skipped because they were not finite, and ends the run when they are too many.

    Args:
        limit: So many in a row are borne.
        consecutive: How many there were right before; a run that continues knows from its checkpoint.

    Attributes:
        consecutive: Skipped steps since the last one that was made.
    """

    def __init__(self, limit: int, consecutive: int = 0) -> None:
        self.limit = limit
        self.consecutive = consecutive

    def made(self) -> None:
        """A step was made."""
        self.consecutive = 0

    def skipped(self, step: int, fault: str) -> None:
        """Step number `step` was skipped because `fault` was not finite; all ranks skip the same steps.

        Raises:
            NumericalError: It is one too many.
        """
        self.consecutive += 1
        if self.consecutive > self.limit:
            raise NumericalError(
                f"steps {step + 1 - self.consecutive} to {step} were not finite, which is more in a row than "
                f"--max-consecutive-skips {self.limit}; in the last one: {fault}. Checkpoints are as they were: "
                "continue with a lower --lr, or leave samples out with --skip-samples"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Losses that jump


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far above those before it.

    Attributes:
        iteration: The step.
        loss: Its mean loss.
        mean: Mean loss of the steps that it is compared with.
        std: Their standard deviation, or the least that is assumed.
        sample_ranges: Ids of its samples, as inclusive ranges.
    """

    iteration: int
    loss: float
    mean: float
    std: float
    sample_ranges: list[tuple[int, int]]

    def row(self) -> dict[str, Any]:
        """What goes into the metrics."""
        return {
            "iteration": self.iteration,
            "loss_spike": self.loss,
            "loss_spike_mean": self.mean,
            "loss_spike_std": self.std,
            "sample_ids": [list(inclusive) for inclusive in self.sample_ranges],
        }

    def __str__(self) -> str:
        samples = " ".join(f"{first}-{last}" for first, last in self.sample_ranges)
        return (
            f"step {self.iteration}: loss {self.loss:.4f} is far above the mean {self.mean:.4f} before it (standard "
            f"deviation {self.std:.4f}), samples {samples}"
        )


class SpikeDetector:
    """Finds steps whose loss is far above those before it.

    The rule: a step is a spike when its mean loss is above `mean + threshold x std` of the last 128 finite losses
    before it. There must be at least 32 of these, and `std` is taken to be at least 1 % of the mean. A spike counts
    among them as one of 2 deviations: it hides no others, and a lasting new level is not reported for ever. What is not
    finite is no spike; such steps are skipped and counted (`SkipCounter`).

    Args:
        threshold: `--loss-spike-threshold`; 0 finds nothing.
        losses: What a detector before this one left off with; all that its decisions depend on.

    Attributes:
        losses: Those that the next loss is compared with, the oldest first.
    """

    def __init__(self, threshold: float, losses: Sequence[float] = ()) -> None:
        self.threshold = threshold
        self.losses = list(losses)

    def check(self, iteration: int, loss: float, sample_ranges: list[tuple[int, int]]) -> Spike | None:
        """Take the mean loss of the next step; steps come in order.

        Args:
            iteration: The step.
            loss: Its mean loss over all ranks.
            sample_ranges: Ids of its samples, as inclusive ranges.
        """
        if not math.isfinite(loss):
            return None
        spike = None
        if self.threshold > 0 and len(self.losses) >= MIN_HISTORY_STEPS:
            mean = math.fsum(self.losses) / len(self.losses)
            variance = math.fsum((past - mean) ** 2 for past in self.losses) / len(self.losses)
            std = max(math.sqrt(variance), MIN_RELATIVE_DEVIATION * mean)
            if loss > mean + self.threshold * std:
                spike = Spike(iteration, loss, mean, std, sample_ranges)
                loss = mean + min(self.threshold, SPIKE_COUNTS_AS) * std
        self.losses = [*self.losses[1 - HISTORY_STEPS :], loss]
        return spike


# ---------------------------------------------------------------------------------------------------------------------
# Steps that do not repeat


def checked_gradients(
    forward_backward: Callable[[], Tensor | None],
    finish: Callable[[], None],
    parameters: Sequence[ModelParameter],
    context: ParallelContext,
    step: int,
) -> Tensor | None:
    """A step's gradients, computed twice and compared bit for bit; all ranks call it together.

    What each rank computed is compared before the sums over ranks, so that a fault is named where it arose, and again
    after them. Some ranks see only results that others have had a part in: under FSDP2, which sums within the backward
    pass, a wrong gradient shows on the rank that keeps that shard, and a wrong activation on all ranks it was sent to.
    Takes twice the time of the passes, and memory for one more set of gradients than usual.

    Args:
        forward_backward: Computes the gradients on this rank, dropout included, from nothing but its arguments;
            returns the sums of the losses on this rank, or None when all ranks gave it up. There are
            no gradients yet when it is called.
        finish: Sums the gradients over the ranks.
        parameters: What this rank holds.
        context: The layout.
        step: Number of the step, for the message.

    Returns:
        What `forward_backward` returned; unless that is None, the parameters have their gradients, as after `finish`.

    Raises:
        NumericalError: Any tensor on any rank differs; on all ranks.
    """
    (sums, first), (second_sums, second) = [(forward_backward(), _take_gradients(parameters)) for _ in range(2)]
    if sums is None or second_sums is None:
        return None
    before = _differences([("loss", sums, second_sums), *_named(parameters, first, second)])
    _set_gradients(parameters, first)
    finish()
    first = _take_gradients(parameters)
    _set_gradients(parameters, second)
    finish()
    after = _differences(_named(parameters, first, [p.parameter.grad for p in parameters]))
    found = _from_all_ranks((before, after), context)
    # Where a rank's own results differ, the sums over ranks differ everywhere and say nothing more.
    for place, where in enumerate(("", " after the sum over ranks")):
        if faults := [f"rank {rank}{where}: {pair[place]}" for rank, pair in enumerate(found) if pair[place]]:
            raise NumericalError(
                f"step {step} was computed twice from the same batch and came out differently: {'; '.join(faults)}. "
                "Check this hardware, or leave --check-determinism-interval out if its kernels are not deterministic"
            )
    return sums


def _take_gradients(parameters: Sequence[ModelParameter]) -> list[Tensor | None]:
    gradients = [p.parameter.grad for p in parameters]
    _set_gradients(parameters, [None] * len(gradients))
    return gradients


def _set_gradients(parameters: Sequence[ModelParameter], gradients: Sequence[Tensor | None]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.parameter.grad = gradient


def _named(
    parameters: Sequence[ModelParameter], first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> list[tuple[str, Tensor | None, Tensor | None]]:
    return [(f"gradient of {p.name}", a, b) for p, a, b in zip(parameters, first, second, strict=True)]


@torch.no_grad()
def _differences(tensors: Sequence[tuple[str, Tensor | None, Tensor | None]]) -> str:
    """Which of the pairs differ, and by how much; empty when none does."""
    found = [text for name, a, b in tensors if (text := _difference(name, a, b))]
    more = [f"and {len(found) - MAX_NAMED} tensors more"] if len(found) > MAX_NAMED else []
    return ", ".join(found[:MAX_NAMED] + more)


def _difference(name: str, first: Tensor | None, second: Tensor | None) -> str:
    if first is None or second is None:
        return "" if first is second else f"{name} (there once only)"
    first, second = local_tensor(first), local_tensor(second)
    bits = _BITS[first.element_size()]  # NaN equals itself that way, and the sign of a zero counts
    differ = first.view(bits) != second.view(bits)
    count = int(differ.sum())
    if count == 0:
        return ""
    largest = (first[differ].double() - second[differ].double()).abs().max()
    return f"{name} ({count} of {first.numel()} elements, by up to {largest:.3g})"
