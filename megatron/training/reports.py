"""What a run tells about its steps: rows for the metrics, lines for the console."""

from __future__ import annotations

from typing import Any

from megatron.core.parallel_state import ParallelContext
from megatron.training.checkpointing import Progress
from megatron.training.config import RunConfig
from megatron.training.console import progress_line, say, warn
from megatron.training.data import TrainingData
from megatron.training.epochs import EpochLog
from megatron.training.metrics import Sink, build_sinks, device_peak_tflops, peak_memory_gib
from megatron.training.numerics import SpikeDetector
from megatron.training.step_window import StepWindow


class Reports:
    """The metrics of a run and where they go.

    Args:
        config: The run.
        data: What it trains on.
        context: All its ranks make one.
        progress: Where the run begins.
        flops_per_sample: Of forward and backward pass.
        global_batch_size: Samples of a step.
        counts_loss: Whether this rank's losses count.

    Attributes:
        window: The steps since the last report.
    """

    def __init__(
        self,
        config: RunConfig,
        data: TrainingData,
        context: ParallelContext,
        progress: Progress,
        flops_per_sample: float,
        global_batch_size: int,
        counts_loss: bool,
    ) -> None:
        self.config, self.data, self.context = config, data, context
        self.flops_per_sample, self.global_batch_size = flops_per_sample, global_batch_size
        self.window = StepWindow(context.device, counts=counts_loss)
        self._spikes = SpikeDetector(config.training.loss_spike_threshold, progress.recent_losses)
        self._epochs = EpochLog(data.train, data.corpora, progress.next_sample)
        self._peak_tflops = device_peak_tflops(context.device, config.logging)
        self._sinks: list[Sink] = []

    def open(self, progress: Progress) -> None:
        """Open what the flags ask for, for a run that continues from `progress`; on the process that writes."""
        self._sinks = build_sinks(
            self.config.logging,
            self.config.checkpoint.save,
            progress.iteration,
            progress.pending_evaluations,
            self.config.to_dict(),
        )

    def write(self, row: dict[str, Any]) -> None:
        """Write one row of metrics."""
        for sink in self._sinks:
            sink.write(row)

    def report(self, progress: Progress, loss_scale: float, total_iterations: int) -> None:
        """Write one row about the steps since the last report; all ranks call it together.

        Spikes among the losses of these steps are written too, and remembered in `progress`.
        """
        values, steps = self.window.row(self.context)
        row = values | {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "skipped_iterations": progress.skipped_iterations,
            "loss_scale": loss_scale,
            "fill_rate": self.data.train.fill_rate,
            "memory_gib": peak_memory_gib(self.context.device),
        }
        steps_per_s = 1e3 / row["step_time_ms"]
        per_device = self.flops_per_sample * self.global_batch_size * steps_per_s / self.context.world_size / 1e12
        row["tokens_per_s"] = steps_per_s * self.global_batch_size * self.data.train.tokens_per_sample
        row["tflops_per_s"] = per_device
        row |= self._epochs.row(progress.next_sample)
        row["mfu"] = None if self._peak_tflops is None else per_device / self._peak_tflops
        self.write(row)
        for step in steps:
            if spike := self._spikes.check(step.iteration, step.loss, step.sample_ranges):
                self.write(spike.row())
                warn(str(spike), self.context.is_main)
        progress.recent_losses = self._spikes.losses
        eta_s = (total_iterations - progress.iteration) / steps_per_s
        say(progress_line(row, total_iterations, eta_s), self.context.is_main)
        if news := self._epochs.news(progress.next_sample):
            say(news, self.context.is_main)

    def close(self) -> None:
        """Flush and release what is open."""
        for sink in self._sinks:
            sink.close()
