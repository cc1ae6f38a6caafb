"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron.core.datasets.loader import Dataset, T5Loader, TensorBatch
from megatron.core.datasets.prefetch import Prefetcher
from megatron.core.datasets.sample_ranges import SampleRanges
from megatron.core.dist_checkpointing import CheckpointError, CheckpointSaver, checkpoint_path
from megatron.core.distributed import gradient_divisor, measure_gradients
from megatron.core.errors import NumericalError, RunError, SaveError, UserError
from megatron.core.huggingface import export_checkpoint, require_exportable, require_replaceable
from megatron.core.models.T5.t5_flops import training_flops_per_sequence
from megatron.core.optimizer import LearningRateSchedule, LossScaler, build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.training.backends import check_packages
from megatron.training.best import BestCheckpoint, best_metric
from megatron.training.checkpointing import (
    Progress,
    mark_finished,
    training_manifest,
    training_tensors,
    unmark_finished,
)
from megatron.training.config import RunConfig
from megatron.training.consistency import check_equal_on_all_ranks
from megatron.training.console import format_duration, say, warn
from megatron.training.data import TrainingData, fit_vocabulary, open_data, prepare_data
from megatron.training.evaluation import Evaluator
from megatron.training.host_memory import keep_freed_memory
from megatron.training.initialize import parallel_context
from megatron.training.model_setup import DistributedModel, plan_stages
from megatron.training.numerics import SkipCounter, checked_gradients, describe_faults, describe_nonfinite
from megatron.training.profile_summary import Phase
from megatron.training.profiling import StepProfiler
from megatron.training.reports import Reports
from megatron.training.starting_point import (
    Scope,
    StartingPoint,
    adopt_settings,
    check_compatible,
    choose_schedule,
    find_starting_point,
    load_starting_point,
)
from megatron.training.step_verdicts import STEPS_LATER, StepVerdicts, decides_by_itself
from megatron.training.stopping import Stop, StopControl
from megatron.training.watchdog import Watchdog


def run_length(config: RunConfig, progress: Progress, global_batch_size: int, windows_per_epoch: int) -> int:
    """Steps of the whole run: as given, or as many as `--train-samples` or one epoch fill (at least one).

    With samples, those that are left count in steps of the present batch size.
    """
    if config.training.train_iters is not None:
        return config.training.train_iters
    samples = config.training.train_samples or windows_per_epoch
    left = max(0, samples - progress.consumed_samples)
    return max(1, progress.iteration + left // global_batch_size)


class Trainer:
    """State and steps of one run."""

    def __init__(
        self,
        config: RunConfig,
        data: TrainingData,
        context: ParallelContext,
        stop: StopControl | None = None,
        start: StartingPoint | None = None,
    ) -> None:
        self.config, self.data, self.context = config, data, context
        self.stop = stop or StopControl(context, config.training)
        self.starting_point = start
        self.watchdog: Watchdog | None = None
        self.description = data.describe()
        check_equal_on_all_ranks(context, {"config": config.to_dict(), **self.description})
        training = config.training
        self.num_microbatches = training.num_microbatches(context.dp_size)
        self.global_batch_size = training.micro_batch_size * context.dp_size * self.num_microbatches
        self.progress = Progress() if start is None else start.progress
        self.skips = SkipCounter(training.max_consecutive_skips, self.progress.consecutive_skips)
        # Mistakes that need no model show before there is one.
        self.warnings = [] if start is None else check_compatible(start, config, self.description)
        self._plan()
        self.profiler = StepProfiler(config.logging, config.checkpoint.save, context)
        if self.profiler.never_begins(self.total_iterations):
            first = self.profiler.first_step
            self.warnings.append(f"--profile-step-start {first} is beyond the last step; nothing will be profiled")
        skipped = SampleRanges.parse(training.skip_samples)
        if late := skipped.too_late(self.progress.next_sample, self.progress.consumed_samples):
            self.warnings.append(late)
        lengths = data.train.encoder_length, data.train.decoder_length
        plan = plan_stages(config, context, *lengths, self.num_microbatches)
        self.model = DistributedModel(config, context, plan, self.num_microbatches)
        self.parameters = self.model.parameters
        synchronize = None if self.model.shared is None else self.model.shared.synchronize
        self.optimizer = build_optimizer(config.optimizer, self.parameters, context, synchronize)
        self.loss_scaler = LossScaler(config.optimizer, enabled=config.compute.fp16)
        self.verdicts: StepVerdicts | None = None  # where the device decides what is skipped
        if decides_by_itself(context.device, needs_to_know=self.loss_scaler.dynamic):
            self.verdicts = StepVerdicts([p.name for p in self.parameters])
        self.train_loader = self._loader(data.train, skipped)
        self.prefetcher = Prefetcher(self.train_loader, context.device)
        flops_per_sample = training_flops_per_sequence(config.model, *lengths)
        self.reports = Reports(
            config, data, context, self.progress, flops_per_sample, self.global_batch_size, self.model.counts_loss
        )
        self.window = self.reports.window
        self.evaluator = Evaluator(config, data, context, self.model, self._loader, lambda: self.stop.poll() != Stop.NO)
        if data.tasks and context.pp_size > 1:
            self.warnings.append(
                "with --pipeline-model-parallel-size above 1 the loss alone is evaluated; score generated targets from "
                "a checkpoint: python tools/generate.py --load ... --evaluate ..."
            )
        metric = best_metric(config, self.evaluator.value_names)
        self.best = None if metric is None else BestCheckpoint(config, metric, context, data.tokenizer)
        # What a run has loaded from elsewhere is new in its own directory; otherwise nothing is new yet.
        elsewhere = start is not None and start.path.parent != Path(config.checkpoint.save or start.path.parent)
        self.saved_iteration = 0 if elsewhere else self.progress.iteration
        if self.best is not None and (not self.best.exists() or elsewhere):
            self.progress.best = {}  # what was the best in another directory is not here
        self.save_failure: CheckpointError | None = None  # of the last save
        self.saver: CheckpointSaver | None = None
        checkpoint = config.checkpoint
        if checkpoint.save is not None:
            self.saver = CheckpointSaver(
                Path(checkpoint.save), context, checkpoint.async_save, checkpoint.keep_last, checkpoint.keep_every
            )

    def _plan(self) -> None:
        """Length of the run and its schedule, from the progress so far."""
        train_samples = self.config.training.train_samples
        windows = self.data.train.windows_per_epoch
        self.total_iterations = run_length(self.config, self.progress, self.global_batch_size, windows)
        # Progress of the schedule is counted in samples when the length of the run is.
        self.schedule = LearningRateSchedule.from_config(
            self.config.optimizer,
            total=train_samples or self.total_iterations,
            unit="iterations" if train_samples is None else "samples",
        )
        if self.starting_point is not None:
            self.schedule, warnings = choose_schedule(self.starting_point, self.schedule, self.config.checkpoint)
            self.warnings += warnings

    def _loader(self, dataset: Dataset, skipped: SampleRanges | None = None) -> T5Loader:
        return T5Loader(
            dataset,
            micro_batch_size=self.config.training.micro_batch_size,
            num_microbatches=self.num_microbatches,
            dp_rank=self.context.dp_rank,
            dp_size=self.context.dp_size,
            skipped=skipped,
        )

    def train_step(self) -> bool:
        """One optimizer step on the next global batch; False when it was given up, with nothing changed."""
        start = time.perf_counter()
        if self.watchdog is not None:
            self.watchdog.step = self.progress.iteration + 1
        first_sample = self.progress.next_sample
        with self.profiler.phase(Phase.DATA):
            batch = self.prefetcher.step_batch(first_sample)
        self.window.data_wait_s += time.perf_counter() - start
        num_targets = (batch.labels >= 0).sum()
        over_ranks = num_targets.clone()
        if self.context.dp_group is not None:
            torch.distributed.all_reduce(over_ranks, group=self.context.dp_group)
        sums = self._gradients(batch, self.loss_scaler.scale / over_ranks)
        if sums is None:
            self.optimizer.zero_grad()
            return False
        ranges = self.train_loader.sample_ranges(first_sample)
        self.window.add_step(self.progress.iteration + 1, ranges, num_targets, sums, self.profiler.is_open)
        self._update(sums)
        return True

    def _gradients(self, batch: TensorBatch, factor: torch.Tensor) -> torch.Tensor | None:
        """Compute a step's gradients; returns its loss sums on this rank, or None when it was given up."""
        model, step, interval = self.model, self.progress.iteration + 1, self.config.training.check_determinism_interval

        def forward_backward() -> torch.Tensor | None:
            model.seed_dropout(self.progress.iteration)
            with self.profiler.phase(Phase.FORWARD_BACKWARD):
                return model.forward_backward(batch, factor, lambda: self.stop.poll() == Stop.AT_ONCE)

        def finish_gradients() -> None:
            with self.profiler.phase(Phase.GRADIENT_REDUCTION):
                model.finish_gradients()

        checked = interval is not None and step % interval == 0
        model.overlap_reduction(not checked)  # what each rank computes is compared before it is summed
        if checked:
            return checked_gradients(forward_backward, finish_gradients, self.parameters, self.context, step)
        sums = forward_backward()
        if sums is not None:
            finish_gradients()
        return sums

    def _update(self, loss_sums: torch.Tensor) -> None:
        """Clip, step and advance. A step whose loss or gradient is not finite changes nothing but the counts.

        With `verdicts`, the device sees to that, and nothing here waits for it.
        """
        scale, progress = self.loss_scaler.scale, self.progress
        with self.profiler.phase(Phase.CLIP):
            norm = measure_gradients(self.parameters, self.context, scale, loss_sums)
            self.window.grad_norm = norm.total
            skip = None if self.verdicts is None else norm.total.isfinite().logical_not()
            skipped = skip is None and not math.isfinite(norm.total.item())
        self.window.learning_rate = self.schedule(self._schedule_position())
        if not skipped:
            if self.saver is not None:
                self.saver.wait_for_copies()  # of what the step changes; forward and backward ran beside them
            with self.profiler.phase(Phase.OPTIMIZER):
                divisor = gradient_divisor(norm.total, self.config.optimizer.clip_grad, scale)
                self.optimizer.step(self.window.learning_rate, divisor, skip)
        fault = describe_nonfinite(self.parameters, loss_sums, self.context) if skipped else ""
        self.loss_scaler.update(found_nonfinite=skipped)
        with self.profiler.phase(Phase.OPTIMIZER):
            self.optimizer.zero_grad()
        progress.iteration += 1
        progress.next_sample = self.train_loader.next_sample(progress.next_sample)
        progress.consumed_samples += self.global_batch_size
        progress.consumed_tokens += round(self.global_batch_size * self.data.train.tokens_per_sample)
        if self.verdicts is None:
            self._count(progress.iteration, fault, scale)
        else:
            self.verdicts.add(progress.iteration, norm, loss_sums)
            self._settle(progress.iteration - STEPS_LATER)

    def _count(self, step: int, fault: str, scale: float) -> None:
        """Count a step that was made or, if there is a fault, skipped; steps come in order."""
        if fault:
            scaled = f" (loss scale {scale:g})" if self.config.compute.fp16 else ""
            warn(f"step {step} skipped{scaled}: not finite: {fault}", self.context.is_main)
            self.progress.skipped_iterations += 1
            self.skips.skipped(step, fault)
        else:
            self.skips.made()
        self.progress.consecutive_skips = self.skips.consecutive

    def _settle(self, last_step: int | None = None) -> None:
        """Find out about the steps up to `last_step`, or all, that the device has decided on; all ranks together.

        What is told or saved about the run comes after it, as does what is left out of the time of steps, so that these
        are over. One skip too many is raised when all are counted.
        """
        if self.verdicts is None:
            return
        error: NumericalError | None = None
        for verdict in self.verdicts.take(self.progress.iteration if last_step is None else last_step):
            fault = ""
            if not verdict.is_finite:
                fault = describe_faults(verdict.loss_is_finite, verdict.nonfinite_gradients, self.context)
            try:
                self._count(verdict.step, fault, self.loss_scaler.scale)
            except NumericalError as raised:
                error = error or raised
        if error is not None:
            raise error

    def _schedule_position(self) -> int:
        """The schedule's argument for the step being made: its number, or the samples consumed by its end."""
        if self.schedule.unit == "iterations":
            return self.progress.iteration + 1
        return self.progress.consumed_samples + self.global_batch_size

    def train(self) -> int:
        """Run to the end, or to where it is to stop, reporting, evaluating and saving on the way.

        Returns:
            The exit status: 0, or 128 + n when signal n ended a run that saves nothing.

        Raises:
            NumericalError: Too many steps in a row were not finite, or one did not repeat.
            SaveError: A checkpoint could not be saved.
        """
        self.window.restart()
        if self.progress.pending_evaluations:
            self._evaluate(self.progress.pending_evaluations)
            self.save()
        elif self.progress.iteration >= self.total_iterations:
            say(f"nothing left to do: {self.progress.iteration} steps are done", self.context.is_main)
        try:
            while self.progress.iteration < self.total_iterations and not self.stop.poll():
                self._profile_from(self.progress.iteration + 1)
                with self.profiler.phase(Phase.STEP):
                    if self.train_step():
                        self._after_step()
                if self.profiler.ends_with(self.progress.iteration):
                    self._end_profile()
            self._settle()
        except NumericalError:  # all ranks raise it together
            with suppress(NumericalError):
                self._settle()
            if self.profiler.is_open:
                self._end_profile()
            if not self.window.is_empty:
                self.report()  # the rows that show how it came to this
            raise
        return self._leave()

    def _profile_from(self, step: int) -> None:
        """Record this step and those that follow, if it is the first that is to be."""
        if step == self.profiler.first_step:
            self._settle()
        start = time.perf_counter()
        self.profiler.before_step(step)
        self.window.leave_out(time.perf_counter() - start)

    def _end_profile(self) -> None:
        """Write what the profiled steps took."""
        self._settle()
        start = time.perf_counter()
        if row := self.profiler.finish(self.progress.iteration):
            self.reports.write({"iteration": self.progress.iteration} | row)
        self.window.leave_out(time.perf_counter() - start)

    def _after_step(self) -> None:
        """Report, evaluate and save when it is time to."""
        training, checkpoint = self.config.training, self.config.checkpoint
        step, last = self.progress.iteration, self.progress.iteration == self.total_iterations
        saving = checkpoint.save is not None and (step % checkpoint.save_interval == 0 or last)
        # A report before each checkpoint, so that the means of a continued run cover the same steps.
        if step % self.config.logging.log_interval == 0 or saving or last:
            self.report()
        # Before the last checkpoint, so that a kill does not lose them.
        if step % training.eval_interval == 0 or last:
            self._evaluate(["validation", "test"] if last else ["validation"])
        if saving:
            with self.profiler.phase(Phase.CHECKPOINT):
                self.save()
        if training.exit_interval is not None and step % training.exit_interval == 0:
            self.stop.request(f"--exit-interval {training.exit_interval}")
        self.stop.check_time()
        self._note_saves()

    def _leave(self) -> int:
        """Save what is not saved and end the run here."""
        progress, save = self.progress, self.config.checkpoint.save
        if self.saver is not None:
            self.saver.wait()
        self._note_saves()  # from here on, all ranks know of the same failures
        if self.profiler.is_open:
            self._end_profile()
        if not self.window.is_empty:
            self.report()
        tries = self.save_failure is None or self.config.checkpoint.on_save_error == "continue"
        if self.saver is not None and tries and progress.iteration != self.saved_iteration:
            self.save()
            self.saver.wait()
            self._note_saves()
        if self.save_failure is not None:
            raise SaveError(f"{self.save_failure}; the run stopped after step {progress.iteration}")
        if progress.iteration >= self.total_iterations and not progress.pending_evaluations:
            if save:
                self._export(Path(save))
            if save and self.context.is_main:
                mark_finished(save, progress)
            return 0
        return stopped(self.stop, progress.iteration, self.config, self.context)

    def _export(self, save: Path) -> None:
        """Write the final weights for transformers, if the run is to."""
        target = self.config.checkpoint.save_hf
        if target is not None:
            source, dtype = checkpoint_path(save, self.progress.iteration), self.config.checkpoint.save_hf_dtype
            self.context.on_main(
                lambda: export_checkpoint(source, Path(target), dtype=getattr(torch, dtype)), patiently_at="export"
            )
            say(f"exported {target} for transformers", self.context.is_main)

    def report(self) -> None:
        """Write one row about the steps since the last report."""
        self._settle()
        with self.profiler.phase(Phase.REPORT):
            self.reports.report(self.progress, self.loss_scaler.scale, self.total_iterations)

    def _evaluate(self, splits: Sequence[str]) -> None:
        """Evaluate on these splits; the progress remembers those that a wish to stop left out."""
        self._settle()  # the wait for the steps so far is part of their time
        start = time.perf_counter()
        with self.profiler.phase(Phase.EVALUATION):
            self.progress.pending_evaluations = [split for split in splits if not self.evaluate(split)]
        self.window.leave_out(time.perf_counter() - start)

    def evaluate(self, split: str) -> bool:
        """Write one row about a held-out split, if there is anything to say; False when it was given up."""
        row: dict[str, Any] = {"iteration": self.progress.iteration}
        for part in (self.evaluator.losses, self.evaluator.scores):
            values = part(split, self.progress.iteration)
            if values is None:
                say(
                    f"{split} at step {self.progress.iteration} given up: it comes when the run goes on",
                    self.context.is_main,
                )
                return False
            row |= values
        if len(row) > 1:
            self.reports.write(row)
        self._keep_best(row)
        return True

    def _keep_best(self, row: dict[str, Any]) -> None:
        """Keep the weights if this evaluation is the best so far."""
        if self.best is None or not self.best.is_better(row, self.progress.best):
            return
        tensors = training_tensors(self.optimizer, owned_only=True)
        try:
            self.progress.best = self.best.save(self.progress.iteration, row, tensors, self._manifest())
        except CheckpointError as error:
            if self.config.checkpoint.on_save_error == "stop":
                raise SaveError(
                    f"{error}; the run stopped in the evaluation of step {self.progress.iteration}"
                ) from None
            warn(f"{error}; training goes on without it", self.context.is_main)

    def save(self) -> None:
        """Save a checkpoint, if the run saves any; with `--async-save`, begin to."""
        if self.saver is None:
            return
        self._settle()
        start = time.perf_counter()
        if self.model.shared is not None:
            self.model.shared.check_equal()
        self.progress.loss_scaler = self.loss_scaler.state
        tensors = training_tensors(self.optimizer, owned_only=True)
        self.saver.save(self.progress.iteration, tensors, self._manifest(), wait_for_copies=False)
        self.saved_iteration = self.progress.iteration
        self._note_saves()
        self.window.leave_out(time.perf_counter() - start)

    def _manifest(self) -> dict[str, Any]:
        manifest = training_manifest(
            self.config, self.progress, self.schedule, self.global_batch_size, self.description
        )
        return manifest if self.starting_point is None else manifest | self.starting_point.origin

    def _note_saves(self) -> None:
        """Report the saves that have ended; after one that failed, ask to stop unless told otherwise."""
        for outcome in self.saver.outcomes() if self.saver is not None else ():
            self.reports.write(
                {
                    "iteration": outcome.iteration,
                    "checkpoint_pause_ms": outcome.pause_seconds * 1e3,
                    "checkpoint_time_ms": outcome.seconds * 1e3,
                    "checkpoint_failed": outcome.error is not None,
                }
            )
            if outcome.error is not None or self.config.checkpoint.on_save_error == "continue":
                self.save_failure = outcome.error
            if outcome.error is None:
                paused = f", a pause of {outcome.pause_seconds:.1f} s" if self.config.checkpoint.async_save else ""
                say(f"saved {outcome.path} in {outcome.seconds:.1f} s{paused}", self.context.is_main)
            elif self.config.checkpoint.on_save_error == "stop":
                self.stop.request(f"checkpoint of step {outcome.iteration} could not be saved")
            else:
                warn(f"{outcome.error}; training goes on without this checkpoint", self.context.is_main)

    def start(self) -> None:
        """Load the checkpoint that the run starts from, if there is one, and open the reports."""
        if self.starting_point is not None:
            say(self.starting_point.describe(), self.context.is_main)
            self.warnings[:0] = self.starting_point.warnings
        for warning in self.warnings:
            warn(warning, self.context.is_main)
        if self.starting_point is not None:
            load_starting_point(self.starting_point, self.optimizer)
            self.loss_scaler.load_state(self.progress.loss_scaler)
        if self.saver is not None:
            self.saver.prepare(training_tensors(self.optimizer, owned_only=True))
        self.context.on_main(self._open_outputs)

    def _open_outputs(self) -> None:
        """The save directory with its tokenizer, and the reports."""
        save, iteration = self.config.checkpoint.save, self.progress.iteration
        if save:
            try:
                self.data.tokenizer.save(Path(save, "tokenizer"))
                if iteration < self.total_iterations:
                    unmark_finished(save)
            except OSError as error:
                raise UserError(f"--save {save}: {error.strerror}; give a directory that can be written") from None
        self.reports.open(self.progress)

    def describe(self) -> str:
        """One line about what is about to happen."""
        train = self.data.train
        fill = f" ({train.fill_rate:.1%} full)" if train.fill_rate < 1 else ""
        corpora = f" of {len(self.data.corpora):,} corpora" if len(self.data.corpora) > 1 else ""
        return (
            f"{self.model.num_parameters():,} parameters on {self.context.world_size} x {self.context.device.type}"
            f"{self._layout()} | "
            f"{self.total_iterations:,} steps of {self.global_batch_size} samples of "
            f"{train.encoder_length} + {train.decoder_length} tokens{fill} | "
            f"{self.total_iterations * self.global_batch_size / train.windows_per_epoch:.2f} epochs of "
            f"{train.windows_per_epoch:,} samples{corpora}"
        )

    def _layout(self) -> str:
        """How the ranks are used, when there is anything to tell."""
        context = self.context
        sizes = {"tensor": context.tp_size, "pipeline": context.pp_size, "data": context.dp_size}
        layout = " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1)
        return f" ({layout})" if layout else ""

    def close(self, wait: bool = True) -> None:
        """Flush the reports and, with `wait`, let the checkpoint that is being written be finished."""
        self.prefetcher.close()
        if self.saver is not None:
            self.saver.close(wait)
        self.profiler.close()
        self.reports.close()


def stopped(stop: StopControl, iteration: int, config: RunConfig, context: ParallelContext) -> int:
    """Say that a run stops after this step and why; returns its exit status."""
    save = config.checkpoint.save
    how = "the same command continues" if save else "nothing was saved: --save was not given"
    say(f"stopped after step {iteration}: {stop.reason}; {how}", context.is_main)
    return 0 if save or stop.signal_number is None else 128 + stop.signal_number


def pretrain(config: RunConfig, vocab_size_given: bool = False) -> int:
    """Train as configured, in this process or in the process group that torchrun describes.

    Args:
        config: The run.
        vocab_size_given: Keep the configured vocabulary size instead of taking the tokenizer's.

    Returns:
        The exit status: 0 when the run is done, or saved and stopped.
    """
    check_packages(config.compute)
    with parallel_context(config.parallel) as context:
        keep_freed_memory(context.device)
        return pretrain_in(context, config, vocab_size_given)


def pretrain_in(context: ParallelContext, config: RunConfig, vocab_size_given: bool = False) -> int:
    """`pretrain` in a context that exists already."""
    start = time.perf_counter()
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    watchdog = Watchdog(context.store, context.rank, context.world_size, timeout)
    with StopControl(context, config.training) as stop, watchdog:
        if config.checkpoint.save_hf is not None:
            require_exportable(config.model)
            require_replaceable(Path(config.checkpoint.save_hf))
        checkpoint = find_starting_point(config.checkpoint, context)
        prepare_data(config, context, stop)
        if stop.poll():  # it took its time; the loop asks again after making and loading the model
            return stopped(stop, 0 if checkpoint is None else checkpoint.progress.iteration, config, context)
        data = open_data(config)
        if checkpoint is not None:
            adopt_settings(checkpoint, config, context.dp_size, data.tokenizer, vocab_size_given)
        takes_weights = checkpoint is not None and checkpoint.scope is Scope.WEIGHTS
        fit_vocabulary(config, data.tokenizer, given=vocab_size_given or takes_weights)
        for warning in data.warnings:
            warn(warning, context.is_main)
        trainer = Trainer(config, data, context, stop, checkpoint)
        trainer.watchdog = watchdog
        try:
            trainer.start()
            say(trainer.describe(), context.is_main)
            if trainer.model.plan is not None:
                say(trainer.model.plan.describe(), context.is_main)
            status = trainer.train()
        except BaseException as error:
            # A save that is running can only end when the other ranks do their part, as after what all raise together.
            # A single process needs nobody else.
            alone = context.world_size == 1 and isinstance(error, Exception)
            trainer.close(wait=alone or isinstance(error, RunError))
            raise
        trainer.close()
        if status == 0 and not stop.reason:
            say(f"done in {format_duration(time.perf_counter() - start)}", context.is_main)
    return status
