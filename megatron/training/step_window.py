"""Sums over the steps between two reports."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.parallel_state import ParallelContext


@dataclass(frozen=True)
class StepLoss:
    """One step.

    Attributes:
        iteration: Its number.
        loss: Mean cross-entropy over all ranks.
        sample_ranges: Ids of its samples, as inclusive ranges.
    """

    iteration: int
    loss: float
    sample_ranges: list[tuple[int, int]]


class StepWindow:
    """The steps since the last report. Their losses stay on the device until then."""

    def __init__(self, device: torch.device, counts: bool) -> None:
        self.device = device
        self.counts = counts  # whether this rank's losses and targets go into the sums over all ranks
        self.grad_norm = torch.zeros((), dtype=torch.float64)  # 0-dimensional, on any device
        self.learning_rate = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new window now."""
        self._steps: list[tuple[int, list[tuple[int, int]]]] = []
        self._totals: list[torch.Tensor] = []  # of each step: cross-entropy, z-loss, targets
        self._profiled = 0
        self.data_wait_s = 0.0
        self.start = time.perf_counter()

    @property
    def is_empty(self) -> bool:
        """Whether there has been no step."""
        return not self._steps

    def leave_out(self, seconds: float) -> None:
        """Leave `seconds` of evaluation or saving out of the step time."""
        self.start += seconds

    def add_step(
        self,
        iteration: int,
        sample_ranges: list[tuple[int, int]],
        num_targets: torch.Tensor,
        sums: torch.Tensor,
        profiled: bool = False,
    ) -> None:
        """Add a step.

        Args:
            iteration: Its number.
            sample_ranges: Ids of its samples, as inclusive ranges.
            num_targets: Target tokens on this rank, 0-dimensional.
            sums: Its sums of cross-entropy and z-loss on this rank, `[2]`.
            profiled: Whether a profiler slowed it down.
        """
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        if self.counts:
            totals[:2], totals[2] = sums, num_targets
        self._steps.append((iteration, sample_ranges))
        self._totals.append(totals)
        self._profiled += profiled

    def row(self, context: ParallelContext) -> tuple[dict[str, Any], list[StepLoss]]:
        """What is reported, and the steps one by one; begins the next window. All ranks call it together.

        Losses are means over the window, without steps that are not finite, and over all ranks; gradient norm and rate
        are those of its last step.
        """
        totals = torch.stack(self._totals)  # [steps, 3]
        if context.world_size > 1:
            torch.distributed.all_reduce(totals)
        elapsed_ms = (time.perf_counter() - self.start) * 1e3
        by_step = totals.tolist()
        finite = [sums for sums in by_step if all(map(math.isfinite, sums))]
        cross_entropy, z_loss, targets = (
            (sum(column) for column in zip(*finite, strict=True)) if finite else [math.nan] * 3
        )
        values = {
            "lm_loss": cross_entropy / targets,
            "z_loss": z_loss / targets,
            "grad_norm": self.grad_norm.item(),
            "learning_rate": self.learning_rate,
            "step_time_ms": elapsed_ms / len(by_step),
            "data_wait_ms": self.data_wait_s * 1e3 / len(by_step),
        }
        if self._profiled:
            values["profiled_steps"] = self._profiled
        losses = [
            StepLoss(iteration, sums[0] / sums[2], ranges)
            for (iteration, ranges), sums in zip(self._steps, by_step, strict=True)
        ]
        self.restart()
        return values, losses
