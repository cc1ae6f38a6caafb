"""Checkpoints that any layout of processes can load, in safetensors and JSON."""

from megatron.core.dist_checkpointing.format import (
    CheckpointError,
    checkpoint_path,
    latest_checkpoint,
    published_checkpoints,
    read_manifest,
    verify_checkpoint,
)
from megatron.core.dist_checkpointing.padding import Unpadded
from megatron.core.dist_checkpointing.serialization import CheckpointTensors, load_checkpoint, save_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointTensors",
    "Unpadded",
    "checkpoint_path",
    "latest_checkpoint",
    "load_checkpoint",
    "published_checkpoints",
    "read_manifest",
    "save_checkpoint",
    "verify_checkpoint",
]
