"""Sums over the steps between two reports."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron.core.parallel_state import ParallelContext


class StepWindow:
    """Sums over the steps since the last report."""

    def __init__(self, device: torch.device, counts: bool) -> None:
        self.device = device
        self.counts = counts  # whether this rank's losses and targets go into the sums over all ranks
        self.grad_norm = 0.0
        self.learning_rate = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new window now."""
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # cross-entropy, z-loss, targets
        self.data_wait_s = 0.0
        self.steps = 0
        self.start = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Leave `seconds` of evaluation or saving out of the step time."""
        self.start += seconds

    def begin_step(self, num_targets: torch.Tensor) -> None:
        """Count a step and this rank's target tokens in it; stays on the device."""
        self.steps += 1
        if self.counts:
            self.totals[2] += num_targets

    def add_losses(self, sums: torch.Tensor) -> None:
        """Add a step's sums of cross-entropy and z-loss, `[2]`; stays on the device."""
        if self.counts:
            self.totals[:2] += sums

    def row(self, context: ParallelContext) -> dict[str, Any]:
        """Means over the window (gradient norm and rate: of its last step) and all ranks; begins the next window."""
        if context.world_size > 1:
            torch.distributed.all_reduce(self.totals)
        cross_entropy, z_loss, targets = self.totals.tolist()
        elapsed_ms = (time.perf_counter() - self.start) * 1e3
        values = {
            "lm_loss": cross_entropy / targets,
            "z_loss": z_loss / targets,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "step_time_ms": elapsed_ms / self.steps,
            "data_wait_ms": self.data_wait_s * 1e3 / self.steps,
        }
        self.restart()
        return values
