"""Saving and loading named tensors on any layout of processes."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron.core.dist_checkpointing.format import DTYPE_NAMES, CheckpointError, checkpoint_path
from megatron.core.dist_checkpointing.padding import LoadPlanner, SavePlanner, Unpadded
from megatron.core.dist_checkpointing.storage import SafetensorsReader, SafetensorsWriter
from megatron.core.parallel_state import ParallelContext

NAMES_IN_MESSAGE = 5

CheckpointTensors: TypeAlias = Mapping[str, torch.Tensor | Unpadded]
"""Tensors by global name."""


def save_checkpoint(
    root: Path, iteration: int, tensors: CheckpointTensors, manifest: dict[str, Any], context: ParallelContext
) -> Path:
    """Write `tensors` and `manifest` as the checkpoint of `iteration` under `root`; all ranks call it together.

    DTensors are saved by the ranks that hold them, plain tensors (equal on all ranks) by one of the ranks. When it
    returns, on every rank, the checkpoint is on the disk and published. An older one of the same iteration is replaced.

    Args:
        root: Directory of all checkpoints; made if it is not there. All ranks must see the same one.
        iteration: Number of the iteration.
        tensors: Tensors by global name; of padded ones, the part that is to be kept.
        manifest: What else to keep; JSON-able.
        context: The layout.

    Returns:
        The directory of the checkpoint.

    Raises:
        CheckpointError: A file could not be written, on whichever rank: raised on all, and nothing is published.
    """
    writer = SafetensorsWriter(root, iteration, manifest, context.rank, context.world_size)
    try:
        with _no_warning_of_single_process():
            dcp.save(_detached(tensors), storage_writer=writer, planner=SavePlanner(), no_dist=context.world_size == 1)
    except dcp.CheckpointException as failure:
        if writer.temporary is not None:
            shutil.rmtree(writer.temporary, ignore_errors=True)
        _raise(failure, f"cannot save {checkpoint_path(root, iteration)}")
    return writer.final


def load_checkpoint(path: Path, tensors: CheckpointTensors, strict: bool = True) -> None:
    """Fill `tensors` in place from the checkpoint directory `path`, whatever layout it was saved on.

    All ranks call it together. Sizes of files are checked first, checksums are not (see `verify_checkpoint`).

    Args:
        path: Directory of one checkpoint.
        tensors: Tensors by global name; DTensors get the rows they hold, padding stays as it is.
        strict: Require the same names on both sides (all ranks together: a pipeline rank has only its stages); else
            names that only one side has are left alone.

    Raises:
        CheckpointError: A file is missing or damaged, or names, shapes or dtypes differ. After an error while reading,
            raised on all ranks, some tensors may have been filled.
    """
    single = not dist.is_initialized() or dist.get_world_size() == 1
    reader: SafetensorsReader | None = None
    error: CheckpointError | None = None
    everywhere = set(tensors) if single else _names_on_all(tensors)
    try:
        reader = SafetensorsReader(path)
        tensors = _matching(path, tensors, everywhere, reader.manifest["tensors"], strict)
    except CheckpointError as raised:
        error = raised
    _raise_on_all(error, single)
    try:
        with _no_warning_of_single_process():
            dcp.load(_detached(tensors), storage_reader=reader, planner=LoadPlanner(), no_dist=single)
    except dcp.CheckpointException as failure:
        _raise(failure, f"cannot load {path}")


@contextmanager
def _no_warning_of_single_process() -> Iterator[None]:
    """torch warns when there is no process group, which for a single process is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _detached(tensors: CheckpointTensors) -> dict[str, Any]:
    return {name: t if isinstance(t, Unpadded) else t.detach() for name, t in tensors.items()}


def _raise_on_all(error: CheckpointError | None, single: bool) -> None:
    """Raise the first error that any rank has; else a rank without one would wait for the others for ever."""
    errors = [error]
    if not single:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise found


def _names_on_all(names: Iterable[str]) -> set[str]:
    """The names that any rank has."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(names))
    return set().union(*gathered)


def _matching(
    path: Path, tensors: CheckpointTensors, everywhere: set[str], stored: dict[str, Any], strict: bool
) -> CheckpointTensors:
    """The tensors that the checkpoint holds, after comparing names, shapes and dtypes."""
    if strict:
        _refuse(path, "lacks", [name for name in tensors if name not in stored])
        _refuse(path, "has unexpected", [name for name in stored if name not in everywhere])
    common = {name: tensor for name, tensor in tensors.items() if name in stored}
    differing = []
    for name, tensor in common.items():
        found = (stored[name]["dtype"], stored[name]["shape"])
        wanted = (DTYPE_NAMES[tensor.dtype], list(tensor.shape))
        if found != wanted:
            differing.append(f"{name} ({found[0]} {found[1]} there, {wanted[0]} {wanted[1]} here)")
    _refuse(path, "does not fit in", differing)
    return common


def _refuse(path: Path, problem: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:NAMES_IN_MESSAGE])
        more = f" and {len(names) - NAMES_IN_MESSAGE} more" if len(names) > NAMES_IN_MESSAGE else ""
        raise CheckpointError(f"{path} {problem} {shown}{more}; use the flags of the run that saved it")


def _raise(failure: dcp.CheckpointException, message: str) -> NoReturn:
    """Raise what torch gathered from the ranks as one of our errors; a bug keeps its traceback."""
    rank, (error, _) = min(failure.failures.items(), key=lambda item: item[0])
    if not isinstance(error, Exception):  # an interrupt is no failure to save
        raise error
    if isinstance(error, CheckpointError):
        raise CheckpointError(f"{message}: {error}") from error
    if isinstance(error, OSError):
        raise CheckpointError(f"{message}: rank {rank}: {error}") from error
    raise RuntimeError(f"{message}: rank {rank} raised {error!r}\n{failure}") from error
