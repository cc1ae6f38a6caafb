"""What a training checkpoint holds, and how a run finds the one to continue from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import megatron
from megatron.core.dist_checkpointing import latest_checkpoint, load_checkpoint, read_manifest, save_checkpoint
from megatron.core.errors import UserError
from megatron.core.file_utils import publish_bytes
from megatron.core.optimizer import Optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.training.config import CheckpointConfig, RunConfig

FINISHED_MARKER = "finished"


@dataclass
class Progress:
    """How far a run has come; with the seed, all the state there is besides tensors.

    Attributes:
        iteration: Completed steps.
        consumed_samples: Samples trained on.
        consumed_tokens: Encoder and decoder tokens trained on, without padding.
        skipped_iterations: Steps left out because their gradient was not finite.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0


def training_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint under its global name.

    The parameters are the optimizer's: between a forward and a backward pass the model shows gathered copies.
    """
    named = zip(optimizer.names, optimizer.parameters, strict=True)
    tensors: dict[str, torch.Tensor] = {f"model/{name}": parameter for name, parameter in named}
    return tensors | optimizer.named_state()


def save_training_checkpoint(
    config: RunConfig,
    progress: Progress,
    tensors: dict[str, torch.Tensor],
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
    """The newest checkpoint of `--load` (or `--save`), or None when the run starts from scratch.

    Raises:
        UserError: `--load` names a directory other than `--save` that holds no checkpoint.
    """
    directory = config.load or config.save
    if directory is None:
        return None
    found = latest_checkpoint(Path(directory))
    if found is None and config.load is not None and config.load != config.save:
        raise UserError(f"--load {config.load} holds no checkpoint; correct it, or leave it out to start from scratch")
    return found


def resume(path: Path, tensors: dict[str, torch.Tensor], config: RunConfig) -> Progress:
    """Load `path` into `tensors` in place and return its progress.

    Raises:
        UserError: The checkpoint is of another architecture or another optimizer.
    """
    manifest = read_manifest(path)
    saved, current = manifest["config"]["model"], asdict(config.model)
    differing = [f"{name} {saved.get(name)} -> {value}" for name, value in current.items() if saved.get(name) != value]
    dropouts = ("hidden_dropout", "attention_dropout", "init_method_std")  # may change from run to run
    differing = [text for text in differing if not text.startswith(dropouts)]
    if differing:
        raise UserError(f"{path} is of another architecture ({', '.join(differing)}); use its flags or another --save")
    saved_optimizer = manifest["config"]["optimizer"]["optimizer"]
    if saved_optimizer != config.optimizer.optimizer:
        raise UserError(
            f"{path} was trained with --optimizer {saved_optimizer}, not {config.optimizer.optimizer}; use the same"
        )
    load_checkpoint(path, tensors)
    return Progress(**manifest["progress"])


def mark_finished(save: str, progress: Progress) -> None:
    """Leave the marker that tells a finished run from one that was stopped (see the exit codes in the README)."""
    publish_bytes(Path(save, FINISHED_MARKER), (json.dumps(asdict(progress)) + "\n").encode())
