"""Tokenized examples of a JSONL file, kept beside it (or in `--data-cache-path`) and memory-mapped.

`<file name>.<key>.cache/` holds, little endian:

    tokens.bin       ids of all examples end to end, each its inputs, EOS, its targets, EOS; uint16 or int32
    boundaries.bin   int64[2n + 1], where inputs and targets begin, and the end
    lines.bin        int64[n], line of each example in the file
    manifest.json    format version, sizes, fingerprint of the ids

The key is made from the file's content, the tokenizer, the prefix and the keys of the JSON objects: a change of any of
them makes another cache, and a file that is copied or written again as it was does not. The directory appears complete
or not at all. Any number of processes may ask for it at the same time: one makes it, the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets.cache_lock import locked
from megatron.core.datasets.indexed_dataset import optimal_dtype
from megatron.core.datasets.text_to_text_tasks import Example, Task, example_chunks
from megatron.core.errors import UserError
from megatron.core.file_utils import fsync_directory, make_directory, write_durably
from megatron.core.tokenizers import Tokenizer

CACHE_VERSION = 1
_BLOCK_BYTES = 1 << 20


class ExampleStore:
    """The tokenized examples of a file.

    Attributes:
        path: The JSONL file.
        tokens: Ids of all examples.  # [t]
        boundaries: Where inputs and targets begin in `tokens`, in turn, and the end.  # [2n + 1] int64
        fingerprint: sha256 of the ids and boundaries.
    """

    def __init__(self, path: Path, cache: Path) -> None:
        """Map the cache.

        Raises:
            UserError: it is damaged.
        """
        self.path = path
        try:
            manifest = json.loads((cache / "manifest.json").read_bytes())
            self.tokens: NDArray[Any] = np.memmap(cache / "tokens.bin", manifest["dtype"], "r")
            self.boundaries: NDArray[np.int64] = np.memmap(cache / "boundaries.bin", "<i8", "r")
            self._lines = np.memmap(cache / "lines.bin", "<i8", "r")
            self.fingerprint: str = manifest["fingerprint"]
            complete = (self.tokens.size, len(self)) == (manifest["tokens"], manifest["examples"])
            complete &= 2 * len(self) + 1 == self.boundaries.size and self.boundaries[-1] == self.tokens.size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{cache} is damaged ({' '.join(str(error).split())}); remove it") from error
        if not complete:
            raise UserError(f"{cache} is damaged (sizes of its files do not agree); remove it")

    def __len__(self) -> int:
        """Number of examples."""
        return self._lines.size

    def line(self, example: int) -> int:
        """Where an example stands in its file."""
        return int(self._lines[example])

    def lengths(self, begin: int, end: int) -> NDArray[np.int64]:
        """Tokens of inputs and targets of examples begin, ..., end - 1, each with its EOS: `[m, 2]`."""
        return np.diff(self.boundaries[2 * begin : 2 * end + 1]).reshape(-1, 2)


def open_examples(path: Path, task: Task, tokenizer: Tokenizer, cache_directory: Path | None = None) -> ExampleStore:
    """The examples of a file of `task`, tokenized now unless that was done before.

    Args:
        path: JSON lines.
        task: Its prefix goes before each input; its keys say where the texts are.
        tokenizer: Makes the ids; `<extra_id_n>` in a text is sentinel n.
        cache_directory: Where the cache goes; None: beside the file.

    Raises:
        UserError: the file is unusable (the message names the line), or the cache cannot be written or is damaged.
    """
    directory = path.parent if cache_directory is None else cache_directory
    cache = directory / f"{path.name}.{_cache_key(path, task, tokenizer)}.cache"
    if not cache.is_dir():
        try:
            make_directory(directory)
            with locked(cache) as held:
                if held:
                    _remove_abandoned(cache)
                if not cache.is_dir():
                    _make(cache, path, task, tokenizer)
        except OSError as error:
            raise UserError(
                f"{cache} cannot be written: {error.strerror}; name a directory for it with --data-cache-path"
            ) from error
    return ExampleStore(path, cache)


def _cache_key(path: Path, task: Task, tokenizer: Tokenizer) -> str:
    """What tells caches of the same file apart."""
    content = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                content.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    parts = [content.hexdigest(), tokenizer.fingerprint, task.prefix, task.inputs_key, task.targets_key]
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()[:16]


def _partial_prefix(cache: Path) -> str:
    """How the names of what processes of this machine write begin; a process id and a random part follow."""
    return f"{cache.name}.partial-{socket.gethostname()}-"


def _remove_abandoned(cache: Path) -> None:
    """Remove what processes of this machine left that are no more. Other machines may have a lock of their own."""
    prefix = _partial_prefix(cache)
    for entry in list(cache.parent.iterdir()):
        process = re.fullmatch(re.escape(prefix) + "([0-9]+)-[0-9a-f]{8}", entry.name)
        if process and not _is_alive(int(process[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _make(cache: Path, path: Path, task: Task, tokenizer: Tokenizer) -> None:
    """Tokenize the file into `cache`, in the memory of a chunk."""
    partial = cache.with_name(f"{_partial_prefix(cache)}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    dtype = optimal_dtype(tokenizer.vocab_size)
    digest = hashlib.sha256()
    num_examples = num_tokens = 0
    try:
        with ExitStack() as stack:
            names = ("tokens.bin", "boundaries.bin", "lines.bin")
            files = [stack.enter_context((partial / name).open("wb")) for name in names]
            files[1].write(np.zeros(1, "<i8").tobytes())
            for examples in example_chunks(path, task):
                sides = _tokenize(examples, path, task, tokenizer)
                lengths = np.fromiter(map(len, sides), np.int64, len(sides))
                content = (
                    np.fromiter(chain.from_iterable(sides), dtype, int(lengths.sum())).tobytes(),
                    (num_tokens + np.cumsum(lengths)).astype("<i8").tobytes(),
                    np.array([example.line for example in examples], "<i8").tobytes(),
                )
                for file, data in zip(files, content, strict=True):
                    file.write(data)
                digest.update(content[0] + content[1])
                num_examples += len(examples)
                num_tokens += int(lengths.sum())
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        manifest = {
            "format": "megatron-t5 examples", "version": CACHE_VERSION, "dtype": dtype.str, "examples": num_examples,
            "tokens": num_tokens, "fingerprint": digest.hexdigest(),
        }  # fmt: skip
        write_durably(partial / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
        fsync_directory(partial)
        try:
            partial.rename(cache)
        except OSError:
            if not cache.is_dir():  # and no other process was first
                raise
        fsync_directory(cache.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tokenize(examples: list[Example], path: Path, task: Task, tokenizer: Tokenizer) -> list[list[int]]:
    """Inputs and targets in turn, with EOS."""
    texts = [text for example in examples for text in (task.prefix + example.inputs, example.targets[0])]
    sides = tokenizer.tokenize_prompts(texts)
    for n, side in enumerate(sides):
        if not side:
            key = (task.inputs_key, task.targets_key)[n % 2]
            raise UserError(f"{path}:{examples[n // 2].line}: {key!r} gives no tokens; mend the line or remove it")
        side.append(tokenizer.eos_id)
    return sides
