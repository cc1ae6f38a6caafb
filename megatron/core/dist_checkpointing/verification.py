"""Which checkpoint is sound: sizes and checksums, read by all ranks together."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.format import (
    CHECKSUM_ALGORITHM,
    CheckpointError,
    check_file_sizes,
    open_regular,
    read_manifest,
)
from megatron.core.dist_checkpointing.publishing import published_checkpoints
from megatron.core.parallel_state import ParallelContext

READ_BYTES = 8 * 2**20

logger = logging.getLogger(__name__)


def verify_checkpoint(path: Path, context: ParallelContext | None = None, checksums: bool = True) -> None:
    """Raise `CheckpointError` unless the checkpoint `path` is as it was saved.

    Args:
        path: Directory of the checkpoint.
        context: With it, all ranks call this together, each reads some of the files, and all raise the same error.
        checksums: Read everything and compare checksums; else only the manifest and the sizes of the files.
    """
    context = context or ParallelContext(torch.device("cpu"))
    error = None
    try:
        manifest = read_manifest(path)
        check_file_sizes(path, manifest)
        for name in sorted(manifest["files"])[context.rank :: context.world_size] if checksums else ():
            _check_checksum(path / name, manifest["files"][name][CHECKSUM_ALGORITHM])
    except CheckpointError as raised:
        error = raised
    raise_on_all(error, context.world_size, context.control_group)


def raise_on_all(error: CheckpointError | None, world_size: int, group: dist.ProcessGroup | None = None) -> None:
    """Raise the first error that any rank has; else a rank without one would wait for the others for ever."""
    errors = [error]
    if world_size > 1:
        errors = [None] * world_size
        dist.all_gather_object(errors, error, group=group)
    for found in errors:
        if found is not None:
            raise found


def _check_checksum(file: Path, expected: int) -> None:
    checksum, block = 0, memoryview(bytearray(READ_BYTES))
    try:
        with open_regular(file) as content:
            while count := content.readinto(block):
                checksum = zlib.crc32(block[:count], checksum)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}; use another checkpoint") from None
    if checksum != expected:
        raise CheckpointError(f"{file} is damaged: checksum {checksum}, recorded {expected}; use another checkpoint")


def latest_checkpoint(
    root: Path, context: ParallelContext | None = None, checksums: bool = True, iteration: int | None = None
) -> Path | None:
    """The sound checkpoint of the highest iteration under `root`, or of `iteration`, or None.

    Sound is what `verify_checkpoint` accepts: a manifest of a known version, and all files there with the recorded
    sizes and checksums. Directories that are not are passed over with a warning. With a `context` all ranks call it
    together, share the reading and get the same answer.
    """
    context = context or ParallelContext(torch.device("cpu"))
    found: list[list[Path]] = [[]]
    error = None
    try:
        found = [published_checkpoints(root, iteration)]
    except OSError as raised:
        error = CheckpointError(f"cannot read {root}: {raised.strerror}")
    raise_on_all(error, context.world_size, context.control_group)
    if context.world_size > 1:
        dist.broadcast_object_list(found, src=0, group=context.control_group)
    return first_sound(found[0], context, checksums)


def first_sound(paths: Sequence[Path], context: ParallelContext, checksums: bool = True) -> Path | None:
    """The first of `paths` that is sound, or None; those before are passed over with a warning.

    All ranks call it together, with the same paths.
    """
    for path in paths:
        problem = _damage(path, context, checksums)
        if problem is None:
            return path
        if context.is_main:
            logger.warning("warning: passing over a checkpoint: %s", problem)
    return None


def _damage(path: Path, context: ParallelContext, checksums: bool) -> CheckpointError | None:
    """What is wrong with the checkpoint `path`, or None if it is sound."""
    try:
        verify_checkpoint(path, context, checksums)
    except CheckpointError as error:
        return error
    return None
