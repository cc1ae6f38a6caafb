"""What a training checkpoint holds, and how a run finds the one to continue from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import megatron
from megatron.core.dist_checkpointing import (
    CheckpointTensors,
    Unpadded,
    latest_checkpoint,
    load_checkpoint,
    published_checkpoints,
    read_manifest,
    save_checkpoint,
)
from megatron.core.errors import UserError
from megatron.core.file_utils import publish_bytes
from megatron.core.optimizer import Optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.training.config import CheckpointConfig, RunConfig

FINISHED_MARKER = "finished"
CHANGEABLE_MODEL_FIELDS = ("hidden_dropout", "attention_dropout", "init_method_std")


@dataclass
class Progress:
    """How far a run has come; with the seed, all the state there is besides tensors.

    Attributes:
        iteration: Completed steps.
        consumed_samples: Samples trained on.
        consumed_tokens: Encoder and decoder tokens trained on, without padding.
        skipped_iterations: Steps left out because their loss or gradient was not finite.
        consecutive_skips: How many of them in a row, up to now.
        next_sample: Id of the first sample not dealt out yet; larger than `consumed_samples` after `--skip-samples`.
        recent_losses: What the detection of loss spikes compares with.
        loss_scaler: State of the dynamic loss scale (fp16); empty without one.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0
    consecutive_skips: int = 0
    next_sample: int = 0
    recent_losses: list[float] = field(default_factory=list)
    loss_scaler: dict[str, float] = field(default_factory=dict)


def training_tensors(optimizer: Optimizer, owned_only: bool = False) -> CheckpointTensors:
    """Every tensor of a checkpoint that this rank holds (a part of), under its global name.

    The parameters are the optimizer's: between a forward and a backward pass the model shows gathered copies. With
    `owned_only`, without what a lower pipeline stage holds as well, as a checkpoint is to be written. Of two copies on
    this rank only the first is there: call `optimizer.refresh_copies` after loading. Padding is left out.
    """
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    for index, name in enumerate(optimizer.names):
        if not (owned_only and optimizer.is_copy[index]):
            tensors.setdefault(f"model/{name}", optimizer.parameters[index])
            shapes[f"model/{name}"] = optimizer.shapes[index]
    tensors |= optimizer.named_state(owned_only)
    shapes |= optimizer.named_shapes()
    return {name: t if t.shape == shapes[name] else Unpadded(t, shapes[name]) for name, t in tensors.items()}


def save_training_checkpoint(
    config: RunConfig,
    progress: Progress,
    tensors: CheckpointTensors,
    description: dict[str, Any],
    context: ParallelContext,
) -> Path:
    """Save under `--save`; `description` (tokenizer, dataset) goes into the manifest."""
    assert config.checkpoint.save is not None
    manifest = {
        "megatron_t5_version": megatron.__version__,
        "torch_version": torch.__version__,
        "config": config.to_dict(),
        "progress": asdict(progress),
        **description,
    }
    return save_checkpoint(Path(config.checkpoint.save), progress.iteration, tensors, manifest, context)


def checkpoint_to_resume(config: CheckpointConfig) -> Path | None:
    """The newest sound checkpoint of `--save`, else of `--load`, or None when the run starts from scratch.

    `--save` first: the same command again continues where it stopped, whatever it was started from.

    Raises:
        UserError: `--load` names a directory other than `--save` that holds no checkpoint, or all checkpoints of a
            directory are damaged, and starting from scratch would overwrite them.
    """
    for directory in filter(None, dict.fromkeys((config.save, config.load))):
        found = latest_checkpoint(Path(directory))
        if found is not None:
            return found
        damaged = published_checkpoints(Path(directory))
        if damaged:
            raise UserError(
                f"no checkpoint in {directory} is sound ({len(damaged)} found); restore one, or use another --save"
            )
    if config.load not in (None, config.save):
        raise UserError(f"--load {config.load} holds no checkpoint; correct it, or leave it out to start from scratch")
    return None


def resume(
    path: Path, tensors: CheckpointTensors, config: RunConfig, description: dict[str, Any]
) -> tuple[Progress, list[str]]:
    """Load `path` into `tensors` in place.

    Returns:
        Its progress, and the values of the configuration that are not those of the run that saved it.

    Raises:
        UserError: The checkpoint is of another architecture, optimizer, tokenizer or dataset.
    """
    manifest = read_manifest(path)
    saved, current = manifest["config"], config.to_dict()
    fixed = {k: v for k, v in current["model"].items() if k not in CHANGEABLE_MODEL_FIELDS}
    differing = _differences(saved["model"], fixed)
    if differing:
        raise UserError(f"{path} is of another architecture ({', '.join(differing)}); use its flags or another --save")
    optimizer = saved["optimizer"]["optimizer"]
    if optimizer != config.optimizer.optimizer:
        raise UserError(
            f"{path} was trained with --optimizer {optimizer}, not {config.optimizer.optimizer}; use the same"
        )
    for name in ("tokenizer", "dataset"):
        differing = _differences(manifest[name], description[name])
        if differing:
            raise UserError(
                f"{path} was trained with another {name} ({', '.join(differing)}); use the same, or another --save"
            )
    load_checkpoint(path, tensors)
    current["data"].pop("data_path")  # the dataset has been compared; it may have moved
    changed = [
        text
        for group in ("model", "compute", "optimizer", "data", "training")
        for text in _differences(saved[group], current[group])
    ]
    return Progress(**manifest["progress"]), changed


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """`name saved -> current` for each value of `current` that `saved` has otherwise."""
    return [f"{name} {saved.get(name)} -> {value}" for name, value in current.items() if saved.get(name) != value]


def unmark_finished(save: str) -> None:
    """Remove the marker of a finished run that is about to be extended."""
    Path(save, FINISHED_MARKER).unlink(missing_ok=True)


def mark_finished(save: str, progress: Progress) -> None:
    """Leave the marker that tells a finished run from one that was stopped (see the exit codes in the README)."""
    publish_bytes(Path(save, FINISHED_MARKER), (json.dumps(asdict(progress)) + "\n").encode())
