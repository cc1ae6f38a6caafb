"""Text that is given to the trainer in place of an indexed dataset: prepared once, beside it, and found from then on.

`<name>.<key>.cache/` holds an ordinary indexed dataset with its manifest and tokenizer, made as `preprocess_data.py`
makes it without further flags. The key is made from names, sizes and times of modification of the files, the tokenizer
and the key of the text in JSON: a change of any of them makes another cache. The old one is left, since a run may be
reading it. The directory appears complete or not at all. Any number of processes may ask for it at the same time: one
makes it, the others wait. What a killed process has done is taken up by the next one of the same machine.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, cast

from megatron.core.config import DataConfig, TokenizerConfig
from megatron.core.datasets.cache_lock import locked
from megatron.core.datasets.corpus_sources import HUB_PREFIX, Source, find_sources
from megatron.core.datasets.indexed_dataset import is_dataset
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.core.datasets.preprocessing_journal import is_publishing
from megatron.core.errors import UserError
from megatron.core.file_utils import fsync_directory, make_directory
from megatron.core.tokenizers import Tokenizer, build_tokenizer

CACHE_VERSION = 1
BYTES_PER_WORKER = 8 << 20  # fewer are tokenized before another process has started
_NAME = "corpus"

# Flags of preprocess_data.py in its messages: what the trainer calls them, or whose they are.
_TRAINERS_NAMES = {"--input": "--data-path", "--json-keys": "--text-key", "--output-prefix": "--data-cache-path"}
_TOOLS_OWN = ("--on-error", "--input-format", "--resume", "--overwrite", "--workers")


def is_text(path: str) -> bool:
    """Whether a value of `--data-path` names text: files that are there, or a data set of the hub, and no dataset."""
    if path.startswith(HUB_PREFIX):
        return True
    if any(is_dataset(Path(prefix)) for prefix in (path, f"{path}_text_document")):
        return False
    return Path(path).exists() or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))  # noqa: PTH207 - absolute patterns too


def prepare_text(
    path: str,
    tokenizer: TokenizerConfig,
    config: DataConfig,
    workers: int | None = None,
    log: TextIO | None = None,
    built: Tokenizer | None = None,
) -> Path:
    """The prefix of the dataset of `path`, which is prepared now unless that was done before.

    Args:
        path: What `preprocess_data.py --input` takes: file, directory, glob pattern, `hf://NAME`; one corpus.
        tokenizer: The flags.
        config: Says under which key texts stand in JSON lines and where caches go.
        workers: Processes that tokenize; None: as many as there are cores, fewer for little text.
        log: Where progress goes; stderr by default.
        built: The tokenizer of the flags, where it has been loaded already.

    Raises:
        UserError: no tokenizer is given, the text is unusable (the message names the line), or the cache cannot be
            written.
    """
    if not tokenizer.names_tokenizer:
        raise UserError(
            f"--data-path {path} is text, which needs a tokenizer; give --tokenizer-type and --tokenizer-model (or "
            "--vocab-file); tools/train_tokenizer.py makes one"
        )
    try:
        built = built or build_tokenizer(tokenizer)
        sources = find_sources([path])
        cache = _cache_of(path, sources, built, config)
        if not cache.is_dir():
            options = PreprocessConfig(
                input=[path if path.startswith(HUB_PREFIX) else os.path.abspath(path)],  # noqa: PTH100 - as below
                output_prefix="",
                tokenizer=tokenizer,
                json_keys=[config.text_key],
                workers=workers or _fitting_workers(sources),
            )
            _prepare(cache, options, lambda: _cache_of(path, find_sources([path]), built, config), log or sys.stderr)
    except UserError as error:
        raise UserError(_for_the_trainer(str(error))) from error
    except OSError as error:
        raise UserError(
            f"--data-path {path} cannot be prepared: {error.filename or 'a file'}: {error.strerror}; "
            "name a directory with room for it with --data-cache-path"
        ) from error
    return Path(f"{cache / _NAME}_{config.text_key}_document")


def _cache_of(path: str, sources: list[Source], tokenizer: Tokenizer, config: DataConfig) -> Path:
    """The directory of the cache."""
    if path.startswith(HUB_PREFIX):
        beside, name = sources[0].path.parent, path.removeprefix(HUB_PREFIX)
    else:
        given = Path(os.path.abspath(path))  # noqa: PTH100 - resolve would lead to where a link points
        beside = given.parent
        while glob.has_magic(str(beside)) and not beside.exists():
            beside = beside.parent
        name = str(given.relative_to(beside))  # of the file; of a pattern, what stands from its first star on
    name = re.sub(r"[^\w.-]+", "_", name)  # signs that shells leave alone
    files = []
    for source in sources:
        status = source.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"--input {source.path} is no file that can be read again; write the text to one")
        # Files move together with the caches beside them, but not with those that lie in a place of their own.
        shown = os.path.relpath(source.path, beside) if config.data_cache_path is None else str(source.path.resolve())
        files.append([shown, status.st_size, status.st_mtime_ns])
    parts = [CACHE_VERSION, files, tokenizer.fingerprint, config.text_key]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    directory = beside if config.data_cache_path is None else Path(config.data_cache_path)
    return directory / f"{name}.{key}.cache"


def _fitting_workers(sources: list[Source]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 1 + sum(source.size for source in sources) // BYTES_PER_WORKER)


def _prepare(cache: Path, options: PreprocessConfig, name_now: Callable[[], Path], log: TextIO) -> None:
    """Make the cache, unless another process does so first; `name_now` tells what its name would be now."""
    make_directory(cache.parent)
    with locked(cache, log) as held:
        if cache.is_dir():
            return
        _tell_of_others(cache, log)
        # Of this machine alone, so that nothing is written by two where each machine has locks of its own.
        partial = cache.with_name(f"{cache.name}.partial-{socket.gethostname()}")
        if not held:
            partial = partial.with_name(f"{partial.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        print(f"preparing {' '.join(options.input)} in {cache}", file=log, flush=True)
        partial.mkdir(exist_ok=True)
        options.output_prefix = str(partial / _NAME)
        try:
            _preprocess(options, cast(TextIO, _TrainersLog(log, partial, cache)))
        except BaseException:
            with contextlib.suppress(OSError):
                partial.rmdir()  # where nothing is left to go on with
            raise
        if name_now() != cache:
            shutil.rmtree(partial)
            raise UserError(f"--input {options.input[0]} was changed while it was read; start again")
        fsync_directory(partial)
        try:
            partial.rename(cache)
        except OSError:
            shutil.rmtree(partial)
            if not cache.is_dir():  # and no other process was first
                raise
        fsync_directory(cache.parent)


def _preprocess(options: PreprocessConfig, log: TextIO) -> None:
    """Prepare the text, from where a killed process left off."""
    prefix = options.prefix_of(options.json_keys[0])
    if is_dataset(prefix) and not is_publishing(prefix):
        return  # it was killed just before the directory got its name
    options.resume = True
    try:
        preprocess(options, log)
    except UserError as error:
        if not str(error).startswith("--resume"):
            raise
        options.resume = False  # of another version of this program, or the files were elsewhere
        preprocess(options, log)


class _TrainersLog(io.TextIOBase):
    """Lines of `preprocess` in the trainer's flags and with the final names."""

    def __init__(self, log: TextIO, partial: Path, cache: Path) -> None:
        self._log, self._partial, self._cache = log, str(partial), str(cache)

    def write(self, text: str) -> int:
        """Write a line or a part of one."""
        return self._log.write(_for_the_trainer(text.replace(self._partial + os.sep, self._cache + os.sep)))

    def flush(self) -> None:
        """Let what was written be seen."""
        self._log.flush()


def _tell_of_others(cache: Path, log: TextIO) -> None:
    """Name caches of the same text that this one takes the place of; a run may be reading them."""
    name = cache.name.rsplit(".", 2)[0]
    for other in sorted(cache.parent.glob(f"{glob.escape(name)}.*.cache")):
        if re.fullmatch(re.escape(name) + r"\.[0-9a-f]{16}\.cache", other.name):
            print(
                f"{other} is of an older state of the text, another tokenizer or key; remove it when no run reads it",
                file=log,
                flush=True,
            )


def _for_the_trainer(message: str) -> str:
    """A message of `preprocess_data.py` in the trainer's flags."""

    def translated(found: re.Match[str]) -> str:
        flag = found[0]
        return f"tools/preprocess_data.py {flag}" if flag in _TOOLS_OWN else _TRAINERS_NAMES.get(flag, flag)

    message = re.sub(r"with --resume (goes on .*), without it starts over", r"\1", message)
    return re.sub(r"(?<![\w-])--[a-z][a-z-]*", translated, message)
