"""A corpus: one indexed dataset, or several that are used as one.

A sharded corpus with the prefix P is on the disk as `P-00000.{bin,idx,json}`, `P-00001.{bin,idx,json}` and so on, each
of which is an ordinary dataset, and `P.json`, a manifest that lists them in order:

    format                                             "megatron-t5 sharded dataset"
    version                                            1
    dtype, num_tokens, num_sequences, num_documents    of all shards together
    shards                                             [{name, num_tokens, num_documents, manifest_crc32}, ...]
    tokenizer, tokenizer_directory, tokenizer_files    as in the manifest of a dataset; the shards name the same copy
    manifest_crc32                                     checksum of all entries before it

`P.json` is written last and removed first: a sharded corpus is there completely or not at all. Nothing else follows
from where a corpus is cut: its tokens end to end, and so all samples, are those of one dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets.indexed_dataset import (
    SHARDED_FORMAT,
    IndexedDataset,
    bin_path,
    encode_manifest,
    idx_path,
    is_sharded,
    manifest_checksum,
    manifest_path,
    shard_prefix,
)
from megatron.core.errors import UserError
from megatron.core.file_utils import publish_bytes

SHARDED_VERSION = 1
SPLITS = ("train", "valid", "test")

# The fingerprint of a corpus is that of so many tokens at so many places, evenly spread.
FINGERPRINT_TOKENS = 64
FINGERPRINT_PLACES = 256


class Corpus:
    """Documents of one indexed dataset or of several, end to end. Opening reads no token, whatever the size.

    Attributes:
        prefix: Path without suffix.
        manifest: Content of `<prefix>.json`, None when there is none (data written by Megatron-LM).
        dtype: dtype of the ids.
        num_tokens: Ids of all shards.
        num_sequences: Sequences of all shards.
        num_documents: Documents of all shards.
        shards: The datasets; one, with the corpus's own prefix, where the corpus is not sharded.
        pieces: Tokens of each shard, as memory maps, to be read end to end.
    """

    def __init__(
        self, prefix: str | Path, shards: Sequence[IndexedDataset], manifest: dict[str, Any] | None = None
    ) -> None:
        """Join datasets of one dtype, at least one.

        Raises:
            UserError: their dtypes differ.
        """
        self.prefix = Path(prefix)
        self.shards = tuple(shards)
        self.manifest = manifest
        self.dtype = self.shards[0].dtype
        for shard in self.shards:
            if shard.dtype != self.dtype:
                raise UserError(
                    f"{shard.prefix} holds {shard.dtype.name} ids, {self.shards[0].prefix} {self.dtype.name}; "
                    "the shards of a corpus have one type"
                )
        self.pieces: list[NDArray[Any]] = [shard.tokens for shard in self.shards]
        # Where each shard starts in the corpus, and the totals.
        self._token_offsets = np.array([0, *accumulate(shard.num_tokens for shard in self.shards)], np.int64)
        self._document_offsets = np.array([0, *accumulate(shard.num_documents for shard in self.shards)], np.int64)
        self.num_tokens = int(self._token_offsets[-1])
        self.num_documents = int(self._document_offsets[-1])
        self.num_sequences = sum(shard.num_sequences for shard in self.shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_corpus, (self.prefix,)

    def document_start(self, document: int) -> int:
        """Offset of a document's first token in the corpus; `num_documents` gives `num_tokens`.

        Raises:
            UserError: the index entries that are used contradict each other.
        """
        return int(self.document_starts(document, document)[0])

    def document_starts(self, first: int, last: int) -> NDArray[np.int64]:
        """Offsets of the first tokens of documents `first` to `last`, both included.  # [last - first + 1]

        `last` may be `num_documents`, which starts where the corpus ends. Reads 16 bytes of index for each.

        Raises:
            UserError: the index entries that are used contradict each other.
        """
        if not 0 <= first <= last <= self.num_documents:
            raise IndexError(f"documents {first} to {last} of {self.num_documents}")
        starts = np.empty(last - first + 1, np.int64)
        starts[-1] = self.num_tokens  # of the end of the corpus, which belongs to no shard
        shard = int(np.searchsorted(self._document_offsets, first, side="right")) - 1
        document, behind = first, min(last + 1, self.num_documents)
        while document < behind:
            offset, end = int(self._document_offsets[shard]), int(self._document_offsets[shard + 1])
            stop = min(behind, end)
            if document < stop:
                found = self.shards[shard].document_starts(document - offset, stop - offset)
                starts[document - first : stop - first] = self._token_offsets[shard] + found
                document = stop
            shard += 1
        return starts

    def release_index(self) -> None:
        """Let go of the memory of what was read of the index, after reading much of it; it stays usable."""
        for shard in self.shards:
            shard.release_index()

    def _places(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where tokens `start` to `stop` of the corpus are: shard, and range of its tokens."""
        shard = int(np.searchsorted(self._token_offsets[:-1], start, side="right")) - 1
        while start < stop:
            offset, end = int(self._token_offsets[shard]), int(self._token_offsets[shard + 1])
            yield shard, start - offset, min(stop, end) - offset
            start, shard = min(stop, end), shard + 1

    def describe(self) -> dict[str, Any]:
        """Size and fingerprint, which tell whether a corpus is the same one; reads a few hundred places.

        Raises:
            UserError: a file cannot be read.
        """
        width, size = min(FINGERPRINT_TOKENS, self.num_tokens), self.dtype.itemsize
        digest = hashlib.sha256()
        with ExitStack() as stack:
            files: dict[int, int] = {}
            for start in np.linspace(0, self.num_tokens - width, FINGERPRINT_PLACES, dtype=np.int64).tolist():
                for shard, begin, end in self._places(start, start + width):
                    if shard not in files:
                        files[shard] = self._open_bin(shard, stack)
                    content = os.pread(files[shard], (end - begin) * size, begin * size)
                    digest.update(np.frombuffer(content, self.dtype).astype("<i8").tobytes())
        return {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "fingerprint": digest.hexdigest()[:16],
        }

    def _open_bin(self, shard: int, stack: ExitStack) -> int:
        """Descriptor of a shard's tokens, to read few of them: a memory map would read 128 KiB around each place."""
        path = bin_path(self.shards[shard].prefix)
        try:
            file = stack.enter_context(path.open("rb", buffering=0))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return file.fileno()


class CorpusRange(NamedTuple):
    """A run of whole documents of a corpus."""

    corpus: Corpus
    name: str
    """What logs and messages call it."""
    documents: tuple[int, int]
    """[begin, end)"""
    tokens: tuple[int, int]
    """[begin, end) in the tokens of the whole corpus."""

    @property
    def num_documents(self) -> int:
        """Documents of the range."""
        return self.documents[1] - self.documents[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of the range."""
        return self.tokens[1] - self.tokens[0]


def split_corpus(corpus: Corpus, weights: Sequence[float], name: str) -> dict[str, CorpusRange]:
    """The training, validation and test documents of a corpus: runs in order, rounded as Megatron-LM's `--split`.

    Args:
        corpus: The corpus.
        weights: Three shares of the documents, summing to 1.
        name: What logs and messages call the corpus.

    Returns:
        "train", "valid" and "test", each possibly without documents.
    """
    bounds = [
        min(round(share * corpus.num_documents), corpus.num_documents) for share in accumulate(weights, initial=0.0)
    ]
    offsets = [corpus.document_start(bound) for bound in bounds]
    parts = zip(SPLITS, pairwise(bounds), pairwise(offsets), strict=True)
    return {split: CorpusRange(corpus, name, documents, tokens) for split, documents, tokens in parts}


def open_corpus(prefix: str | Path) -> Corpus:
    """Open the dataset or the sharded corpus `<prefix>` in constant time for each of its files.

    Raises:
        UserError: a file is missing, damaged, empty or does not belong to the others.
    """
    prefix = Path(prefix)
    if is_sharded(prefix):
        return _open_sharded(prefix)
    dataset = IndexedDataset(prefix)
    return Corpus(prefix, [dataset], dataset.manifest)


def _open_sharded(prefix: Path) -> Corpus:
    path = manifest_path(prefix)
    damaged = UserError(f"{path} is damaged or was edited; restore it or preprocess the corpus again")
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        manifest.pop("manifest_crc32")
        version, listed = manifest["version"], manifest["shards"]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise damaged from None
    if version != SHARDED_VERSION:
        raise UserError(
            f"{path} has version {version}, this program reads {SHARDED_VERSION}; use the release that wrote it or "
            "preprocess the corpus again"
        )
    if content != encode_manifest(manifest) or not isinstance(listed, list) or not listed:
        raise damaged
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in listed]
    if not all(isinstance(name, str) and Path(name).name == name and "\0" not in name for name in names):
        raise damaged
    shards = [IndexedDataset(prefix.parent / str(name)) for name in names]
    corpus = Corpus(prefix, shards, manifest)
    for shard, entry in zip(shards, listed, strict=True):
        if entry != _shard_entry(shard):
            raise UserError(
                f"{shard.prefix} is not the shard that {path} lists ({_shard_entry(shard)}, listed {entry}); copy all "
                "files again or preprocess the corpus again"
            )
    if any(manifest.get(key) != found for key, found in _totals(corpus).items()):
        raise damaged
    return corpus


def _totals(corpus: Corpus) -> dict[str, Any]:
    return {
        "dtype": corpus.dtype.name,
        "num_tokens": corpus.num_tokens,
        "num_sequences": corpus.num_sequences,
        "num_documents": corpus.num_documents,
    }


def _shard_entry(shard: IndexedDataset) -> dict[str, Any]:
    """What the manifest of the corpus says of a shard."""
    return {
        "name": shard.prefix.name,
        "num_tokens": shard.num_tokens,
        "num_documents": shard.num_documents,
        "manifest_crc32": None if shard.manifest is None else manifest_checksum(shard.manifest),
    }


def sharded_manifest(prefix: str | Path, num_shards: int, content: dict[str, Any]) -> bytes:
    """`<prefix>.json` for the shards `<prefix>-00000`, `<prefix>-00001` ..., which are complete under these names.

    Args:
        prefix: Of the corpus.
        num_shards: How many shards it has, at least 1.
        content: Further entries (tokenizer, tokenizer_directory, tokenizer_files ...), as in the shards' manifests.

    Raises:
        UserError: a shard cannot be opened, or their types differ.
    """
    corpus = Corpus(prefix, [IndexedDataset(shard_prefix(prefix, number)) for number in range(num_shards)])
    shards = [_shard_entry(shard) for shard in corpus.shards]
    header = {"format": SHARDED_FORMAT, "version": SHARDED_VERSION, **_totals(corpus)}
    return encode_manifest({**header, "shards": shards, **content})


def publish_sharded(prefix: str | Path, num_shards: int, content: dict[str, Any]) -> None:
    """Make one corpus of shards that are complete under their names; the last step of writing it.

    Whoever replaces an older corpus calls `remove_dataset` on its prefix before the first shard gets its name.

    Args:
        prefix: Of the corpus.
        num_shards: How many shards it has, at least 1.
        content: Further entries of the manifest, as for `sharded_manifest`.

    Raises:
        UserError: a shard cannot be opened, or a dataset that is not sharded has this prefix.
    """
    if idx_path(prefix).exists():
        raise UserError(f"{idx_path(prefix)} exists; give another --output-prefix, or --overwrite to replace it")
    publish_bytes(manifest_path(prefix), sharded_manifest(prefix, num_shards, content))
