"""Writes indexed datasets (the format is in `indexed_dataset.py`): streaming, atomic, and resumable."""

from __future__ import annotations

import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.core.datasets.checksums import combined_crc32
from megatron.core.datasets.file_copies import copy_range
from megatron.core.datasets.indexed_format import (
    DTYPES,
    HEADER,
    MAGIC,
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    VERSION,
    Tokens,
    bin_path,
    encode_manifest,
    idx_path,
    manifest_counts,
    manifest_path,
    remove_dataset,
    require_own_manifest,
)
from megatron.core.datasets.output_lock import OutputLock
from megatron.core.errors import UserError
from megatron.core.file_utils import fsync_directory, is_at, partial_path, write_durably

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

_BLOCK = 1 << 20  # sequences per step of the streaming passes: 12 MiB of memory


class _ChecksummedFile:
    """Writes to a file; knows the bytes and the CRC-32 of what was written."""

    def __init__(self, file: BinaryIO, size: int = 0, crc32: int = 0) -> None:
        self._file = file
        self.bytes, self.crc32 = size, crc32

    def write(self, block: Any) -> None:
        self._file.write(block)
        self.crc32 = zlib.crc32(block, self.crc32)
        self.bytes += memoryview(block).nbytes

    def append(self, num_bytes: int, crc32: int) -> None:
        """Count what came to the end of the file by another way."""
        self.crc32 = combined_crc32(self.crc32, crc32, num_bytes)
        self.bytes += num_bytes

    def describe(self) -> dict[str, int]:
        return {"bytes": self.bytes, "crc32": self.crc32}


class WriterState(NamedTuple):
    """How far a writer has come; with its unfinished files, all that another one needs to go on."""

    num_tokens: int
    num_sequences: int
    num_documents: int
    one_sequence_per_document: bool
    bin_crc32: int


class IndexedDatasetWriter:
    """Streaming writer; memory does not grow with the corpus.

    Use it as a context manager and call `finalize` at the end; leaving the block without it, or by an exception,
    discards everything. `finalize` is `prepare`, which writes all that is missing, and `publish`, which only renames:
    until `publish`, nothing is under the final names (an older dataset of the same prefix stays usable, also when the
    disk is full). `publish` removes the old dataset, its index first, and renames the `.bin`, the manifest and the
    `.idx` in this order: whatever the instant of a crash, an index that opens has its own `.bin` and manifest.

    Args:
        prefix: Path without `.bin` and `.idx`; its directory is created.
        dtype: Integer dtype of the ids (`optimal_dtype`).
        overwrite: Replace a dataset that exists; otherwise it is refused.
        state: What `checkpoint` returned to a writer that ended without `discard` (or was killed): go on from there.
        is_locked: The caller has the lock of the prefix (output_lock.py); otherwise the writer takes it.

    Raises:
        UserError: the dataset exists and `overwrite` is not set, another process is writing it, `<prefix>.json` is no
            manifest, or the files to go on with are gone.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: npt.DTypeLike,
        overwrite: bool = False,
        state: WriterState | None = None,
        *,
        is_locked: bool = False,
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next((code for code, known in DTYPES.items() if known == self.dtype), None)
        if self._code is None:
            raise UserError(f"token ids cannot be stored as {self.dtype}; use one of {list(map(str, DTYPES.values()))}")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._lock = None if is_locked else OutputLock(prefix)
        try:
            if idx_path(prefix).exists() and not overwrite:
                raise UserError(
                    f"{idx_path(prefix)} exists; give another --output-prefix, or --overwrite to replace it"
                )
            require_own_manifest(prefix)
            if self._lock is not None:
                self._lock.take_over()
            self._open(state)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def _open(self, state: WriterState | None) -> None:
        start = state or WriterState(0, 0, 0, True, 0)
        self.num_tokens, self.num_sequences, self.num_documents = start[:3]
        self._one_sequence_per_document = start.one_sequence_per_document
        self._partial_bin = partial_path(bin_path(self.prefix))
        if state is None:
            # Removed, and not emptied: what a killed program left may be a hard link to somebody's data.
            remove_partials(self.prefix)
        for path in (idx_path(self.prefix), manifest_path(self.prefix)):
            partial_path(path).unlink(missing_ok=True)  # of a crash between `prepare` and `publish`
        # Lengths and document ends wait in files: lists of them would outgrow memory on large corpora.
        lengths, document_ends = _spool_paths(self.prefix)
        bin_bytes = self.num_tokens * self.dtype.itemsize
        self._bin = _opened(self._partial_bin, bin_bytes)
        try:
            self._lengths = _opened(lengths, 4 * self.num_sequences)  # int32[S]
            self._document_ends = _opened(document_ends, 8 * self.num_documents)  # int64[D - 1]
        except BaseException:
            self._bin.close()
            raise
        self._bin_content = _ChecksummedFile(self._bin, bin_bytes, start.bin_crc32)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.discard()

    def add_document(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> None:
        """Append one document.

        Args:
            tokens: Ids of the document.  # [num_tokens]
            lengths: Tokens of each of its sequences (sentences); they sum to num_tokens. Default: one sequence.
        """
        ids = self._checked_ids(tokens)
        self._append(ids, np.asarray([ids.size] if lengths is None else lengths, dtype=np.int64))
        self._end_documents(np.array([self.num_sequences]))

    def add_documents(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Append many documents of one sequence each: their ids end to end, and the tokens of each of them."""
        first = self.num_sequences
        self._append(self._checked_ids(tokens), np.asarray(lengths, dtype=np.int64))
        self._end_documents(np.arange(first, self.num_sequences) + 1)

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset, streaming.

        Where its manifest has the checksum of its ids, the file system copies them (or shares the blocks), and they
        are not read: damage that the checksum finds there is found here too.

        Raises:
            UserError: its dtype is not this writer's, or its index is damaged.
        """
        if dataset.dtype != self.dtype:
            raise UserError(
                f"{dataset.prefix} holds {dataset.dtype.name} ids, expected {self.dtype.name}; only alike join"
            )
        first, token = self.num_sequences, 0
        crc32 = dataset.recorded_crc32
        for start in range(0, dataset.num_sequences, _BLOCK):
            lengths = np.asarray(dataset.sequence_lengths[start : start + _BLOCK], dtype=np.int64)
            block = int(lengths.sum())
            if lengths.min() < 0 or token + block > dataset.num_tokens:
                break
            if crc32 is None:
                self._bin_content.write(dataset.tokens[token : token + block].data)
            self._append_lengths(lengths)
            token += block
        if token != dataset.num_tokens:
            raise UserError(
                f"{idx_path(dataset.prefix)} is damaged: its sequences have not the {dataset.num_tokens} tokens of the "
                ".bin; copy it again or preprocess the corpus again"
            )
        if crc32 is not None:
            self._bin.flush()
            copy_range(bin_path(dataset.prefix), self._partial_bin, self._bin_content.bytes)
            self._bin_content.append(token * self.dtype.itemsize, crc32)
        for start in range(1, dataset.num_documents + 1, _BLOCK):
            self._end_documents(np.asarray(dataset.document_indices[start : start + _BLOCK]) + first)

    def checkpoint(self) -> WriterState:
        """Wait until all that was added is on the disk, and tell what a later writer needs to go on from here."""
        for file in (self._bin, self._lengths, self._document_ends):
            file.flush()
            os.fsync(file.fileno())
        return WriterState(
            self.num_tokens, self.num_sequences, self.num_documents, self._one_sequence_per_document,
            self._bin_content.crc32,
        )  # fmt: skip

    def finalize(self, manifest: dict[str, Any] | None = None) -> None:
        """Publish the dataset: `prepare`, then `publish`."""
        self.prepare(manifest)
        self.publish()

    def prepare(self, manifest: dict[str, Any] | None = None) -> None:
        """Write index and manifest under temporary names and wait until everything is on the disk.

        Args:
            manifest: Further entries for `<prefix>.json` (format, version, counts and checksums are added); None
                writes no file.

        Raises:
            UserError: no token was added.
        """
        if self.num_tokens == 0:
            raise UserError(f"{self.prefix}: empty corpus, no tokens to write; check the input and its key")
        counts = manifest_counts(self.dtype, self.num_tokens, self.num_sequences, self.num_documents)
        index_content = self._write_index()
        self._bin.flush()
        os.fsync(self._bin.fileno())
        if manifest is not None:
            content = {
                "format": MANIFEST_FORMAT,
                "version": MANIFEST_VERSION,
                **counts,
                "one_sequence_per_document": self._one_sequence_per_document,
                "files": {"bin": self._bin_content.describe(), "idx": index_content},
                **manifest,
            }
            write_durably(partial_path(manifest_path(self.prefix)), encode_manifest(content))

    def publish(self) -> None:
        """Put what `prepare` wrote in the place of an older dataset of this prefix.

        Raises:
            UserError: as `require_own_files`.
        """
        self.require_own_files()
        publish_prepared(self.prefix)
        self.close()

    def require_own_files(self) -> None:
        """Check that the unfinished file is still the one that this writer has open, where the system has no locks.

        Raises:
            UserError: somebody removed or replaced it.
        """
        if not is_at(self._bin, self._partial_bin):
            raise UserError(f"{self._partial_bin} was removed or replaced by another process; start again")

    def discard(self) -> None:
        """Remove what was written and not published; nothing to do after `publish` or `close`."""
        if not self._bin.closed:
            if is_at(self._bin, self._partial_bin):
                remove_partials(self.prefix)
            self.close()

    def close(self) -> None:
        """Leave the unfinished files as they are, for `publish_prepared` or for a writer that goes on."""
        for file in (self._bin, self._lengths, self._document_ends):
            with suppress(OSError):  # of a full disk; what counts was put on the disk by `checkpoint` or `prepare`
                file.close()
        if self._lock is not None:
            self._lock.release()

    def _checked_ids(self, tokens: npt.ArrayLike) -> Tokens:
        ids = np.asarray(tokens)
        if ids.size == 0:
            return np.empty(0, self.dtype)
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise UserError(f"token ids must be a row of integers, got {ids.ndim} dimensions of {ids.dtype}")
        if ids.dtype != self.dtype:
            limits, low, high = np.iinfo(self.dtype), int(ids.min()), int(ids.max())
            if low < limits.min or high > limits.max:
                raise UserError(f"token ids from {low} to {high} do not fit {self.dtype.name}; choose a wider dtype")
            ids = ids.astype(self.dtype)
        return ids

    def _append(self, ids: Tokens, lengths: npt.NDArray[np.int64]) -> None:
        if lengths.size and (lengths.min() < 0 or lengths.max() > np.iinfo(np.int32).max):
            raise UserError(
                f"{self.prefix}: a sequence of {lengths.max()} tokens is beyond the format's 2**31 - 1; split it"
            )
        assert int(lengths.sum()) == ids.size, "lengths must add up to the number of ids"
        self._bin_content.write(np.ascontiguousarray(ids).data)
        self._append_lengths(lengths)

    def _append_lengths(self, lengths: npt.NDArray[np.int64]) -> None:
        """Count sequences whose ids are in the `.bin`."""
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_tokens += int(lengths.sum())
        self.num_sequences += lengths.size

    def _end_documents(self, ends: npt.NDArray[np.int64]) -> None:
        alone = np.arange(self.num_documents + 1, self.num_documents + ends.size + 1)
        self._one_sequence_per_document &= bool(np.array_equal(ends, alone))
        self._document_ends.write(ends.astype("<i8").tobytes())
        self.num_documents += ends.size

    def _write_index(self) -> dict[str, int]:
        """Write the index; returns its bytes and checksum."""
        assert self._code is not None
        with partial_path(idx_path(self.prefix)).open("wb") as file:
            index = _ChecksummedFile(file)
            index.write(HEADER.pack(MAGIC, VERSION, self._code, self.num_sequences, self.num_documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, index, 4 * _BLOCK)
            self._lengths.seek(0)
            pointer = 0
            while block := self._lengths.read(4 * _BLOCK):
                ends = pointer + np.cumsum(np.frombuffer(block, "<i4"), dtype=np.int64) * self.dtype.itemsize
                index.write(np.concatenate(([pointer], ends[:-1])).astype("<i8").tobytes())
                pointer = int(ends[-1])
            index.write(np.zeros(1, "<i8").tobytes())
            self._document_ends.seek(0)
            shutil.copyfileobj(self._document_ends, index, 8 * _BLOCK)
            file.flush()
            os.fsync(file.fileno())
        return index.describe()


def publish_prepared(prefix: Path) -> None:
    """Put what `IndexedDatasetWriter.prepare` wrote in the place of an older dataset of this prefix.

    After a crash in the middle, a second call does the rest.
    """
    if partial_path(bin_path(prefix)).exists():
        remove_dataset(prefix)
        fsync_directory(prefix.parent)
    for path in (bin_path(prefix), manifest_path(prefix), idx_path(prefix)):
        if partial_path(path).exists():
            partial_path(path).replace(path)
    fsync_directory(prefix.parent)
    for spool in _spool_paths(prefix):
        spool.unlink(missing_ok=True)


def remove_partials(prefix: Path) -> None:
    """Remove the unfinished files of a dataset."""
    partials = [partial_path(path) for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix))]
    for path in [*_spool_paths(prefix), *partials]:
        path.unlink(missing_ok=True)


def _spool_paths(prefix: Path) -> tuple[Path, Path]:
    """Where the lengths of the sequences and the ends of the documents wait for the index."""
    return Path(f"{prefix}.lengths.partial"), Path(f"{prefix}.documents.partial")


def _opened(path: Path, size: int) -> BinaryIO:
    """Open an unfinished file to append to its first `size` bytes; what follows them is cut off.

    Raises:
        UserError: it is shorter, or has another name too, under which it would change.
    """
    file: BinaryIO = path.open("a+b")
    try:
        found = os.fstat(file.fileno())
        if found.st_size < size:
            raise UserError(
                f"{path} has {found.st_size} bytes, {size} were written: it cannot be gone on with; drop --resume"
            )
        if found.st_nlink > 1:
            raise UserError(f"{path} has other names (hard links), which would change with it; drop --resume")
        file.truncate(size)
    except BaseException:
        file.close()
        raise
    return file
