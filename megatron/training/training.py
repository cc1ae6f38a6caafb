"""The training loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from megatron.core.datasets.loader import T5Loader
from megatron.core.datasets.t5_dataset import SpanCorruptionDataset
from megatron.core.distributed import clip_gradients_, global_grad_norm
from megatron.core.errors import UserError
from megatron.core.models.T5.t5_flops import training_flops_per_sequence
from megatron.core.optimizer import LearningRateSchedule, LossScaler, build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.training.checkpointing import (
    Progress,
    checkpoint_to_resume,
    mark_finished,
    resume,
    save_training_checkpoint,
    training_tensors,
    unmark_finished,
)
from megatron.training.config import RunConfig
from megatron.training.consistency import check_equal_on_all_ranks
from megatron.training.console import format_duration, progress_line, say, warn
from megatron.training.data import TrainingData, fit_vocabulary, open_data
from megatron.training.evaluation import evaluate, special_token_mask
from megatron.training.initialize import parallel_context
from megatron.training.metrics import Sink, build_sinks, device_peak_tflops, peak_memory_gib
from megatron.training.model_setup import DistributedModel, plan_stages
from megatron.training.step_window import StepWindow


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

    def __init__(self, config: RunConfig, data: TrainingData, context: ParallelContext) -> None:
        self.config, self.data, self.context = config, data, context
        self.description = data.describe()
        check_equal_on_all_ranks(context, {"config": config.to_dict(), **self.description})
        training = config.training
        self.num_microbatches = training.num_microbatches(context.dp_size)
        self.global_batch_size = training.micro_batch_size * context.dp_size * self.num_microbatches
        self.progress = Progress()
        self._plan()  # mistakes in the schedule show before the model is made
        lengths = data.train.encoder_length, data.train.decoder_length
        plan = plan_stages(config, context, *lengths, self.num_microbatches)
        self.model = DistributedModel(config, context, plan, self.num_microbatches)
        self.parameters = self.model.parameters
        synchronize = None if self.model.shared is None else self.model.shared.synchronize
        self.optimizer = build_optimizer(config.optimizer, self.parameters, context, synchronize)
        self.loss_scaler = LossScaler(config.optimizer, enabled=config.compute.fp16)
        self.train_loader = self._loader(data.train)
        self.flops_per_sample = training_flops_per_sequence(config.model, *lengths)
        self.peak_tflops = device_peak_tflops(context.device, config.logging)
        self.sinks: list[Sink] = []
        self.window = StepWindow(context.device, counts=self.model.counts_loss)

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

    def _loader(self, dataset: SpanCorruptionDataset) -> T5Loader:
        return T5Loader(
            dataset,
            micro_batch_size=self.config.training.micro_batch_size,
            num_microbatches=self.num_microbatches,
            dp_rank=self.context.dp_rank,
            dp_size=self.context.dp_size,
        )

    def train_step(self) -> None:
        """One optimizer step on the next global batch."""
        start = time.perf_counter()
        batch = self.train_loader.step_batch(self.progress.consumed_samples).to(self.context.device)
        self.window.data_wait_s += time.perf_counter() - start
        num_targets = (batch.labels >= 0).sum()
        self.window.begin_step(num_targets)
        if self.context.dp_group is not None:
            torch.distributed.all_reduce(num_targets, group=self.context.dp_group)
        self.model.seed_dropout(self.progress.iteration)
        self.window.add_losses(self.model.forward_backward(batch, self.loss_scaler.scale / num_targets))
        self.model.finish_gradients()
        self._update()

    def _update(self) -> None:
        """Clip, step and advance. A step whose gradient is not finite changes nothing but the counts."""
        scale = self.loss_scaler.scale
        norm = global_grad_norm(self.parameters, self.context, scale)
        self.window.grad_norm = norm.item()
        self.window.learning_rate = self.schedule(self._schedule_position())
        finite = math.isfinite(self.window.grad_norm)
        if finite:
            clip_gradients_(self.parameters, norm, self.config.optimizer.clip_grad, scale)
            self.optimizer.step(self.window.learning_rate)
        else:
            self.progress.skipped_iterations += 1
            scaled = f" (loss scale {scale:g})" if self.config.compute.fp16 else ""
            step = self.progress.iteration + 1
            warn(f"step {step}: gradient norm is {norm.item()}{scaled}, step skipped", self.context.is_main)
        self.loss_scaler.update(found_nonfinite=not finite)
        self.optimizer.zero_grad()
        self.progress.iteration += 1
        self.progress.consumed_samples += self.global_batch_size
        self.progress.consumed_tokens += self.global_batch_size * self.data.train.tokens_per_sample

    def _schedule_position(self) -> int:
        """The schedule's argument for the step being made: its number, or the samples consumed by its end."""
        if self.config.training.train_samples is None:
            return self.progress.iteration + 1
        return self.progress.consumed_samples + self.global_batch_size

    def train(self) -> None:
        """Run to the end, reporting, evaluating and saving on the way."""
        training, checkpoint = self.config.training, self.config.checkpoint
        self.window.restart()
        if self.progress.iteration >= self.total_iterations:
            say(f"nothing left to do: {self.progress.iteration} steps are done", self.context.is_main)
            self._mark_finished()  # again: the run may have been killed between its last checkpoint and the marker
            return
        while self.progress.iteration < self.total_iterations:
            self.train_step()
            step, last = self.progress.iteration, self.progress.iteration == self.total_iterations
            saving = checkpoint.save is not None and (step % checkpoint.save_interval == 0 or last)
            # A report before each checkpoint, so that the means of a continued run cover the same steps.
            if step % self.config.logging.log_interval == 0 or saving or last:
                self.report()
            if step % training.eval_interval == 0 or last:
                self.evaluate("validation", self.data.valid)
            if last:
                self.evaluate("test", self.data.test)  # before the last checkpoint, so that a kill does not lose it
            if saving:
                self.save()
        self._mark_finished()

    def _mark_finished(self) -> None:
        if self.config.checkpoint.save and self.context.is_main:
            mark_finished(self.config.checkpoint.save, self.progress)

    def report(self) -> None:
        """Write one row about the steps since the last report."""
        row = self.window.row(self.context) | {
            "iteration": self.progress.iteration,
            "consumed_samples": self.progress.consumed_samples,
            "consumed_tokens": self.progress.consumed_tokens,
            "skipped_iterations": self.progress.skipped_iterations,
            "loss_scale": self.loss_scaler.scale,
            "fill_rate": self.data.train.fill_rate,
            "memory_gib": peak_memory_gib(self.context.device),
        }
        steps_per_s = 1e3 / row["step_time_ms"]
        per_device = self.flops_per_sample * self.global_batch_size * steps_per_s / self.context.world_size / 1e12
        row["tokens_per_s"] = steps_per_s * self.global_batch_size * self.data.train.tokens_per_sample
        row["tflops_per_s"] = per_device
        row["mfu"] = None if self.peak_tflops is None else per_device / self.peak_tflops
        self._write(row)
        eta_s = (self.total_iterations - self.progress.iteration) / steps_per_s
        say(progress_line(row, self.total_iterations, eta_s), self.context.is_main)

    def evaluate(self, name: str, dataset: SpanCorruptionDataset | None) -> None:
        """Write one row with the losses on a held-out split, if it has any samples."""
        if dataset is None or self.config.training.eval_iters == 0:
            return
        start = time.perf_counter()
        num_samples = min(self.config.training.eval_iters * self.global_batch_size, dataset.windows_per_epoch)
        is_special = special_token_mask(self.data.special, self.config.model.padded_vocab_size, self.context.device)
        result = evaluate(self.model, self._loader(dataset), num_samples, is_special, self.context)
        self._write(
            {
                "iteration": self.progress.iteration,
                f"{name}_lm_loss": result.lm_loss,
                f"{name}_noise_lm_loss": result.noise_lm_loss,
            }
        )
        took = time.perf_counter() - start
        say(
            f"{name} at step {self.progress.iteration} | lm loss {result.lm_loss:.4f} | noise tokens alone "
            f"{result.noise_lm_loss:.4f} | {num_samples} samples in {took:.1f} s",
            self.context.is_main,
        )
        self.window.leave_out(took)

    def save(self) -> None:
        """Save a checkpoint."""
        start = time.perf_counter()
        if self.model.shared is not None:
            self.model.shared.check_equal()
        self.progress.loss_scaler = self.loss_scaler.state
        tensors = training_tensors(self.optimizer, owned_only=True)
        path = save_training_checkpoint(self.config, self.progress, tensors, self.description, self.context)
        took = time.perf_counter() - start
        self._write({"iteration": self.progress.iteration, "checkpoint_pause_ms": took * 1e3})
        say(f"saved {path} in {took:.1f} s", self.context.is_main)
        self.window.leave_out(took)

    def _write(self, row: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(row)

    def start(self) -> None:
        """Continue from a checkpoint if there is one, and open the reports."""
        path = self.context.on_main(lambda: checkpoint_to_resume(self.config.checkpoint))
        if path is not None:
            self._resume(path)
        self.context.on_main(self._open_outputs)

    def _resume(self, path: Path) -> None:
        load = self.config.checkpoint.load
        beside = f" (--save holds it; --load {load} was not read)" if load and path.parent != Path(load) else ""
        say(f"continuing from {path}{beside}", self.context.is_main)
        self.progress, changed = resume(path, training_tensors(self.optimizer), self.config, self.description)
        self.optimizer.refresh_copies()
        self.loss_scaler.load_state(self.progress.loss_scaler)
        if changed:
            warn(f"not as in the run that saved it: {', '.join(changed)}", self.context.is_main)
        if self.progress.consumed_samples != self.progress.iteration * self.global_batch_size:
            warn(
                f"the global batch size is {self.global_batch_size}, but {self.progress.iteration} steps took "
                f"{self.progress.consumed_samples} samples so far",
                self.context.is_main,
            )
        self._plan()

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
        self.sinks = build_sinks(self.config.logging, save, iteration, self.config.to_dict())

    def describe(self) -> str:
        """One line about what is about to happen."""
        train = self.data.train
        return (
            f"{self.model.num_parameters():,} parameters on {self.context.world_size} x {self.context.device.type}"
            f"{self._layout()} | "
            f"{self.total_iterations:,} steps of {self.global_batch_size} samples of "
            f"{train.encoder_length} + {train.decoder_length} tokens | "
            f"{self.total_iterations * self.global_batch_size / train.windows_per_epoch:.2f} epochs of "
            f"{train.windows_per_epoch:,} samples"
        )

    def _layout(self) -> str:
        """How the ranks are used, when there is anything to tell."""
        context = self.context
        sizes = {"tensor": context.tp_size, "pipeline": context.pp_size, "data": context.dp_size}
        layout = " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1)
        return f" ({layout})" if layout else ""

    def close(self) -> None:
        """Flush the reports."""
        for sink in self.sinks:
            sink.close()


def pretrain(config: RunConfig, vocab_size_given: bool = False) -> None:
    """Train as configured, in this process or in the process group that torchrun describes.

    Args:
        config: The run.
        vocab_size_given: Keep the configured vocabulary size instead of taking the tokenizer's.
    """
    with parallel_context(config.parallel) as context:
        pretrain_in(context, config, vocab_size_given)


def pretrain_in(context: ParallelContext, config: RunConfig, vocab_size_given: bool = False) -> None:
    """`pretrain` in a context that exists already."""
    start = time.perf_counter()
    data = open_data(config)
    fit_vocabulary(config, data.tokenizer, vocab_size_given)
    for warning in data.warnings:
        warn(warning, context.is_main)
    trainer = Trainer(config, data, context)
    trainer.start()
    say(trainer.describe(), context.is_main)
    if trainer.model.plan is not None:
        say(trainer.model.plan.describe(), context.is_main)
    trainer.train()
    trainer.close()
    say(f"done in {format_duration(time.perf_counter() - start)}", context.is_main)
