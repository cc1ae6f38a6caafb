"""R12: a checkpoint with a flipped bit or other damage is recognised, and the one before is loaded instead."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.core.config import ParallelConfig
from megatron.core.dist_checkpointing import (
    CheckpointError,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from megatron.core.dist_checkpointing.format import MANIFEST, encode_manifest
from megatron.core.parallel_state import ParallelContext
from tests.distributed import run_distributed
from tests.reliability.small_checkpoints import (
    by_rows,
    count_trials,
    description,
    example,
    load_example,
    load_latest,
    scratch,
)

RANKS = 2


def _save(rank: int, root: Path) -> None:
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    for iteration in (1, 2):
        # Numbers as in a configuration, of which some bits can change without changing the value.
        numbers = {"config": {"adam_eps": 1e-8, "lr": 1e-4, "init_method_std": 0.02}}
        save_checkpoint(root, iteration, by_rows(example(iteration)), description(iteration) | numbers, context)


def save_two(root: Path) -> Path:
    """Save iterations 1 and 2 from two ranks; returns the directory of the newer."""
    run_distributed(_save, RANKS, root)
    path = checkpoint_path(root, 2)
    assert len(list(path.glob("*.safetensors"))) == RANKS
    return path


def check_refused(path: Path) -> None:
    """The newer checkpoint is refused in one line that names it, and the older is loaded, complete."""
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error), f"unclear message {error}"
    else:
        raise AssertionError("not found")
    assert load_latest(path.parent) == 1


def flips(path: Path, number: int, seed: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trial for each of `number` flipped bits, spread evenly over the files of the checkpoint `path`."""
    generator = random.Random(seed)
    files = sorted(path.iterdir())
    for index in range(number):
        file = files[index % len(files)]
        content = file.read_bytes()
        changed = content
        # Some flips in JSON change nothing, such as e and E in a number; they are no damage.
        while changed == content or (file.name == MANIFEST and _same_value(changed, content)):
            bit = generator.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            changed = bytes(flipped)
        yield f"bit {bit} of {file.name}", partial(_try, file, changed)


def _same_value(changed: bytes, content: bytes) -> bool:
    try:
        return bool(json.loads(changed) == json.loads(content))
    except ValueError:
        return False


def _try(file: Path, changed: bytes) -> None:
    content = file.read_bytes()
    file.write_bytes(changed)
    try:
        check_refused(file.parent)
    finally:
        file.write_bytes(content)


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of `path` and give it the right checksum."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    del manifest["manifest_checksum"]
    change(manifest)
    (path / MANIFEST).write_bytes(encode_manifest(manifest))


def _first_shard(path: Path) -> Path:
    return min(path.glob("*.safetensors"))


def _truncate(path: Path) -> None:
    shard = _first_shard(path)
    shard.write_bytes(shard.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    with _first_shard(path).open("ab") as shard:
        shard.write(b"\0")


def _exchange(path: Path) -> None:
    first, second = sorted(path.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _shard_of_another(path: Path) -> None:
    shard = _first_shard(path)
    shutil.copy(checkpoint_path(path.parent, 1) / shard.name, shard)


def _directory_for_shard(path: Path) -> None:
    shard = _first_shard(path)
    shard.unlink()
    shard.mkdir()


def _drop_second_shard_from_manifest(manifest: dict[str, Any]) -> None:
    del manifest["files"][max(manifest["files"])]


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing shard": lambda path: _first_shard(path).unlink(),
    "empty shard": lambda path: _first_shard(path).write_bytes(b""),
    "truncated shard": _truncate,
    "longer shard": _lengthen,
    "shards exchanged": _exchange,
    "shard of another checkpoint": _shard_of_another,
    "directory for a shard": _directory_for_shard,
    "missing manifest": lambda path: (path / MANIFEST).unlink(),
    "empty manifest": lambda path: (path / MANIFEST).write_bytes(b""),
    "truncated manifest": lambda path: (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes()[:-40]),
    "manifest without a shard": lambda path: edit_manifest(path, _drop_second_shard_from_manifest),
    "older format version": lambda path: edit_manifest(path, lambda manifest: manifest.update(format_version=0)),
    "newer format version": lambda path: edit_manifest(path, lambda manifest: manifest.update(format_version=2)),
    "no format version": lambda path: edit_manifest(path, lambda manifest: manifest.pop("format_version")),
}


def damages(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trial for each kind of damage to the checkpoint `path`, on a copy of it and of the one before."""
    for number, (name, damage) in enumerate(DAMAGES.items()):
        yield name, partial(_try_damage, path, path.parent.with_name(f"damaged-{number}"), damage)
    yield "file that the manifest does not list", partial(_try_extra_file, path)


def _try_damage(path: Path, copy: Path, damage: Callable[[Path], None]) -> None:
    shutil.copytree(path.parent, copy)
    damage(copy / path.name)
    check_refused(copy / path.name)


def _try_extra_file(path: Path) -> None:
    """What the manifest does not list is not read, so it can do no harm."""
    extra = path / "shard_00002_of_00003.safetensors"
    shutil.copy(_first_shard(path), extra)
    try:
        assert load_latest(path.parent) == 2
    finally:
        extra.unlink()


def _load_on_ranks(rank: int, root: Path) -> tuple[str, list[bool]]:
    """Name of the checkpoint that two ranks find together, and whether each tensor is the one that was saved in it."""
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    path = latest_checkpoint(root, context)
    assert path is not None
    found = by_rows({name: torch.full_like(tensor, 77) for name, tensor in example(0).items()})
    load_checkpoint(path, found)
    wanted = by_rows(example(int(found["optimizer/step"])))
    return path.name, [torch.equal(_local(found[name]), _local(tensor)) for name, tensor in wanted.items()]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _try_on_ranks(root: Path, shard: Path, position: float) -> None:
    """One flip, found by ranks that share the reading: whichever rank reads the file, all fall back."""
    content = shard.read_bytes()
    changed = bytearray(content)
    changed[int(position * len(content))] ^= 1
    shard.write_bytes(changed)
    try:
        for name, equal in run_distributed(_load_on_ranks, RANKS, root):
            assert name == "iter_0000001" and all(equal), f"{name} was loaded, tensors equal: {equal}"
    finally:
        shard.write_bytes(content)


def on_ranks(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trial for the first and the last bytes of each shard."""
    for shard in sorted(path.glob("*.safetensors")):
        for position in (0.0, 0.5, 0.999):
            yield f"{shard.name} at {position}", partial(_try_on_ranks, path.parent, shard, position)


def count(trials: int = 50, seed: int = 12) -> list[dict[str, Any]]:
    """Flipped bits, other damage, and flipped bits met by two ranks that load together."""
    with scratch() as folder:
        path = save_two(Path(folder, "root"))
        rows = [
            count_trials("R12", "bit flips in a checkpoint found, the one before loaded", flips(path, trials, seed)),
            count_trials("R12", "missing, truncated, foreign and extra files, other format versions", damages(path)),
            count_trials("R12", "bit flips found by two ranks that load together", on_ranks(path)),
        ]
        assert load_example(path) == 2  # everything has been put back
    return rows
