"""Full scan of an indexed dataset: every entry of the index, every id, every checksum, the copy of the tokenizer.

Files are read in blocks, so that memory does not grow with the corpus, and never mapped, so that a disk that fails is
an error and not the end of the process.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.core.datasets.indexed_dataset import (
    HEADER_BYTES,
    UNCHECKED_MANIFEST_VERSION,
    IndexedDataset,
    bin_path,
    idx_path,
    manifest_path,
)
from megatron.core.errors import UserError
from megatron.core.tokenizers import load_tokenizer

_BLOCK_BYTES = 1 << 20  # stays in the processor's cache between checksum and scan; a multiple of every dtype's size
_BLOCK_ENTRIES = 1 << 16  # of the index


@dataclass
class DatasetReport:
    """A dataset that is sound.

    Attributes:
        num_documents: Documents.
        num_tokens: Ids.
        num_bytes: Bytes of all files that were read.
        unchecked: What could not be checked, and why.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int = 0
    unchecked: list[str] = field(default_factory=list)


def verify_dataset(prefix: str | Path) -> DatasetReport:
    """Read all of the dataset `<prefix>.bin`, `.idx`, `.json` and its tokenizer.

    Raises:
        UserError: it is not sound; the message names the file and, where that is known, the place in it.
    """
    index_checksum = _checksum(idx_path(prefix))
    dataset = IndexedDataset(prefix)
    report = DatasetReport(dataset.num_documents, dataset.num_tokens)
    manifest = dataset.manifest
    if manifest is None:
        report.unchecked.append("checksums and vocabulary (no manifest)")
    elif manifest["version"] == UNCHECKED_MANIFEST_VERSION:
        report.unchecked.append("checksums (the manifest is of a version without)")
    vocab_size = None if manifest is None else _verify_tokenizer(dataset, manifest, report)
    _verify_index(dataset)
    _compare(idx_path(prefix), index_checksum, manifest, "idx")
    _compare(bin_path(prefix), _verify_ids(dataset, vocab_size), manifest, "bin")
    files = [bin_path(prefix), idx_path(prefix), *([] if manifest is None else [manifest_path(prefix)])]
    report.num_bytes += sum(path.stat().st_size for path in files)
    return report


def _blocks(path: Path, start: int = 0, stop: int | None = None, size: int = _BLOCK_BYTES) -> Iterator[memoryview]:
    """Bytes `start` to `stop` of a file, `size` at a time; each block is overwritten by the next.

    Raises:
        UserError: the file cannot be read, or ends too early.
    """
    buffer = memoryview(bytearray(size))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while stop is None or start < stop:
                wanted = size if stop is None else min(size, stop - start)
                count = 0
                while count < wanted and (part := file.readinto(buffer[count:wanted])):
                    count += part
                if count < wanted and stop is not None:
                    raise UserError(f"{path} ends at byte {start + count}: it became shorter while it was read")
                if count == 0:
                    return
                yield buffer[:count]
                start += count
    except OSError as error:
        raise UserError(f"{path} cannot be read at byte {start}: {error.strerror or error}") from error


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    checksum = 0
    for block in _blocks(path):
        checksum = zlib.crc32(block, checksum)
    return checksum


def _compare(path: Path, checksum: int, manifest: dict[str, Any] | None, name: str) -> None:
    """Raise UserError unless the checksum is the recorded one, if there is one."""
    if manifest is None or manifest["version"] == UNCHECKED_MANIFEST_VERSION:
        return
    recorded = _entry(manifest, "files", name, "crc32")
    if checksum != recorded:
        raise UserError(
            f"{path} is damaged: its checksum is {checksum:#010x}, recorded {_hexadecimal(recorded)}; "
            "copy it again or preprocess the corpus again"
        )


def _hexadecimal(value: Any) -> str:
    return f"{value:#010x}" if isinstance(value, int) else repr(value)


def _entry(content: Any, *keys: str) -> Any:
    """The value under nested keys, or None."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _verify_tokenizer(dataset: IndexedDataset, manifest: dict[str, Any], report: DatasetReport) -> int | None:
    """Check the copy of the tokenizer; returns the size of its vocabulary, None when the manifest names none."""
    name, recorded = manifest.get("tokenizer_directory"), manifest.get("tokenizer")
    if name is None and recorded is None:
        report.unchecked.append("vocabulary (the manifest names no tokenizer)")
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{manifest_path(dataset.prefix)}: tokenizer_directory is {name!r}, not a name beside it")
    directory = dataset.prefix.parent / name
    files = manifest.get("tokenizer_files", {})
    for file, expected in files.items() if isinstance(files, dict) else ():
        path = directory / Path(file).name
        checksum = _checksum(path)
        if checksum != _entry(expected, "crc32"):
            raise UserError(
                f"{path} is damaged: its checksum is {checksum:#010x}, recorded "
                f"{_hexadecimal(_entry(expected, 'crc32'))}; copy it again"
            )
        report.num_bytes += path.stat().st_size
    tokenizer = load_tokenizer(directory)
    if tokenizer.describe() != recorded:
        raise UserError(
            f"{directory} is not the tokenizer that {manifest_path(dataset.prefix)} describes (fingerprint "
            f"{tokenizer.fingerprint[:12]}, recorded {str(_entry(recorded, 'fingerprint'))[:12]}); copy it again"
        )
    return tokenizer.vocab_size


def _verify_index(dataset: IndexedDataset) -> None:
    """Check that sequences follow one another without a gap, and that documents are runs of them."""
    path, sequences = idx_path(dataset.prefix), dataset.num_sequences
    pointers_at, documents_at = HEADER_BYTES + 4 * sequences, HEADER_BYTES + 12 * sequences
    all_lengths = _blocks(path, HEADER_BYTES, pointers_at, 4 * _BLOCK_ENTRIES)
    all_pointers = _blocks(path, pointers_at, documents_at, 8 * _BLOCK_ENTRIES)
    first = end = 0  # number of the block's first sequence, and the byte where the one before ends
    for length_block, pointer_block in zip(all_lengths, all_pointers, strict=True):
        lengths, pointers = np.frombuffer(length_block, "<i4"), np.frombuffer(pointer_block, "<i8")
        ends = end + np.cumsum(lengths, dtype=np.int64) * dataset.dtype.itemsize
        starts = np.concatenate(([end], ends[:-1]))
        if (bad := _first(lengths < 0)) is not None:
            raise _damaged(path, HEADER_BYTES + 4 * (first + bad), f"sequence {first + bad} has {lengths[bad]} tokens")
        if (bad := _first(pointers != starts)) is not None:
            found = f"sequence {first + bad} starts at byte {pointers[bad]}, the one before ends at {starts[bad]}"
            raise _damaged(path, pointers_at + 8 * (first + bad), found)
        first, end = first + lengths.size, int(ends[-1])
    first = before = 0
    for block in _blocks(path, documents_at, documents_at + 8 * (dataset.num_documents + 1), 8 * _BLOCK_ENTRIES):
        starts = np.frombuffer(block, "<i8")
        if (bad := _first((np.diff(starts, prepend=before) < 0) | (starts > sequences))) is not None:
            found = f"document {first + bad} starts at sequence {starts[bad]} of {sequences}, not behind the one before"
            raise _damaged(path, documents_at + 8 * (first + bad), found)
        first, before = first + starts.size, int(starts[-1])


def _verify_ids(dataset: IndexedDataset, vocab_size: int | None) -> int:
    """Check that every id is in the vocabulary, or at least not negative; returns the checksum of the `.bin`."""
    path, signed = bin_path(dataset.prefix), dataset.dtype.kind == "i"
    last_id = np.iinfo(dataset.dtype).max if vocab_size is None else vocab_size - 1
    checksum = token = 0
    for block in _blocks(path, 0, dataset.num_tokens * dataset.dtype.itemsize):
        checksum = zlib.crc32(block, checksum)
        ids = np.frombuffer(block, dataset.dtype)
        if ids.max() > last_id or (signed and ids.min() < 0):
            bad = _first((ids < 0) | (ids > last_id))
            assert bad is not None
            at = token + bad
            sequence = int(np.searchsorted(dataset.sequence_pointers, at * dataset.dtype.itemsize, side="right")) - 1
            limit = (
                "a negative one" if vocab_size is None or ids[bad] < 0 else f"outside the vocabulary of {vocab_size}"
            )
            raise _damaged(
                path, at * dataset.dtype.itemsize, f"token {at} (sequence {sequence}) is id {ids[bad]}, {limit}"
            )
        token += ids.size
    return checksum


def _first(bad: npt.NDArray[np.bool_]) -> int | None:
    """Place of the first True, if there is one."""
    place = int(bad.argmax())
    return place if bad[place] else None


def _damaged(path: Path, byte: int, found: str) -> UserError:
    return UserError(f"{path} is damaged at byte {byte}: {found}; copy it again or preprocess the corpus again")
