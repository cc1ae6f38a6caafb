"""The layout of a checkpoint on disk, and how a complete one is recognised.

    <root>/
      latest_checkpointed_iteration.txt       a hint for people and scripts; nothing here relies on it
      iter_0000100/
        manifest.json                         everything that is not a tensor, and where each tensor lies
        shard_00000_of_00002.safetensors      what one rank wrote
      iter_0000200.tmp-1f2e3d4c/              a save that has not been published (swept by the next save)
      iter_0000100.replaced/                  the old version while a directory is replaced

A directory `iter_*` appears by a rename after everything in it is on the disk, so it is complete or not there. Nothing
in it is ever unpickled: JSON and safetensors only.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron.core.errors import UserError
from megatron.core.file_utils import fsync_directory

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
HINT = "latest_checkpointed_iteration.txt"
CHECKSUM_ALGORITHM = "crc32"
READ_BYTES = 8 * 2**20

_ITERATION = re.compile(r"iter_(\d{7,})(\.replaced)?")
_TEMPORARY = re.compile(r"iter_\d{7,}\.tmp-[0-9a-f]+")
_SHARD = re.compile(
    r"shard_\d{5,}_of_\d{5,}\.safetensors"
)  # a bare name: a manifest cannot point outside its directory

# Names that the safetensors format has for dtypes.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint cannot be saved, found or loaded; the message names the path and the cause."""


def checkpoint_path(root: Path, iteration: int) -> Path:
    """Directory of the checkpoint of `iteration`."""
    return root / f"iter_{iteration:07d}"


def shard_name(rank: int, world_size: int) -> str:
    """Name of the file that `rank` writes."""
    return f"shard_{rank:05d}_of_{world_size:05d}.safetensors"


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """JSON text of `manifest` with a checksum of itself; one line for each key."""
    manifest = json.loads(json.dumps(manifest))  # as it will be read: keys are strings, tuples are lists
    complete = manifest | {"manifest_checksum": zlib.crc32(_canonical(manifest))}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in complete.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint directory `path`.

    Raises:
        CheckpointError: It is missing, damaged, of an unknown format version or inconsistent in itself.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: cannot read {MANIFEST}: {error.strerror}"
        ) from None
    except ValueError as error:  # JSON and Unicode errors
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise CheckpointError(f"{file} is not the manifest of a checkpoint of this program")
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {manifest['format_version']}, this program reads version {FORMAT_VERSION}; "
            "use the version that wrote it"
        )
    checksum = manifest.pop("manifest_checksum", None)
    if checksum != zlib.crc32(_canonical(manifest)):
        raise CheckpointError(f"{file} is damaged: its checksum is not the recorded {checksum}")
    try:
        _validate(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is malformed: {type(error).__name__} {error}") from None
    return manifest


def _validate(manifest: dict[str, Any]) -> None:
    """Raise ValueError, or what a wrong type raises, unless files and tensors are described consistently."""
    for name, entry in manifest["files"].items():
        if not _SHARD.fullmatch(name):
            raise ValueError(f"file name {name!r}")
        if entry["bytes"] < 0:
            raise ValueError(f"size of {name}")
    for name, entry in manifest["tensors"].items():
        shape, volume = entry["shape"], 0
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"dtype {entry['dtype']!r} of {name}")
        for chunk in entry["chunks"]:
            if chunk["file"] not in manifest["files"]:
                raise ValueError(f"{name} lies in the unlisted file {chunk['file']!r}")
            bounds = list(zip(chunk["offsets"], chunk["sizes"], shape, strict=True))
            if any(offset < 0 or size < 1 or offset + size > length for offset, size, length in bounds):
                raise ValueError(f"a chunk of {name} lies outside its shape {shape}")
            volume += math.prod(chunk["sizes"])
        if volume != math.prod(shape):
            raise ValueError(f"the chunks of {name} hold {volume} of {math.prod(shape)} elements")


def check_file_sizes(path: Path, manifest: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless every file that `manifest` lists is in `path` with the recorded size."""
    for name, entry in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{file} {found}, expected {entry['bytes']} bytes; use another checkpoint")


def verify_checkpoint(path: Path) -> None:
    """Read the whole checkpoint and raise `CheckpointError` unless sizes and checksums are as recorded."""
    manifest = read_manifest(path)
    check_file_sizes(path, manifest)
    for name, entry in manifest["files"].items():
        try:
            checksum = _checksum(path / name)
        except OSError as error:
            raise CheckpointError(f"cannot read {path / name}: {error.strerror}; use another checkpoint") from None
        if checksum != entry[CHECKSUM_ALGORITHM]:
            raise CheckpointError(
                f"{path / name} is damaged: checksum {checksum}, recorded {entry[CHECKSUM_ALGORITHM]}; "
                "use another checkpoint"
            )


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while block := content.read(READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _published(root: Path) -> Iterator[tuple[int, bool, Path]]:
    """Checkpoint directories under `root`: (iteration, whether it is the current version, path)."""
    for path in root.iterdir() if root.is_dir() else ():
        match = _ITERATION.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), match[2] is None, path


def published_checkpoints(root: Path) -> list[Path]:
    """Checkpoint directories under `root`, sound or not, the newest first."""
    return [path for _, _, path in sorted(_published(root), reverse=True)]


def latest_checkpoint(root: Path) -> Path | None:
    """The sound checkpoint of the highest iteration under `root`, or None.

    Sound is what `verify_checkpoint` accepts: a manifest of a known version, and all files there with the recorded
    sizes and checksums. Directories that are not are passed over with a warning.
    """
    for path in published_checkpoints(root):
        problem = _damage(path)
        if problem is None:
            return path
        logger.warning("warning: passing over a checkpoint: %s", problem)
    return None


def _damage(path: Path) -> CheckpointError | None:
    """What is wrong with the checkpoint `path`, or None if it is sound."""
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        return error
    return None


def sweep(root: Path) -> None:
    """Remove what interrupted saves left under `root`; undo a replacement that was cut short."""
    for path in list(root.iterdir()):
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)
    for iteration, current, path in list(_published(root)):
        if not current:
            final = checkpoint_path(root, iteration)
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)


def publish_directory(temporary: Path, final: Path) -> None:
    """Give `temporary`, whose files are on the disk, the name `final`; an older `final` is replaced.

    At every instant `latest_checkpoint` finds the old version or the new one.
    """
    fsync_directory(temporary)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    fsync_directory(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
