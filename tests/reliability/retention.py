"""R18: `--keep-last 1` never leaves a moment without a loadable checkpoint, whatever else lies in the directory.

An observer loads the newest checkpoint again and again while saves come and go; incomplete and damaged directories,
newer and older than the sound ones, are put in their way. That no instant inside a save is without one is counted by
R2, whose situation "retention, untidy" interrupts a save with retention at every system call.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import tempfile
import time
from contextlib import closing
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron.core.config import ParallelConfig
from megatron.core.dist_checkpointing import CheckpointError, CheckpointSaver, checkpoint_path, latest_checkpoint
from megatron.core.parallel_state import ParallelContext
from tests.distributed import PRELOAD, run_distributed
from tests.reliability.small_checkpoints import (
    by_rows,
    description,
    example,
    load_example,
    save_example,
)


def _observe(root: Path, pipe: Connection) -> None:
    """Load the newest checkpoint until told to stop; tells how often, the last save it saw, and what was wrong."""
    logging.disable()
    looks, problems, newest = 0, [], 0
    pipe.send("ready")
    while not pipe.poll():
        looks += 1
        seed = _load(root)
        if seed is None:
            problems.append(f"look {looks}: no checkpoint can be loaded")
        elif seed < newest:
            problems.append(f"look {looks}: save {seed} after save {newest}")
        newest = max(newest, seed or 0)
    pipe.send((looks, newest, problems))


def _load(root: Path) -> int | None:
    """Seed of the newest checkpoint that can be loaded.

    A checkpoint may go between being listed and being read, but only once there is a newer one; so a look during which
    names have come or gone is taken again.
    """
    while True:
        names = _names(root)
        try:
            found = latest_checkpoint(root)
            seed = None if found is None else load_example(found)
        except (CheckpointError, FileNotFoundError):
            seed = None
        if seed is not None or names == _names(root):
            return seed


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def _clutter(root: Path, iteration: int) -> None:
    """What crashes and bad disks leave: incomplete and damaged directories, newer and older than the sound one."""
    sound = checkpoint_path(root, iteration)
    for number, spoil in enumerate((_no_manifest, _no_shard, _half_a_shard, _flipped_bit), 1):
        for other in (iteration + 5000 + number, iteration * 10 + number):
            directory = checkpoint_path(root, other)
            if not directory.exists():
                shutil.copytree(sound, directory)
                spoil(directory)
    (root / "iter_9999999.tmp-00c0ffee").mkdir(exist_ok=True)
    checkpoint_path(root, 9_000_000).mkdir(exist_ok=True)


def _no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _no_shard(path: Path) -> None:
    min(path.glob("*.safetensors")).unlink()


def _half_a_shard(path: Path) -> None:
    shard = min(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])


def _flipped_bit(path: Path) -> None:
    """Of the right size, so that only the checksum tells."""
    shard = min(path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def _save_many(rank: int, root: Path, asynchronous: bool, saves: int) -> None:
    """Saves 1 to `saves` with `--keep-last 1`; the first rank clutters the directory after the first one."""
    logging.disable()
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    divide = by_rows if context.world_size > 1 else lambda tensors: tensors
    with closing(CheckpointSaver(root, context, asynchronous, keep_last=1)) as saver:
        for iteration in range(1, saves + 1):
            saver.save(iteration, divide(example(iteration)), description(iteration))
            if iteration == 1:
                saver.wait()
                if context.is_main:
                    _clutter(root, 1)
                if context.world_size > 1:
                    torch.distributed.barrier()
        saver.wait()
        assert [outcome.error for outcome in saver.outcomes()] == [None] * saves


def watch(ranks: int, asynchronous: bool, saves: int) -> dict[str, Any]:
    """The row of one kind of save: what was seen while `saves` checkpoints came and went."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # on a disk, where a save takes long enough to be looked at
        root = Path(folder, "root")
        save_example(root, 0, 0)  # so that there is one from the first look on
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "tests.reliability.retention"])
        ours, theirs = context.Pipe()
        observer = context.Process(target=_observe, args=(root, theirs), daemon=True)
        observer.start()
        theirs.close()
        try:
            assert ours.recv() == "ready"
            run_distributed(_save_many, ranks, root, asynchronous, saves)
            time.sleep(0.2)  # a last look
            ours.send("stop")
            looks, newest, problems = ours.recv()
        finally:
            observer.kill()
            observer.join()
        if newest != saves:
            problems.append(f"the last save that was seen is {newest}")
        left = [path.name for path in root.glob("iter_0*") if int(path.name[5:12]) <= saves and path.name[12:] == ""]
        if left != [checkpoint_path(root, saves).name]:
            problems.append(f"--keep-last 1 left {sorted(left)}")
    what = f"looks for a loadable checkpoint during {saves} {'a' * asynchronous}synchronous saves that keep one"
    row = {"test": "R18", "what": f"{what}, {ranks} rank{'s' * (ranks > 1)}", "trials": looks}
    row |= {"passed": looks - len(problems), "seconds": round(time.perf_counter() - started, 1)}
    return row | ({"failures": problems[:5]} if problems else {})


def count(saves: int = 100) -> list[dict[str, Any]]:
    """A row for each number of ranks and kind of save."""
    return [watch(ranks, asynchronous, saves) for ranks, asynchronous in product((1, 2), (False, True))]
