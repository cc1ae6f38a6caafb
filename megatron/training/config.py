"""Configuration of a run: the core dataclasses together with the training loop's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.config import (
    ComputeConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerConfig,
    flag_name,
    option,
    require_positive,
)
from megatron.core.datasets.sample_ranges import SampleRanges
from megatron.core.errors import UserError


@dataclass(kw_only=True)
class TrainingConfig:
    """Length of the run, batch sizes and evaluation."""

    micro_batch_size: int = 8
    """Samples a process computes at once."""
    global_batch_size: int | None = None
    """Samples of a step, over all processes. Default: micro batch size x data-parallel size."""
    train_iters: int | None = None
    """Steps to train for. Default: one epoch of the data."""
    train_samples: int | None = None
    """Samples to train on, instead of --train-iters; schedules are then counted in samples."""
    eval_interval: int = 1000
    """Evaluate on the validation split every so many steps and at the end, where the test split is evaluated too."""
    eval_iters: int = 100
    """Global batches of an evaluation's losses, always the same ones; 0: none."""
    eval_metrics: list[str] | None = None
    """text-to-text: score generated targets with exact_match, token_f1, accuracy, rouge (rouge1, rouge2, rougeL) or
    bleu. Default: exact_match."""
    eval_examples: int = 1000
    """text-to-text: validation examples of each task that are generated for; 0: none."""
    eval_num_beams: int = 1
    """text-to-text: beams of that generation; 1 is greedy."""
    seed: int = 1234
    """Decides initial weights, the order and corruption of samples, and dropout."""
    exit_interval: int | None = None
    """Save and stop after each step that is a multiple of this; the same command continues."""
    exit_duration_in_mins: float | None = None
    """Save and stop after the first step that ends so many minutes after the start; the same command continues."""
    max_consecutive_skips: int = 50
    """Stop after more than so many steps in a row whose loss or gradient is not finite; such steps change nothing."""
    loss_spike_threshold: float = 6.0
    """Log a step, with its sample ids, whose loss is so many standard deviations above the steps before; 0: never."""
    skip_samples: list[str] | None = None
    """Ranges of sample ids to leave out, as first-last (inclusive), such as the ones a loss spike was logged with."""
    check_determinism_interval: int | None = None
    """Compute every so many steps twice and compare bit for bit; a difference stops the run. Default: never."""

    def __post_init__(self) -> None:
        require_positive(
            self, "micro_batch_size", "global_batch_size", "train_iters", "train_samples", "eval_interval",
            "exit_interval", "exit_duration_in_mins", "check_determinism_interval", "eval_num_beams",
        )  # fmt: skip
        for name in ("max_consecutive_skips", "loss_spike_threshold", "eval_iters", "eval_examples"):
            if getattr(self, name) < 0:
                raise UserError(f"{flag_name(name)} is {getattr(self, name)}; it must not be negative")
        if self.train_iters is not None and self.train_samples is not None:
            raise UserError("--train-iters and --train-samples both set the length of the run; give one of them")
        SampleRanges.parse(self.skip_samples)  # raises what is wrong with them

    def num_microbatches(self, dp_size: int) -> int:
        """Microbatches of a step on each of `dp_size` data-parallel ranks."""
        per_pass = self.micro_batch_size * dp_size
        if self.global_batch_size is None:
            return 1
        if self.global_batch_size % per_pass:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size "
                f"{self.micro_batch_size} x {dp_size} data-parallel processes = {per_pass}; "
                "choose a multiple"
            )
        return self.global_batch_size // per_pass


@dataclass(kw_only=True)
class CheckpointConfig:
    """Where and when to save, and what to start from."""

    save: str | None = None
    """Directory for checkpoints, metrics and the tokenizer; a run whose directory holds a checkpoint continues it."""
    load: str | None = None
    """Directory to start from while --save holds no checkpoint: of another run, or of transformers, which gives weights
    and architecture."""
    save_interval: int = 1000
    """Save every so many steps, and at the end."""
    async_save: bool = False
    """Pause training only for a copy to host memory; a thread writes the checkpoint meanwhile."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be saved; with continue, the next one is tried at its time."""
    keep_last: int | None = None
    """Keep only so many of the newest checkpoints. Default: all."""
    keep_every: int | None = None
    """With --keep-last, keep the checkpoints of steps that are a multiple of this as well."""
    keep_best: str | None = None
    """Keep the weights of the best evaluation in <save>/best: validation_lm_loss, or <task>/<metric> or <metric> (mean
    over tasks). Default: with text-to-text, the first of --eval-metrics; else nothing is kept."""
    save_hf: str | None = None
    """At the end of the run, export the model for transformers into this directory; needs --save."""
    save_hf_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of that export."""
    verify_checkpoint: bool = True
    """Compare the checksums of a checkpoint before it is loaded; sizes are always compared."""
    ckpt_step: int | None = None
    """Continue from the checkpoint of this step instead of the newest."""
    finetune: bool = False
    """Take only the weights from --load and begin a new run with them."""
    load_optim: bool = option(True, negative="--no-load-optim")
    """Load the state of the optimizer; without it, weights and progress are loaded and the state starts anew."""
    use_checkpoint_args: bool = False
    """Take architecture, tokenizer and objective from the checkpoint to continue; other flags given still win."""
    override_opt_param_scheduler: bool = option(False, aliases=("--override-opt_param-scheduler",))
    """Follow the learning-rate schedule of the flags where the checkpoint's differs."""
    use_checkpoint_opt_param_scheduler: bool = option(False, aliases=("--use-checkpoint-opt_param-scheduler",))
    """Follow the learning-rate schedule of the checkpoint where the flags differ."""

    def __post_init__(self) -> None:
        require_positive(self, "save_interval", "keep_last", "keep_every", "ckpt_step")
        if self.keep_every is not None and self.keep_last is None:
            raise UserError("--keep-every needs --keep-last, without which all checkpoints are kept; add it")
        if self.finetune and self.load is None:
            raise UserError("--finetune needs --load, the directory to take the weights from; add it")
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise UserError(
                "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other; give one"
            )
        if self.save is None:
            for name in ("async_save", "keep_last", "keep_best", "save_hf"):
                if getattr(self, name):
                    raise UserError(f"{flag_name(name)} needs --save; add it or remove the flag")


@dataclass(kw_only=True)
class LoggingConfig:
    """What is reported, and where to."""

    log_interval: int = 10
    """Report every so many steps."""
    metrics_file: str | None = None
    """File for one JSON object a report. Default: metrics.jsonl in the --save directory."""
    tensorboard_dir: str | None = None
    """Directory for TensorBoard event files (needs the package tensorboard)."""
    wandb_project: str | None = None
    """Project to log to on Weights & Biases (needs the package wandb)."""
    wandb_exp_name: str | None = None
    """Name of the run on Weights & Biases."""
    device_peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for model FLOPs utilisation. Default: known for common GPUs, else not reported."""

    profile: bool = False
    """Record steps with torch's profiler: a Chrome trace of each rank, and a summary of where their time goes."""
    profile_step_start: int | None = None
    """First step to record. Default: 10."""
    profile_step_end: int | None = None
    """The step before which the recording ends. Default: 12."""
    profile_ranks: list[str] | None = None
    """Ranks that record. Default: all."""
    profile_dir: str | None = None
    """Directory for the traces. Default: profile in the --save directory, or here."""

    def __post_init__(self) -> None:
        require_positive(self, "log_interval", "device_peak_tflops", "profile_step_start")
        steps = self.profile_steps
        if self.profile and not steps:
            raise UserError(
                f"--profile-step-end {steps.stop} is not beyond --profile-step-start {steps.start}; the recording ends "
                "before it, choose a later one"
            )
        for rank in self.profile_ranks or ():
            if not rank.isdecimal():
                raise UserError(f"--profile-ranks {rank} is no rank; give numbers, which count from 0")
        for name in ("profile_step_start", "profile_step_end", "profile_ranks", "profile_dir"):
            if getattr(self, name) is not None and not self.profile:
                raise UserError(f"{flag_name(name)} needs --profile; add it or remove the flag")

    @property
    def profile_steps(self) -> range:
        """The steps to record; none without --profile."""
        start = 10 if self.profile_step_start is None else self.profile_step_start
        end = 12 if self.profile_step_end is None else self.profile_step_end
        return range(start, end) if self.profile else range(0)


OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    # As T5 was tuned (Raffel et al. 2020, section 3.1.2).
    "text-to-text": {
        "optimizer": "adafactor",
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "lr_warmup_fraction": 0.0,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
}
"""Defaults that an objective has instead of the fields' own; a preset and everything that is given still win."""


@dataclass(kw_only=True)
class DryRunConfig:
    """What a run would need, without running it; not part of the run."""

    dry_run: bool = False
    """Print memory, operations and the stages of every rank, and exit; needs no data, no GPU and no launcher."""
    dry_run_world_size: int | None = None
    """Ranks of the world looked at. Default: WORLD_SIZE, or the smallest that the layout allows."""
    dry_run_rank: int | None = None
    """Print the tensors of this rank too."""
    device_memory_gib: float | None = None
    """Memory of one device in GiB; a layout that does not fit is refused."""

    def __post_init__(self) -> None:
        require_positive(self, "dry_run_world_size", "device_memory_gib")
        if self.dry_run_rank is not None and self.dry_run_rank < 0:
            raise UserError(f"--dry-run-rank is {self.dry_run_rank}; ranks count from 0")
        for name in ("dry_run_world_size", "dry_run_rank", "device_memory_gib"):
            if getattr(self, name) is not None and not self.dry_run:
                raise UserError(f"{flag_name(name)} needs --dry-run; add it or remove the flag")


@dataclass(kw_only=True)
class RunConfig:
    """Everything that defines a run. Travels in its checkpoints."""

    model: ModelConfig
    compute: ComputeConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig

    def __post_init__(self) -> None:
        model, data = self.model, self.data
        tensor_ranks = self.parallel.tensor_model_parallel_size
        model.check_heads(tensor_ranks)
        if model.vocab_size is not None:
            model.check_vocabulary(tensor_ranks)
        if model.position_embedding_type == "learned_absolute":
            for name in ("encoder_seq_length", "decoder_seq_length"):
                length = getattr(data, name)
                if length is not None and length > model.max_position_embeddings:
                    raise UserError(
                        f"{flag_name(name)} {length} is beyond the {model.max_position_embeddings} learned positions; "
                        "raise --max-position-embeddings or use --position-embedding-type relative"
                    )
            if data.packing == "segments":
                raise UserError(
                    "--packing segments needs positions that are relative, --position-embedding-type learned_absolute "
                    "counts them from the start of a row; add --packing none"
                )
        if self.training.train_samples is None:
            for name in ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"):
                if getattr(self.optimizer, name) is not None:
                    raise UserError(f"{flag_name(name)} needs --train-samples; use the form that counts iterations")
        else:
            for name in ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters"):
                if getattr(self.optimizer, name) is not None:
                    raise UserError(f"{flag_name(name)} does not go with --train-samples; use the form for samples")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, Any]]) -> RunConfig:
        """Inverse of `to_dict`."""
        return cls(**{name: group(**values[name]) for name, group in GROUPS.items()})


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "compute": ComputeConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}
"""The parts of `RunConfig`."""

FLAG_GROUPS: dict[str, type] = {**GROUPS, "dry_run": DryRunConfig}
"""Everything that has flags."""
