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

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.core.datasets.file_mapping import map_file, release_pages
from megatron.core.datasets.indexed_format import (
    DTYPES,
    FLOAT_CODES,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    SHARDED_FORMAT,
    UNCHECKED_MANIFEST_VERSION,
    VERSION,
    Tokens,
    bin_path,
    encode_manifest,
    idx_path,
    is_dataset,
    is_sharded,
    manifest_checksum,
    manifest_counts,
    manifest_path,
    optimal_dtype,
    remove_dataset,
    resolve_prefix,
    shard_prefix,
)
from megatron.core.datasets.indexed_writer import IndexedDatasetWriter
from megatron.core.errors import UserError

__all__ = [
    "HEADER_BYTES",
    "MANIFEST_FORMAT",
    "MANIFEST_VERSION",
    "SHARDED_FORMAT",
    "UNCHECKED_MANIFEST_VERSION",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Tokens",
    "bin_path",
    "encode_manifest",
    "idx_path",
    "is_dataset",
    "is_sharded",
    "manifest_checksum",
    "manifest_path",
    "optimal_dtype",
    "remove_dataset",
    "resolve_prefix",
    "shard_prefix",
]


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
        index = self._index = self._map_file(self._idx_path)
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

    @property
    def recorded_crc32(self) -> int | None:
        """CRC-32 of the `.bin` by the manifest; None when there is none."""
        files = (self.manifest or {}).get("files")
        content = files.get("bin") if isinstance(files, dict) else None
        crc32 = content.get("crc32") if isinstance(content, dict) else None
        return crc32 if isinstance(crc32, int) else None

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
        if (self.manifest or {}).get("one_sequence_per_document"):
            wrong = np.flatnonzero(sequences != np.arange(first, stop))
            if wrong.size:
                document = first + int(wrong[0])
                raise self._damaged(
                    f"document {document} starts at sequence {sequences[wrong[0]]}", f"sequence {document}"
                )
        # As for one document: where the sequence starts, and where the one before it ends. Empty documents at the end
        # of the corpus have no sequence.
        itemsize, last = self.dtype.itemsize, self.num_sequences - 1
        before = np.maximum(sequences - 1, 0)
        pointers = self.sequence_pointers[np.minimum(sequences, last)]
        pointers = np.where(sequences > last, self.num_tokens * itemsize, pointers)
        expected = self.sequence_pointers[before] + self.sequence_lengths[before].astype(np.int64) * itemsize
        expected = np.where(sequences > 0, expected, 0)
        for wrong in np.flatnonzero(pointers != expected)[:1]:
            self.document_start(first + int(wrong))  # says what is wrong
        starts = pointers // itemsize
        if (np.diff(starts) < 0).any() or starts[0] < 0 or starts[-1] > self.num_tokens:
            found = f"documents {first} to {stop - 1} start at tokens {starts.min()} to {starts.max()}"
            raise self._damaged(found, f"ascending ones up to {self.num_tokens}")
        return starts

    def release_index(self) -> None:
        """Let go of the memory of what was read of the index; it stays usable."""
        release_pages(self._index)

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
            return map_file(os.fsencode(path))
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
        magic, version, code, sequences, indices = HEADER.unpack_from(index.data)
        if magic != MAGIC:
            raise self._damaged(f"it starts with {magic!r}", f"{MAGIC!r}")
        if version != VERSION:
            raise self._damaged(f"version {version}", str(VERSION))
        if code in FLOAT_CODES:
            raise UserError(f"{self._idx_path} holds {FLOAT_CODES[code]} values; token ids must be integers")
        if code not in DTYPES:
            raise self._damaged(f"dtype code {code}", f"one of {sorted(DTYPES)}")
        if indices < 1:
            raise self._damaged("no document index", "at least 1")
        size = HEADER_BYTES + 12 * sequences + 8 * indices
        if len(index) not in (size, size + sequences):  # the second with multimodal modes
            raise self._damaged(f"{len(index)} bytes", f"{size} for {sequences} sequences, {indices} document indices")
        return DTYPES[code], sequences, indices

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
        return manifest_counts(self.dtype, self.num_tokens, self.num_sequences, self.num_documents)
