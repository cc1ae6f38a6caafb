"""Writes one corpus, as one indexed dataset or as shards, so that another process can go on after a crash.

Nothing has its final name before `publish_output`: shards that are finished wait under temporary names, too.
"""

from __future__ import annotations

import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.core.datasets.corpus import publish_sharded
from megatron.core.datasets.indexed_format import bin_path, remove_dataset, require_own_manifest, shard_prefix
from megatron.core.datasets.indexed_writer import (
    IndexedDatasetWriter,
    WriterState,
    publish_prepared,
    remove_partials,
)
from megatron.core.file_utils import partial_path, replace_directory
from megatron.core.tokenizers import Tokenizer


def tokenizer_directory(prefix: Path) -> Path:
    """Where the tokenizer of a corpus is copied to."""
    return prefix.with_name(prefix.name + "_tokenizer")


class OutputWriter:
    """Documents of one corpus, cut into shards where that is asked for; the caller has the lock of its prefix.

    Attributes:
        prefix: Of the corpus.
        num_tokens: Ids of all shards.
        num_documents: Documents of all shards.
        num_shards: Shards that were begun; None: the corpus is not sharded.
    """

    def __init__(
        self,
        prefix: Path,
        dtype: npt.DTypeLike,
        manifest: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        shard_tokens: int | None,
        overwrite: bool,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Begin, or go on from the `state` that `checkpoint` gave.

        Args:
            prefix: Of the corpus.
            dtype: Of the ids.
            manifest: What the manifests say, but for the tokenizer's files.
            tokenizer: Goes beside the data.
            shard_tokens: A shard ends with the document that brings it to so many tokens; None makes one dataset.
            overwrite: Replace a corpus that exists.
            state: Of a run before.
        """
        self.prefix = prefix
        self._dtype, self._overwrite, self._shard_tokens = dtype, overwrite, shard_tokens
        self.num_tokens = self.num_documents = 0
        self.num_shards = None if shard_tokens is None else 1
        writer_state = None
        if state is not None:
            self.num_tokens, self.num_documents, self.num_shards = state["tokens"], state["documents"], state["shards"]
            writer_state = WriterState(*state["writer"])
        else:
            discard_output(prefix)
        self._writer = self._open(writer_state)
        try:
            directory = partial_path(tokenizer_directory(prefix))
            tokenizer.save(directory)
            self.manifest = manifest_of(prefix, manifest)
        except BaseException:
            self.discard()
            raise

    def _open(self, state: WriterState | None = None) -> IndexedDatasetWriter:
        prefix = self.prefix if self.num_shards is None else shard_prefix(self.prefix, self.num_shards - 1)
        return IndexedDatasetWriter(prefix, self._dtype, self._overwrite, state, is_locked=True)

    def add_documents(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Append documents of one sequence each: their ids end to end, and the tokens of each."""
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)
        while self._shard_tokens is not None and (cut := self._documents_that_fit(lengths)) < len(lengths):
            split = int(lengths[:cut].sum())
            self._writer.add_documents(tokens[:split], lengths[:cut])
            tokens, lengths = tokens[split:], lengths[cut:]
            self._writer.prepare(self.manifest)
            self._writer.close()
            assert self.num_shards is not None
            self.num_shards += 1
            self._writer = self._open()
        self._writer.add_documents(tokens, lengths)

    def _documents_that_fit(self, lengths: npt.NDArray[np.int32]) -> int:
        """How many of these documents belong to the shard that is being written.

        Empty documents (a record may be empty under one key of several) go with the one before: a shard of nothing
        else would be none.
        """
        assert self._shard_tokens is not None
        missing = self._shard_tokens - self._writer.num_tokens
        behind = np.cumsum(lengths, dtype=np.int64)
        count = int(np.searchsorted(behind, missing)) + 1 if missing > 0 else 0
        while count < len(lengths) and lengths[count] == 0:
            count += 1
        return count

    def checkpoint(self) -> dict[str, Any]:
        """Wait until everything is on the disk, and tell what another writer needs to go on from here."""
        return {
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "shards": self.num_shards,
            "writer": list(self._writer.checkpoint()),
        }

    def prepare(self) -> None:
        """Write all that is missing under temporary names."""
        self._writer.prepare(self.manifest)

    def require_own_files(self) -> None:
        """Check that nobody has replaced what is about to be published.

        Raises:
            UserError: somebody has.
        """
        self._writer.require_own_files()

    def close(self) -> None:
        """Leave the files as they are."""
        self._writer.close()

    def discard(self) -> None:
        """Remove all that is not published."""
        self._writer.discard()
        discard_output(self.prefix)


def manifest_of(prefix: Path, content: dict[str, Any]) -> dict[str, Any]:
    """A manifest's entries: `content`, and what is known of the tokenizer's files."""
    directory = tokenizer_directory(prefix)
    saved = partial_path(directory) if partial_path(directory).exists() else directory
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
        for path in sorted(saved.iterdir())
    }
    return {**content, "tokenizer_directory": directory.name, "tokenizer_files": files}


def publish_output(prefix: Path, num_shards: int | None, manifest: dict[str, Any]) -> None:
    """Give a prepared corpus and its tokenizer their names, in the place of older ones.

    After a crash in the middle, a second call does the rest.

    Raises:
        UserError: a manifest's name is taken by something else; nothing was removed.
    """
    require_own_manifests(prefix)
    directory = tokenizer_directory(prefix)
    if partial_path(directory).exists():
        # The old data go before their tokenizer does: data must never be found beside one that is not their own.
        remove_dataset(prefix)
        replace_directory(partial_path(directory), directory)
    if num_shards is None:
        publish_prepared(prefix)
        return
    for number in range(num_shards):
        publish_prepared(shard_prefix(prefix, number))
    publish_sharded(prefix, num_shards, manifest)


def require_own_manifests(prefix: Path) -> None:
    """Check that the manifests of a corpus, and of shards that it may have, would replace none but their like.

    Raises:
        UserError: one would.
    """
    require_own_manifest(prefix)
    if prefix.parent.is_dir():
        shard = re.compile(re.escape(prefix.name) + r"-\d{5,}\.json")
        for path in sorted(prefix.parent.iterdir()):
            if shard.fullmatch(path.name):
                require_own_manifest(path.with_suffix(""))


def discard_output(prefix: Path) -> None:
    """Remove the unfinished files of a corpus and of its shards."""
    shutil.rmtree(partial_path(tokenizer_directory(prefix)), ignore_errors=True)
    remove_partials(prefix)
    if prefix.parent.is_dir():
        shard = re.compile(re.escape(prefix.name) + r"-\d{5,}\.(bin|idx|json|lengths|documents)\.partial")
        for path in prefix.parent.iterdir():
            if shard.fullmatch(path.name):
                path.unlink(missing_ok=True)


def unfinished_bytes(prefix: Path, num_shards: int | None) -> int:
    """Bytes of ids that wait under temporary names."""
    prefixes = [prefix] if num_shards is None else [shard_prefix(prefix, number) for number in range(num_shards)]
    paths = [partial_path(bin_path(part)) for part in prefixes]
    return sum(path.stat().st_size for path in paths if path.exists())
