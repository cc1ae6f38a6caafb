"""The layout of a checkpoint on disk, and how a complete one is recognised.

    <root>/
      latest_checkpointed_iteration.txt       a hint for people and scripts; nothing here relies on it
      iter_0000100/
        manifest.json                         everything that is not a tensor, and where each tensor lies
        shard_00000_of_00002.safetensors      what one rank wrote
      iter_0000200.tmp-1f2e3d4c/              a save not yet published, or a removal (swept by the next save)
      iter_0000100.replaced/                  the old version while a directory is replaced

A directory `iter_*` appears by a rename after everything in it is on the disk, so it is complete or not there. Nothing
in it is ever unpickled: JSON and safetensors only. What is read is not trusted: sizes are bounded before memory is
taken, links, pipes and devices are not opened, and whatever is wrong is a `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zlib
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from megatron.core.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
HINT = "latest_checkpointed_iteration.txt"
CHECKSUM_ALGORITHM = "crc32"
MAX_MANIFEST_BYTES = 2**28  # some two million pieces of tensors; a text of this size takes a few GiB once read
MAX_MESSAGE_LENGTH = 1000
MAX_DIMENSIONS = 64  # torch's limit

_SHARD = re.compile(
    r"shard_\d{5,}_of_\d{5,}\.safetensors"
)  # a bare name: a manifest cannot point outside its directory

# Names that the safetensors format has for dtypes.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class CheckpointError(UserError):
    """A checkpoint cannot be saved, found or loaded; the message names the path and the cause.

    It may quote what a damaged file holds: it becomes one printable line of bounded length.
    """

    def __init__(self, message: str) -> None:
        line = "".join(character if character.isprintable() else " " for character in message)
        super().__init__(line if len(line) <= MAX_MESSAGE_LENGTH else line[:MAX_MESSAGE_LENGTH] + "...")


def checkpoint_path(root: Path, iteration: int) -> Path:
    """Directory of the checkpoint of `iteration`."""
    return root / f"iter_{iteration:07d}"


def shard_name(rank: int, world_size: int) -> str:
    """Name of the file that `rank` writes."""
    return f"shard_{rank:05d}_of_{world_size:05d}.safetensors"


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """JSON text of `manifest` with a checksum of itself; one line for each key.

    Raises:
        CheckpointError: It is too long to be read again.
    """
    manifest = json.loads(json.dumps(manifest))  # as it will be read: keys are strings, tuples are lists
    complete = manifest | {"manifest_checksum": zlib.crc32(_canonical(manifest))}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in complete.items()]
    text = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    if len(text) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"the manifest would have {len(text)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    return text


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def open_regular(file: Path) -> FileIO:
    """Open `file` for reading, unbuffered.

    Raises:
        CheckpointError: It is not a regular file. Links could lead anywhere, pipes block and devices never end.
        OSError: It cannot be opened.
    """
    if not stat.S_ISREG(file.lstat().st_mode):
        raise CheckpointError(f"{file} is not a regular file; use another checkpoint")
    return file.open("rb", buffering=0)


def parse_object(text: bytes | bytearray, file: Path) -> dict[str, Any]:
    """The JSON object that `text`, of `file`, holds.

    Raises:
        CheckpointError: It is no JSON object, nested too deeply, or says something twice.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # ValueError: JSON, Unicode, integers of thousands of digits
        raise CheckpointError(f"{file} is damaged: {error}; use another checkpoint") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: it holds no JSON object; use another checkpoint")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint directory `path`.

    What the format itself says (version, files, tensors) is checked; the rest is as it was given to the save.

    Raises:
        CheckpointError: It is missing, damaged, of an unknown format version or inconsistent in itself.
    """
    file = path / MANIFEST
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link; use the directory it points to")
    try:
        with open_regular(file) as content:
            size = os.fstat(content.fileno()).st_size
            text = content.readall() if size <= MAX_MANIFEST_BYTES else b""
    except OSError as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: cannot read {MANIFEST}: {error.strerror}"
        ) from None
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{file} has {size} bytes, the limit is {MAX_MANIFEST_BYTES}; use another checkpoint")
    manifest = parse_object(text, file)
    if "format_version" not in manifest:
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
    _whole(manifest["iteration"])
    for name, entry in manifest["files"].items():
        if not _SHARD.fullmatch(name):
            raise ValueError(f"file name {name!r}")
        _whole(entry["bytes"])
        _whole(entry[CHECKSUM_ALGORITHM])
    used: Counter[str] = Counter()  # bytes of tensors in each file
    for name, entry in manifest["tensors"].items():
        shape = [_whole(length) for length in entry["shape"]]
        if entry["dtype"] not in DTYPES or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"dtype {entry['dtype']!r} and {len(shape)} dimensions of {name}")
        volume = 0
        for chunk in entry["chunks"]:
            if chunk["file"] not in manifest["files"] or not isinstance(chunk["key"], str):
                raise ValueError(f"{name} lies in the unlisted file {chunk['file']!r}")
            bounds = zip(map(_whole, chunk["offsets"]), map(_whole, chunk["sizes"]), shape, strict=True)
            if any(size < 1 or offset + size > length for offset, size, length in bounds):
                raise ValueError(f"a chunk of {name} lies outside its shape {shape}")
            volume += math.prod(chunk["sizes"])
            used[chunk["file"]] += math.prod(chunk["sizes"]) * DTYPES[entry["dtype"]].itemsize
        if volume != math.prod(shape):
            raise ValueError(f"the chunks of {name} hold {volume} of {math.prod(shape)} elements")
        if _overlap([(chunk["offsets"], chunk["sizes"]) for chunk in entry["chunks"]]):
            raise ValueError(f"chunks of {name} overlap, so that others are missing")
    for name, count in used.items():  # so that no size can be claimed that is not on the disk
        if count > manifest["files"][name]["bytes"]:
            raise ValueError(f"{count} bytes of tensors in {name}, which has {manifest['files'][name]['bytes']}")


def _overlap(chunks: list[tuple[list[int], list[int]]]) -> bool:
    """Whether any two of these (offsets, sizes), which have dimensions if there are two, share an element."""
    if len(chunks) < 2:
        return False
    dimensions = range(len(chunks[0][0]))
    # In the order of the dimension that is cut most often, a chunk can only meet the few that have not ended there.
    along = max(dimensions, key=lambda dimension: len({offsets[dimension] for offsets, _ in chunks}))
    reached: list[tuple[list[int], list[int]]] = []
    for offsets, sizes in sorted(chunks, key=lambda chunk: chunk[0][along]):
        reached = [(o, s) for o, s in reached if o[along] + s[along] > offsets[along]]
        if any(all(o[d] < offsets[d] + sizes[d] and offsets[d] < o[d] + s[d] for d in dimensions) for o, s in reached):
            return True
        reached.append((offsets, sizes))
    return False


def _whole(value: object) -> int:
    """`value` if it is an integer that a size or position can be."""
    if type(value) is not int or not 0 <= value < 2**63:  # a bool is no size
        raise ValueError(f"{value!r} is not a size")
    return value


def check_file_sizes(path: Path, manifest: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless every file that `manifest` lists is in `path` with the recorded size."""
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            found = file.lstat()
        except OSError as error:
            raise CheckpointError(f"{file} is missing ({error.strerror}); use another checkpoint") from None
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{file} is not a regular file; use another checkpoint")
        if found.st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file} has {found.st_size} bytes, expected {entry['bytes']}; use another checkpoint"
            )


def looks_sound(path: Path) -> bool:
    """Whether the manifest of `path` can be read and its files have the recorded sizes; checksums are not compared."""
    try:
        check_file_sizes(path, read_manifest(path))
    except CheckpointError:
        return False
    return True
