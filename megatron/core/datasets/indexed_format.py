"""What the reader and the writer of indexed datasets share: layout of the index, names of the files, manifests."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.core.errors import UserError
from megatron.core.file_utils import fsync_directory

MANIFEST_FORMAT = "megatron-t5 indexed dataset"
MANIFEST_VERSION = 2
UNCHECKED_MANIFEST_VERSION = 1  # of manifests without checksums
SHARDED_FORMAT = "megatron-t5 sharded dataset"  # of the manifest that joins several datasets (corpus.py)

_MANIFEST_START = re.compile(rb'\s*\{\s*"format":\s*"(megatron-t5 (?:indexed|sharded) dataset)"')
_MANIFEST_START_BYTES = 256

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = HEADER.size
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}  # fmt: skip
FLOAT_CODES = {6: "float64", 7: "float32"}

Tokens = npt.NDArray[Any]


def optimal_dtype(vocab_size: int) -> np.dtype:
    """Megatron-LM's rule for the dtype of ids: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """`<prefix>.bin`; the prefix may itself contain dots."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`<prefix>.idx`."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """`<prefix>.json`."""
    return Path(f"{prefix}.json")


def resolve_prefix(path: str | Path) -> Path:
    """The dataset prefix that `path` means: as given, else with `_text_document` appended.

    Raises:
        UserError: neither is a dataset.
    """
    given, text = Path(path), Path(f"{path}_text_document")
    for candidate in (given, text):
        if is_dataset(candidate):
            return candidate
    raise UserError(
        f"--data-path {path}: neither {idx_path(given)} nor {idx_path(text)} exists; "
        "give the prefix of a dataset that tools/preprocess_data.py wrote"
    )


def shard_prefix(prefix: str | Path, number: int) -> Path:
    """Prefix of a shard of a sharded corpus."""
    return Path(f"{prefix}-{number:05d}")


def manifest_format(path: Path) -> str | None:
    """The format that a manifest of this project names, its first entry; None: `path` is something else or missing."""
    try:
        with path.open("rb") as file:
            found = _MANIFEST_START.match(file.read(_MANIFEST_START_BYTES))
    except OSError:
        return None
    return found[1].decode() if found else None


def is_sharded(prefix: str | Path) -> bool:
    """Whether `<prefix>.json` is the manifest of a sharded corpus; reads its beginning only."""
    return manifest_format(manifest_path(prefix)) == SHARDED_FORMAT


def require_own_manifest(prefix: str | Path) -> None:
    """Check that `<prefix>.json` may be replaced: nothing is there, or the manifest of a dataset.

    Raises:
        UserError: it is something else, perhaps the text of a corpus.
    """
    path = manifest_path(prefix)
    if (path.exists() or path.is_symlink()) and manifest_format(path) is None:
        raise UserError(f"{path} is not the manifest of a dataset, and would be replaced by one; move or rename it")


def is_dataset(prefix: str | Path) -> bool:
    """Whether a file of a dataset of this prefix, or the manifest of a sharded corpus, is there."""
    return idx_path(prefix).is_file() or bin_path(prefix).is_file() or is_sharded(prefix)


def remove_dataset(prefix: str | Path) -> None:
    """Remove `<prefix>.idx`, `.bin` and `.json` where they exist; the index first, so that no half opens.

    Of a sharded corpus the manifest goes first, then the shards that it lists (none when it cannot be read).

    Raises:
        UserError: a `.json` is no manifest; nothing was removed.
    """
    require_own_manifest(prefix)
    if is_sharded(prefix):
        try:
            num_shards = len(json.loads(manifest_path(prefix).read_bytes())["shards"])
        except (ValueError, TypeError, KeyError, RecursionError):
            num_shards = 0
        for number in range(num_shards):
            require_own_manifest(shard_prefix(prefix, number))
        manifest_path(prefix).unlink()
        fsync_directory(manifest_path(prefix).parent)
        for number in range(num_shards):
            remove_dataset(shard_prefix(prefix, number))
    for path in (idx_path(prefix), bin_path(prefix), manifest_path(prefix)):
        path.unlink(missing_ok=True)


def manifest_checksum(content: dict[str, Any]) -> int:
    """CRC-32 of a manifest's `content`, without the checksum itself."""
    return zlib.crc32(json.dumps(content).encode())


def encode_manifest(content: dict[str, Any]) -> bytes:
    """JSON text of a manifest's `content` and of its checksum, which is the last entry."""
    return (json.dumps(content | {"manifest_crc32": manifest_checksum(content)}, indent=2) + "\n").encode()


def manifest_counts(dtype: np.dtype, tokens: int, sequences: int, documents: int) -> dict[str, Any]:
    """The part of a manifest that follows from the data itself."""
    return {
        "dtype": dtype.name,
        "num_tokens": tokens,
        "num_sequences": sequences,
        "num_documents": documents,
        "bin_bytes": tokens * dtype.itemsize,
    }
