"""Full scan of datasets: every entry of the index, every id, every checksum, the copy of the tokenizer.

Several threads read, sum and check different parts of a file (all three release the GIL), which keeps the disk busy.
Files are read in blocks, so that memory does not grow with the corpus, and never mapped, so that a disk that fails is
an error and not the end of the process.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron.core.datasets.checksum_helpers import crc32
from megatron.core.datasets.checksums import combined_crc32
from megatron.core.datasets.corpus import Corpus, open_corpus
from megatron.core.datasets.indexed_dataset import (
    HEADER_BYTES,
    UNCHECKED_MANIFEST_VERSION,
    IndexedDataset,
    bin_path,
    idx_path,
    is_sharded,
    manifest_path,
)
from megatron.core.errors import UserError
from megatron.core.tokenizers import load_tokenizer

_BLOCK_BYTES = 1 << 19  # stays in the processor's cache between checksum and scan; a multiple of every dtype's size
_PART_BYTES = 1 << 23  # that a thread takes at a time
_PART_ENTRIES = 1 << 18  # of the index
_THREADS = min(max(4, os.cpu_count() or 1), 32)  # more than processors, since some of them wait for the disk

_T = TypeVar("_T")


@dataclass
class DatasetReport:
    """A dataset or sharded corpus that is sound.

    Attributes:
        num_documents: Documents.
        num_tokens: Ids.
        num_bytes: Bytes of all files that were read.
        num_shards: Datasets of a sharded corpus, else 0.
        unchecked: What could not be checked, and why.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int = 0
    num_shards: int = 0
    unchecked: list[str] = field(default_factory=list)


def verify_dataset(prefix: str | Path) -> DatasetReport:
    """Read all of the dataset `<prefix>.bin`, `.idx`, `.json` and its tokenizer, or all of a sharded corpus.

    Raises:
        UserError: it is not sound; the message names the file and, where that is known, the place in it.
    """
    tokenizers: dict[Path, int] = {}  # vocabulary sizes of those that are sound; shards share one
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            if not is_sharded(prefix) or idx_path(prefix).exists():
                return _verify_dataset(Path(prefix), pool, tokenizers)
            return _verify_shards(open_corpus(prefix), pool, tokenizers)
        finally:
            pool.shutdown(cancel_futures=True)


def _verify_shards(corpus: Corpus, pool: ThreadPoolExecutor, tokenizers: dict[Path, int]) -> DatasetReport:
    report = DatasetReport(corpus.num_documents, corpus.num_tokens, num_shards=len(corpus.shards))
    assert corpus.manifest is not None
    _verify_tokenizer(corpus.prefix, corpus.manifest, report, tokenizers)
    for shard in corpus.shards:
        of_shard = _verify_dataset(shard.prefix, pool, tokenizers)
        report.num_bytes += of_shard.num_bytes
        report.unchecked += [entry for entry in of_shard.unchecked if entry not in report.unchecked]
        if (shard.manifest or {}).get("tokenizer") != corpus.manifest.get("tokenizer"):
            raise UserError(
                f"{manifest_path(shard.prefix)} names another tokenizer than {manifest_path(corpus.prefix)}; copy all "
                "files again or preprocess the corpus again"
            )
    report.num_bytes += manifest_path(corpus.prefix).stat().st_size
    return report


def _verify_dataset(prefix: Path, pool: ThreadPoolExecutor, tokenizers: dict[Path, int]) -> DatasetReport:
    index_checksum = _checksum(idx_path(prefix), pool)
    dataset = IndexedDataset(prefix)
    report = DatasetReport(dataset.num_documents, dataset.num_tokens)
    manifest = dataset.manifest
    if manifest is None:
        report.unchecked.append("checksums and vocabulary (no manifest)")
    elif manifest["version"] == UNCHECKED_MANIFEST_VERSION:
        report.unchecked.append("checksums (the manifest is of a version without)")
    vocab_size = None if manifest is None else _verify_tokenizer(prefix, manifest, report, tokenizers)
    _verify_index(dataset, pool)
    _compare(idx_path(prefix), index_checksum, manifest, "idx")
    _compare(bin_path(prefix), _verify_ids(dataset, vocab_size, pool), manifest, "bin")
    files = [bin_path(prefix), idx_path(prefix), *([] if manifest is None else [manifest_path(prefix)])]
    report.num_bytes += sum(path.stat().st_size for path in files)
    return report


class _File:
    """Reads any part of a file from any thread."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.size = os.fstat(descriptor).st_size
        self._of_thread = threading.local()

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill the buffer with the bytes from `start` on.

        Raises:
            UserError: the file cannot be read, or ends too early.
        """
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:]], start + done)
                if count == 0:
                    raise UserError(f"{self.path} ends at byte {start + done}: it became shorter while it was read")
                done += count
        except OSError as error:
            raise _unreadable(self.path, start + done, error) from error

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes `start` to `stop`."""
        content = bytearray(stop - start)
        self.read_into(memoryview(content), start)
        return content

    def blocks(self, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes `start` to `stop` in order; each block is overwritten by the thread's next."""
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = memoryview(bytearray(_BLOCK_BYTES))
        for at in range(start, stop, _BLOCK_BYTES):
            block = self._of_thread.buffer[: min(_BLOCK_BYTES, stop - at)]
            self.read_into(block, at)
            yield block


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        raise _unreadable(path, 0, error) from error
    try:
        yield _File(path, descriptor)
    finally:
        os.close(descriptor)


def _unreadable(path: Path, byte: int, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read at byte {byte}: {getattr(error, 'strerror', None) or error}")


def _in_parts(
    pool: ThreadPoolExecutor, work: Callable[[int, int], _T], stop: int, part: int, start: int = 0
) -> Iterator[_T]:
    """`work(begin, end)` of each part of [start, stop), in order; the threads are only a few parts ahead.

    Raises:
        UserError: what the first part that fails raises; none is under way any longer then.
    """
    under_way: deque[Future[_T]] = deque()
    try:
        for begin in range(start, stop, part):
            under_way.append(pool.submit(work, begin, min(begin + part, stop)))
            if len(under_way) >= 2 * _THREADS:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            if not future.cancel():
                future.exception()  # waits: it reads a file that is closed next


def _checksum_of_parts(parts: Iterator[tuple[int, int]]) -> int:
    """CRC-32 of a file from checksum and size of each of its parts, in order."""
    checksum = 0
    for part, num_bytes in parts:
        checksum = combined_crc32(checksum, part, num_bytes)
    return checksum


def _checksum(path: Path, pool: ThreadPoolExecutor | None = None) -> int:
    """CRC-32 of a file; of a small one without help."""
    with _opened(path) as file:

        def work(start: int, stop: int) -> tuple[int, int]:
            checksum = 0
            for block in file.blocks(start, stop):
                checksum = crc32(block, checksum)
            return checksum, stop - start

        if pool is None:
            return work(0, file.size)[0]
        return _checksum_of_parts(_in_parts(pool, work, file.size, _PART_BYTES))


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


def _verify_tokenizer(
    prefix: Path, manifest: dict[str, Any], report: DatasetReport, verified: dict[Path, int]
) -> int | None:
    """Check the copy of the tokenizer; returns the size of its vocabulary, None when the manifest names none."""
    name, recorded = manifest.get("tokenizer_directory"), manifest.get("tokenizer")
    if name is None and recorded is None:
        report.unchecked.append("vocabulary (the manifest names no tokenizer)")
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{manifest_path(prefix)}: tokenizer_directory is {name!r}, not a name beside it")
    directory = prefix.parent / name
    files = manifest.get("tokenizer_files", {})
    for file, expected in files.items() if isinstance(files, dict) and directory not in verified else ():
        path = directory / Path(file).name
        checksum = _checksum(path)
        if checksum != _entry(expected, "crc32"):
            raise UserError(
                f"{path} is damaged: its checksum is {checksum:#010x}, recorded "
                f"{_hexadecimal(_entry(expected, 'crc32'))}; copy it again"
            )
        report.num_bytes += path.stat().st_size
    if directory not in verified:
        tokenizer = load_tokenizer(directory)
        if tokenizer.describe() != recorded:
            raise UserError(
                f"{directory} is not the tokenizer that {manifest_path(prefix)} describes (fingerprint "
                f"{tokenizer.fingerprint[:12]}, recorded {str(_entry(recorded, 'fingerprint'))[:12]}); copy it again"
            )
        verified[directory] = tokenizer.vocab_size
    return verified[directory]


def _verify_index(dataset: IndexedDataset, pool: ThreadPoolExecutor) -> None:
    """Check that sequences follow one another without a gap, and that documents are runs of them."""
    sequences, itemsize = dataset.num_sequences, dataset.dtype.itemsize
    pointers_at, documents_at = HEADER_BYTES + 4 * sequences, HEADER_BYTES + 12 * sequences
    with _opened(idx_path(dataset.prefix)) as file:

        def entries(dtype: str, at: int, first: int, stop: int) -> npt.NDArray[np.integer]:
            size = np.dtype(dtype).itemsize
            return np.frombuffer(file.read(at + size * first, at + size * stop), dtype)

        def verify_sequences(first: int, stop: int) -> None:
            before = max(first - 1, 0)  # a part's first sequence is compared with the one before, too
            lengths = entries("<i4", HEADER_BYTES, before, stop)
            pointers = entries("<i8", pointers_at, before, stop)
            starts = pointers[:-1] + lengths[:-1].astype(np.int64) * itemsize
            if first == 0:
                starts = np.concatenate(([0], starts))
            lengths, pointers = lengths[first - before :], pointers[first - before :]
            bad_length, bad_pointer = _first(lengths < 0), _first(pointers != starts)
            if bad_length is not None and (bad_pointer is None or bad_length <= bad_pointer):
                place = first + bad_length
                raise _damaged(
                    file.path, HEADER_BYTES + 4 * place, f"sequence {place} has {lengths[bad_length]} tokens"
                )
            if bad_pointer is not None:
                place = first + bad_pointer
                found = (
                    f"sequence {place} starts at byte {pointers[bad_pointer]}, the one before ends at "
                    f"{starts[bad_pointer]}"
                )
                raise _damaged(file.path, pointers_at + 8 * place, found)

        def verify_documents(first: int, stop: int) -> None:
            before = max(first - 1, 0)
            starts = entries("<i8", documents_at, before, stop)
            bad = _first((np.diff(starts, prepend=starts[0] if first else 0) < 0) | (starts > sequences))
            if bad is not None:
                place = before + bad
                found = f"document {place} starts at sequence {starts[bad]} of {sequences}, not behind the one before"
                raise _damaged(file.path, documents_at + 8 * place, found)

        for _ in _in_parts(pool, verify_sequences, sequences, _PART_ENTRIES):
            pass
        for _ in _in_parts(pool, verify_documents, dataset.num_documents + 1, _PART_ENTRIES):
            pass


def _verify_ids(dataset: IndexedDataset, vocab_size: int | None, pool: ThreadPoolExecutor) -> int:
    """Check that every id is in the vocabulary, or at least not negative; returns the checksum of the `.bin`."""
    path, signed, itemsize = bin_path(dataset.prefix), dataset.dtype.kind == "i", dataset.dtype.itemsize
    last_id = np.iinfo(dataset.dtype).max if vocab_size is None else vocab_size - 1
    with _opened(path) as file:

        def work(start: int, stop: int) -> tuple[int, int]:
            checksum, at = 0, start
            for block in file.blocks(start, stop):
                checksum = crc32(block, checksum)
                ids = np.frombuffer(block, dataset.dtype)
                if ids.max() > last_id or (signed and ids.min() < 0):
                    bad = _first((ids < 0) | (ids > last_id))
                    assert bad is not None
                    raise out_of_vocabulary(at + bad * itemsize, int(ids[bad]))
                at += len(block)
            return checksum, stop - start

        def out_of_vocabulary(byte: int, found: int) -> UserError:
            sequence = int(np.searchsorted(dataset.sequence_pointers, byte, side="right")) - 1
            limit = "a negative one" if vocab_size is None or found < 0 else f"outside the vocabulary of {vocab_size}"
            return _damaged(path, byte, f"token {byte // itemsize} (sequence {sequence}) is id {found}, {limit}")

        return _checksum_of_parts(_in_parts(pool, work, dataset.num_tokens * itemsize, _PART_BYTES))


def _first(bad: npt.NDArray[np.bool_]) -> int | None:
    """Place of the first True, if there is one."""
    place = int(bad.argmax())
    return place if bad[place] else None


def _damaged(path: Path, byte: int, found: str) -> UserError:
    return UserError(f"{path} is damaged at byte {byte}: {found}; copy it again or preprocess the corpus again")
