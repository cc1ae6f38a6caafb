"""Small checkpoints for the reliability tests: tensors that tell which save they are of, and what a root may hold."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megatron.core.dist_checkpointing import latest_checkpoint, load_checkpoint, read_manifest, save_checkpoint
from megatron.core.dist_checkpointing.format import HINT
from megatron.core.parallel_state import ParallelContext

CPU = ParallelContext(torch.device("cpu"))
MEMORY_DISK = Path("/dev/shm")
PUBLISHED = re.compile(r"iter_\d{7}")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory, in memory where there is such a file system: a killed process leaves the same in both."""
    usable = MEMORY_DISK.is_dir() and os.access(MEMORY_DISK, os.W_OK)
    return tempfile.TemporaryDirectory(dir=MEMORY_DISK if usable else None)


def example(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of several kinds, every one of them different for another seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/weight": torch.randn(7, 5, generator=generator),
        "model/row": torch.randn(1, 3, generator=generator),
        "model/norm": torch.randn(5, generator=generator).bfloat16(),
        "model/table": torch.randn(
            48, 128, generator=generator
        ),  # more than Python's buffer, so that writes are several
        "model/cube": torch.randn(4, 3, 2, generator=generator, dtype=torch.float64),
        "optimizer/step": torch.tensor(float(seed)),
        "ids": torch.randint(0, 2**40, (9,), generator=generator),
    }


def by_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` divided by rows over all ranks; single values and ids stay whole on each."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    divided = {"model/weight", "model/norm", "model/cube", "model/table"}
    return {name: distribute_tensor(t, mesh, [Shard(0)]) if name in divided else t for name, t in tensors.items()}


def description(seed: int) -> dict[str, Any]:
    """What the manifest of a checkpoint of `example(seed)` says besides."""
    return {"progress": {"seed": seed}}


def save_example(root: Path, iteration: int, seed: int) -> Path:
    """Save `example(seed)` from this process."""
    return save_checkpoint(root, iteration, example(seed), description(seed), CPU)


def load_example(path: Path) -> int:
    """Load a checkpoint of `example` and return its seed; AssertionError unless all of it is of the same save."""
    loaded = {name: torch.full_like(tensor, 77) for name, tensor in example(0).items()}
    load_checkpoint(path, loaded)
    seed = int(loaded["optimizer/step"])
    for name, tensor in example(seed).items():
        assert torch.equal(loaded[name], tensor), f"{path}: {name} is not the tensor that was saved"
    assert read_manifest(path)["progress"] == {"seed": seed}, f"{path}: manifest and tensors are of two saves"
    return seed


def load_latest(root: Path) -> int | None:
    """Seed of the newest sound checkpoint under `root`, or None when there is none."""
    path = latest_checkpoint(root)
    return None if path is None else load_example(path)


def leftovers(root: Path, files: tuple[str, ...] = ()) -> list[str]:
    """Names under `root` that are neither a published checkpoint nor the hint nor one of `files`."""
    names = (path.name for path in root.iterdir()) if root.is_dir() else ()
    return sorted(name for name in names if name not in (HINT, *files) and not PUBLISHED.fullmatch(name))


def count_trials(
    test: str, what: str, trials: Iterable[tuple[str, Callable[[], None]]], started: float | None = None
) -> dict[str, Any]:
    """Run named trials and return their row of the table; a trial that raises has failed, and the row says how."""
    started = time.perf_counter() if started is None else started
    total, failures = 0, []
    logging.disable(logging.WARNING)  # checkpoints that are passed over
    try:
        for name, trial in trials:
            total += 1
            try:
                trial()
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
    finally:
        logging.disable(logging.NOTSET)
    row = {"test": test, "what": what, "trials": total, "passed": total - len(failures)}
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row | ({"failures": failures} if failures else {})
