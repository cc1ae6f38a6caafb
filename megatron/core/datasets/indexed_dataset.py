"""Megatron-LM's indexed dataset: a corpus of token ids that is memory-mapped, never loaded.

`<prefix>.bin` holds the ids of all documents end to end, without a header. `<prefix>.idx` says where they are
(little endian; the arrays start at byte 34 and are therefore unaligned):

    byte 0           9 bytes    magic "MMIDIDX\\0\\0"
    byte 9           uint64     version, 1
    byte 17          uint8      code of the ids' dtype
    byte 18          uint64     S, number of sequences
    byte 26          uint64     D, number of document indices = number of documents + 1
    byte 34          int32[S]   tokens of each sequence
    byte 34+4S       int64[S]   byte offset of each sequence in the .bin
    byte 34+12S      int64[D]   first sequence of each document; the last entry is S
    byte 34+12S+8D   int8[S]    modes, in multimodal datasets only

Both files are byte-compatible with Megatron-LM's, in both directions. Beside them, data written here has
`<prefix>.json`, a manifest that tells which tokenizer made the ids, and the checksums of all files, its own included.
Reference: Megatron-LM, `megatron/core/datasets/indexed_dataset.py`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.core.datasets.file_mapping import map_file
from megatron.core.errors import UserError
from megatron.core.file_utils import fsync_directory, partial_path, write_durably

MANIFEST_FORMAT = "megatron-t5 indexed dataset"
MANIFEST_VERSION = 2
UNCHECKED_MANIFEST_VERSION = 1  # of manifests without checksums
SHARDED_FORMAT = "megatron-t5 sharded dataset"  # of the manifest that joins several datasets (corpus.py)

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size
_DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}  # fmt: skip
_FLOAT_CODES = {6: "float64", 7: "float32"}
_BLOCK = 1 << 20  # sequences per step of the writer's streaming passes: 12 MiB of memory

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


def is_sharded(prefix: str | Path) -> bool:
    """Whether `<prefix>.json` is the manifest of a sharded corpus; reads its beginning only."""
    try:
        with manifest_path(prefix).open("rb") as file:
            return SHARDED_FORMAT.encode() in file.read(4 * len(SHARDED_FORMAT))
    except OSError:
        return False


def is_dataset(prefix: str | Path) -> bool:
    """Whether a file of a dataset of this prefix, or the manifest of a sharded corpus, is there."""
    return idx_path(prefix).is_file() or bin_path(prefix).is_file() or is_sharded(prefix)


def remove_dataset(prefix: str | Path) -> None:
    """Remove `<prefix>.idx`, `.bin` and `.json` where they exist; the index first, so that no half opens.

    Of a sharded corpus the manifest goes first, then the shards that it lists (none when it cannot be read).
    """
    if is_sharded(prefix):
        try:
            num_shards = len(json.loads(manifest_path(prefix).read_bytes())["shards"])
        except (ValueError, TypeError, KeyError, RecursionError):
            num_shards = 0
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


class IndexedDataset:
    """Memory-mapped reader. Opening takes constant time and memory whatever the size of the corpus.

    What can be checked in constant time is checked at open; entries of the index are checked when they are used.
    All arrays are read-only views of the files. The object can be pickled (it reopens the files).

    Attributes:
        prefix: Path without `.bin` and `.idx`.
        dtype: dtype of the ids.
        num_sequences: S.
        num_documents: D - 1.
        num_tokens: Ids in the `.bin`.
        tokens: The whole `.bin`.  # [num_tokens]
        sequence_lengths: Tokens of each sequence.  # [S] int32
        sequence_pointers: Byte offset of each sequence.  # [S] int64
        document_indices: First sequence of each document, then S.  # [D] int64
        manifest: Content of `<prefix>.json`, None when there is none (data written by Megatron-LM).

    Raises:
        UserError: a file is missing, damaged, empty or does not belong to the others.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._idx_path, self._bin_path = idx_path(prefix), bin_path(prefix)
        index = self._map_file(self._idx_path)
        self.dtype, self.num_sequences, num_indices = self._parse_header(index)
        self.num_documents = num_indices - 1
        sequences = self.num_sequences
        lengths_at = HEADER_BYTES
        pointers_at, documents_at = lengths_at + 4 * sequences, lengths_at + 12 * sequences
        self.sequence_lengths = np.frombuffer(index, "<i4", sequences, lengths_at)
        self.sequence_pointers = np.frombuffer(index, "<i8", sequences, pointers_at)
        self.document_indices = np.frombuffer(index, "<i8", num_indices, documents_at)
        bin_bytes = self._check_index()
        self.num_tokens = bin_bytes // self.dtype.itemsize
        self.tokens: Tokens = np.frombuffer(self._map_file(self._bin_path), self.dtype)
        self.manifest = self._read_manifest()

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> Tokens:
        """Ids of one sequence.  # [length]"""
        if not -self.num_sequences <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        index %= self.num_sequences
        start = self._token_offset(index)
        length = int(self.sequence_lengths[index])
        if length < 0 or start + length > self.num_tokens:
            raise self._damaged(f"sequence {index} has {length} tokens from token {start}", f"{self.num_tokens} in all")
        return self.tokens[start : start + length]

    def __iter__(self) -> Iterator[Tokens]:
        return (self[index] for index in range(self.num_sequences))

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[Path]]:
        return IndexedDataset, (self.prefix,)

    def document_start(self, document: int) -> int:
        """Offset of a document's first token in `tokens`; `num_documents` gives `num_tokens`.

        Raises:
            UserError: the index entries that are used contradict each other.
        """
        if not 0 <= document <= self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        sequence = int(self.document_indices[document])
        if (self.manifest or {}).get("one_sequence_per_document") and sequence != document:
            raise self._damaged(f"document {document} starts at sequence {sequence}", f"sequence {document}")
        around = [int(n) for n in self.document_indices[max(document - 1, 0) : document + 2]]
        if around != sorted(around) or not 0 <= sequence <= self.num_sequences:
            found = f"documents around {document} start at sequences {', '.join(map(str, around))}"
            raise self._damaged(found, f"ascending ones from 0 to {self.num_sequences}")
        return self.num_tokens if sequence == self.num_sequences else self._token_offset(sequence)

    def document_starts(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Offsets of the first tokens of documents `first` to `stop`, the last of which is left out.  # [stop - first]

        Raises:
            UserError: the index entries that are used contradict each other.
        """
        assert 0 <= first < stop <= self.num_documents
        sequences = np.asarray(self.document_indices[first:stop])
        if (np.diff(sequences) < 0).any() or sequences[0] < 0 or sequences[-1] > self.num_sequences:
            found = f"documents {first} to {stop - 1} start at sequences {sequences.min()} to {sequences.max()}"
            raise self._damaged(found, f"ascending ones from 0 to {self.num_sequences}")
        ends = sequences == self.num_sequences  # empty documents at the end of the corpus
        pointers = self.sequence_pointers[np.where(ends, 0, sequences)]
        starts = np.where(ends, self.num_tokens, pointers // self.dtype.itemsize)
        if (np.diff(starts) < 0).any() or (pointers % self.dtype.itemsize).any() or starts[-1] > self.num_tokens:
            found = f"documents {first} to {stop - 1} start at tokens {starts.min()} to {starts.max()}"
            raise self._damaged(found, f"ascending ones up to {self.num_tokens}")
        # The first and the last one's neighbours in the index are looked at too.
        for document in {first, stop - 1}:
            assert starts[document - first] == self.document_start(document)
        return starts

    def _token_offset(self, sequence: int) -> int:
        """Offset of a sequence in tokens, checked against the `.bin` and the sequence before."""
        pointer, expected = int(self.sequence_pointers[sequence]), 0
        if sequence > 0:
            before = sequence - 1
            expected = int(self.sequence_pointers[before]) + int(self.sequence_lengths[before]) * self.dtype.itemsize
        if pointer != expected or not 0 <= pointer <= self.num_tokens * self.dtype.itemsize:
            raise self._damaged(f"sequence {sequence} starts at byte {pointer}", f"byte {expected}")
        return pointer // self.dtype.itemsize

    def _map_file(self, path: Path) -> npt.NDArray[np.uint8]:
        try:
            return map_file(str(path))
        except FileNotFoundError:
            if path == self._idx_path and self._bin_path.exists():
                raise UserError(
                    f"{path} is missing beside {self._bin_path}: writing did not finish; preprocess the corpus again"
                ) from None
            raise UserError(f"{path} is missing; check the prefix, or preprocess the corpus") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def _damaged(self, found: str, expected: str) -> UserError:
        return UserError(
            f"{self._idx_path} is damaged: {found}, expected {expected}; copy it again or preprocess the corpus again"
        )

    def _parse_header(self, index: npt.NDArray[np.uint8]) -> tuple[np.dtype, int, int]:
        """dtype, number of sequences and number of document indices, checked against the file's size."""
        if len(index) < HEADER_BYTES:
            raise self._damaged(f"{len(index)} bytes", f"a header of {HEADER_BYTES}")
        magic, version, code, sequences, indices = _HEADER.unpack_from(index.data)
        if magic != _MAGIC:
            raise self._damaged(f"it starts with {magic!r}", f"{_MAGIC!r}")
        if version != _VERSION:
            raise self._damaged(f"version {version}", str(_VERSION))
        if code in _FLOAT_CODES:
            raise UserError(f"{self._idx_path} holds {_FLOAT_CODES[code]} values; token ids must be integers")
        if code not in _DTYPES:
            raise self._damaged(f"dtype code {code}", f"one of {sorted(_DTYPES)}")
        if indices < 1:
            raise self._damaged("no document index", "at least 1")
        size = HEADER_BYTES + 12 * sequences + 8 * indices
        if len(index) not in (size, size + sequences):  # the second with multimodal modes
            raise self._damaged(f"{len(index)} bytes", f"{size} for {sequences} sequences, {indices} document indices")
        return _DTYPES[code], sequences, indices

    def _check_index(self) -> int:
        """Check the ends of the index arrays and the size of the `.bin`, which is returned in bytes."""
        first, last = int(self.document_indices[0]), int(self.document_indices[-1])
        if (first, last) != (0, self.num_sequences):
            raise self._damaged(f"documents cover sequences {first} to {last}", f"0 to {self.num_sequences}")
        expected = 0
        if self.num_sequences:
            if self.sequence_pointers[0] != 0:
                raise self._damaged(f"sequence 0 starts at byte {self.sequence_pointers[0]}", "byte 0")
            expected = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        try:
            found = self._bin_path.stat().st_size
        except OSError as error:
            raise UserError(
                f"{self._bin_path} cannot be read ({error.strerror}) but {self._idx_path} exists; copy it too"
            ) from error
        if found != expected:
            raise UserError(
                f"{self._bin_path} has {found} bytes, expected {expected} from {self._idx_path}; "
                "copy both again or preprocess the corpus again"
            )
        if found == 0:
            raise UserError(f"{self._bin_path} is an empty corpus: no tokens; preprocess one that has text")
        if found % self.dtype.itemsize:
            raise self._damaged(f"a .bin of {found} bytes", f"a multiple of {self.dtype.itemsize}")
        return found

    def _read_manifest(self) -> dict[str, Any] | None:
        path = manifest_path(self.prefix)
        try:
            content = path.read_bytes()
            manifest = json.loads(content)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); restore it or preprocess the corpus again") from error
        if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
            raise UserError(f"{path} is not the manifest of a dataset; move it away or preprocess the corpus again")
        if manifest.get("version") not in (MANIFEST_VERSION, UNCHECKED_MANIFEST_VERSION):
            raise UserError(
                f"{path} has version {manifest.get('version')}, this program reads {MANIFEST_VERSION}; "
                "use the release that wrote it or preprocess the corpus again"
            )
        for key, found in self._counts().items():
            if manifest.get(key) != found:
                raise UserError(
                    f"{path} says {key} {manifest.get(key)}, the dataset has {found}; "
                    "it belongs to other data: copy all files again or preprocess the corpus again"
                )
        if manifest["version"] == MANIFEST_VERSION:
            manifest.pop("manifest_crc32", None)
            if content != encode_manifest(manifest):
                raise UserError(f"{path} is damaged or was edited; restore it or preprocess the corpus again")
        return manifest

    def _counts(self) -> dict[str, Any]:
        return _manifest_counts(self.dtype, self.num_tokens, self.num_sequences, self.num_documents)


def _manifest_counts(dtype: np.dtype, tokens: int, sequences: int, documents: int) -> dict[str, Any]:
    """The part of a manifest that follows from the data itself."""
    return {
        "dtype": dtype.name,
        "num_tokens": tokens,
        "num_sequences": sequences,
        "num_documents": documents,
        "bin_bytes": tokens * dtype.itemsize,
    }


class _ChecksummedFile:
    """Writes to a file; knows the bytes and the CRC-32 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = self.crc32 = 0

    def write(self, block: Any) -> None:
        self._file.write(block)
        self.crc32 = zlib.crc32(block, self.crc32)
        self.bytes += memoryview(block).nbytes

    def describe(self) -> dict[str, int]:
        return {"bytes": self.bytes, "crc32": self.crc32}


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

    Raises:
        UserError: the dataset exists and `overwrite` is not set, or another process is writing it.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, overwrite: bool = False) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next((code for code, known in _DTYPES.items() if known == self.dtype), None)
        if self._code is None:
            raise UserError(
                f"token ids cannot be stored as {self.dtype}; use one of {list(map(str, _DTYPES.values()))}"
            )
        if idx_path(prefix).exists() and not overwrite:
            raise UserError(f"{idx_path(prefix)} exists; give another --output-prefix, or --overwrite to replace it")
        self.num_tokens = self.num_sequences = self.num_documents = 0
        self._one_sequence_per_document = True
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._partial_bin = partial_path(bin_path(prefix))
        self._partial_idx = partial_path(idx_path(prefix))
        self._partial_manifest = partial_path(manifest_path(prefix))
        self._other_partials: list[Path] = []
        self._bin: BinaryIO = self._partial_bin.open("ab")
        self._bin_content = _ChecksummedFile(self._bin)
        try:
            self._claim()
            # Lengths and document ends wait in unnamed files: lists of them would outgrow memory on large corpora.
            self._lengths = self._spool()  # int32[S]
            self._document_ends = self._spool()  # int64[D - 1]
        except BaseException:
            self._bin.close()
            raise
        self._has_manifest = False

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

        Raises:
            UserError: its dtype is not this writer's.
        """
        if dataset.dtype != self.dtype:
            raise UserError(
                f"{dataset.prefix} holds {dataset.dtype.name} ids, expected {self.dtype.name}; only alike join"
            )
        first, token = self.num_sequences, 0
        for start in range(0, dataset.num_sequences, _BLOCK):
            lengths = np.asarray(dataset.sequence_lengths[start : start + _BLOCK], dtype=np.int64)
            block = int(lengths.sum())
            self._append(dataset.tokens[token : token + block], lengths)
            token += block
        for start in range(1, dataset.num_documents + 1, _BLOCK):
            self._end_documents(np.asarray(dataset.document_indices[start : start + _BLOCK]) + first)

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
        counts = _manifest_counts(self.dtype, self.num_tokens, self.num_sequences, self.num_documents)
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
            write_durably(self._partial_manifest, encode_manifest(content))
        self._has_manifest = manifest is not None

    def publish(self) -> None:
        """Put what `prepare` wrote in the place of an older dataset of this prefix."""
        remove_dataset(self.prefix)
        fsync_directory(self.prefix.parent)
        self._partial_bin.replace(bin_path(self.prefix))
        if self._has_manifest:
            self._partial_manifest.replace(manifest_path(self.prefix))
        self._partial_idx.replace(idx_path(self.prefix))
        fsync_directory(self.prefix.parent)
        self._close()

    def discards(self, directory: Path) -> None:
        """Let `discard` remove this directory too, which goes under its final name before `publish`."""
        self._other_partials.append(directory)

    def discard(self) -> None:
        """Remove what was written and not published; nothing to do after `finalize`."""
        if not self._bin.closed:
            for directory in self._other_partials:
                shutil.rmtree(directory, ignore_errors=True)
            for partial in (self._partial_bin, self._partial_idx, self._partial_manifest):
                partial.unlink(missing_ok=True)
            self._close()

    def _spool(self) -> BinaryIO:
        return tempfile.TemporaryFile(dir=self.prefix.parent)

    def _claim(self) -> None:
        """Lock the partial file against a second writer, then empty it of what a crashed writer left."""
        busy = UserError(f"{self._partial_bin} is being written by another process; wait for it to end")
        try:
            fcntl.flock(self._bin.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # Some network file systems have no locks; two writers there are the user's to avoid.
        try:
            # Between our open and the lock the other writer may have finished: the file is then its published .bin.
            mine = os.path.samestat(os.fstat(self._bin.fileno()), self._partial_bin.stat())
        except FileNotFoundError:
            mine = False
        if not mine:
            raise busy
        self._bin.truncate(0)

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
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_tokens += ids.size
        self.num_sequences += lengths.size

    def _end_documents(self, ends: npt.NDArray[np.int64]) -> None:
        alone = np.arange(self.num_documents + 1, self.num_documents + ends.size + 1)
        self._one_sequence_per_document &= bool(np.array_equal(ends, alone))
        self._document_ends.write(ends.astype("<i8").tobytes())
        self.num_documents += ends.size

    def _write_index(self) -> dict[str, int]:
        """Write the index; returns its bytes and checksum."""
        assert self._code is not None
        with self._partial_idx.open("wb") as file:
            index = _ChecksummedFile(file)
            index.write(_HEADER.pack(_MAGIC, _VERSION, self._code, self.num_sequences, self.num_documents + 1))
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

    def _close(self) -> None:
        for file in (self._bin, self._lengths, self._document_ends):
            file.close()
