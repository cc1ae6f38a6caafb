"""Turns text corpora into indexed datasets of token ids.

    files -> chunks of whole records (main process) -> ids of each chunk (workers) -> writers, in order (main process)

The three overlap: a bounded number of chunks is under way, so that memory does not grow with the corpus, and results
are written in the order of the input, so that the output does not depend on the number of workers. A worker that
dies ends the run with an error. `<output_prefix>_<key>_document.{bin,idx,json}` appear complete or not at all.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.corpus_reader import (
    Chunk,
    InputFormat,
    SampleBy,
    Source,
    find_sources,
    parse_records,
    read_chunks,
)
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    manifest_path,
    optimal_dtype,
    remove_dataset,
)
from megatron.core.errors import UserError
from megatron.core.file_utils import partial_path, replace_directory
from megatron.core.tokenizers import Tokenizer, build_tokenizer, require_replaceable

_CHUNKS_PER_WORKER = 3  # under way at a time: one in work, one waiting, one whose result waits for its turn
_MESSAGES_PER_REASON = 3  # of skipped records; the rest is only counted
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # those that end a tool (megatron/training/arguments.py)
_EXIT_STATUS_WITHIN_S = 1.0


@dataclass(kw_only=True)
class PreprocessConfig:
    """What to preprocess, and how.

    Attributes:
        input: Files and glob patterns.
        output_prefix: Start of the output's names; its directory is created.
        tokenizer: Tokenizer flags.
        json_keys: Keys of the texts; one dataset each.
        append_eod: End each document with the tokenizer's eos id.
        workers: Processes that tokenize; 1 tokenizes in this process.
        input_format: `auto` goes by the file's name.
        text_sample_by: What a document is in plain text.
        on_error: What to do with a record that cannot be used.
        overwrite: Replace datasets that exist.
        log_interval: Documents between two progress lines (at most one line a second).
    """

    input: list[str]
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    append_eod: bool = False
    workers: int = 1
    input_format: InputFormat = "auto"
    text_sample_by: SampleBy = "line"
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
    log_interval: int = 1000

    def __post_init__(self) -> None:
        for flag, value in (("--workers", self.workers), ("--log-interval", self.log_interval)):
            if value < 1:
                raise UserError(f"{flag} is {value}; it must be at least 1")
        if not self.input:
            raise UserError("--input is missing; give one file or more")
        if not self.json_keys or len(set(self.json_keys)) < len(self.json_keys):
            raise UserError(f"--json-keys is {' '.join(self.json_keys)!r}; give different keys, at least one")

    def prefix_of(self, key: str) -> Path:
        """Prefix of the dataset of a key, as Megatron-LM names it."""
        return Path(f"{self.output_prefix}_{key}_document")


@dataclass
class PreprocessStats:
    """What was done.

    Attributes:
        documents: Documents written, for each key.
        tokens: Ids written, over all keys.
        empty: Records whose texts gave no ids; left out.
        skipped: Records left out for an error, by reason.
        text_bytes: Decompressed bytes of input.
        elapsed_s: Seconds.
        prefixes: Prefixes of the datasets.
    """

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    elapsed_s: float = 0.0
    prefixes: list[Path] = field(default_factory=list)


class TokenizedChunk(NamedTuple):
    """A chunk's documents as ids; compact, since it travels between processes."""

    tokens: list[npt.NDArray[Any]]  # for each key, ids of all documents end to end
    lengths: list[npt.NDArray[np.int32]]  # for each key, ids of each document
    empty: int
    reasons: Counter[str]
    messages: list[tuple[str, str]]  # (reason, "file:line: detail") of the first errors


def tokenize_chunk(chunk: Chunk, tokenizer: Tokenizer, config: PreprocessConfig) -> TokenizedChunk:
    """Parse and tokenize the records of a chunk.

    A record whose texts all give no ids is left out; with several keys, one that is empty in some stays (of length 0
    there), so that document n of each dataset comes from the same record.
    """
    reasons: Counter[str] = Counter()
    messages: list[tuple[str, str]] = []
    good: list[list[str]] = []
    for record in parse_records(chunk, config.json_keys):
        if record.reason is None:
            good.append(record.texts)
            continue
        reasons[record.reason] += 1
        if reasons[record.reason] <= _MESSAGES_PER_REASON:
            messages.append((record.reason, f"{chunk.path}:{record.line}: {record.detail}"))
    if chunk.error is not None:
        reason = "unreadable rest of a file"
        reasons[reason] += 1
        line = chunk.first_line + chunk.data.count(b"\n")
        messages.append((reason, f"{chunk.path}:{line}: cannot be read from here on: {chunk.error}"))
    rows = [tokenizer.tokenize_batch([texts[k] for texts in good]) for k in range(len(config.json_keys))]
    kept = [n for n in range(len(good)) if any(column[n] for column in rows)]
    end = [tokenizer.eos_id] if config.append_eod else []
    dtype = optimal_dtype(tokenizer.vocab_size)
    documents = [[column[n] + end for n in kept] for column in rows]
    lengths = [np.fromiter(map(len, column), np.int32, len(column)) for column in documents]
    tokens = [np.fromiter(chain.from_iterable(column), dtype) for column in documents]
    return TokenizedChunk(tokens, lengths, len(good) - len(kept), reasons, messages)


def preprocess(config: PreprocessConfig, log: TextIO | None = None) -> PreprocessStats:
    """Write one dataset for each key of `config.json_keys`, with its manifest and a copy of the tokenizer.

    Args:
        config: What to do.
        log: Where progress lines go; stderr by default.

    Raises:
        UserError: an input, the tokenizer or the output is unusable, a record is (with `on_error` "stop"), or there
            is no text at all. Nothing is left under the output's names then.
    """
    log = log or sys.stderr
    sources = find_sources(config.input, config.input_format, config.text_sample_by)
    _check_files(config, sources)
    tokenizer = build_tokenizer(config.tokenizer)
    prefixes = [config.prefix_of(key) for key in config.json_keys]
    stats = PreprocessStats(prefixes=prefixes)
    progress = _Progress(sources, stats, config.log_interval, log)
    dtype = optimal_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        with _signals_wait():
            writers = [stack.enter_context(IndexedDatasetWriter(p, dtype, config.overwrite)) for p in prefixes]
        results = _tokenized_chunks(config, sources, tokenizer)
        stack.callback(results.close)
        for chunk, result in results:
            _report_errors(config, result, stats, log)
            for writer, tokens, lengths in zip(writers, result.tokens, result.lengths, strict=True):
                writer.add_documents(tokens, lengths)
            stats.documents += len(result.lengths[0])
            stats.tokens += sum(map(len, result.tokens))
            stats.empty += result.empty
            progress.update(chunk)
        for key, writer in zip(config.json_keys, writers, strict=True):
            if writer.num_documents == 0 or writer.num_tokens == 0:
                raise UserError(_nothing_found(config, key, stats))
        # All that takes disk space comes before the first old dataset goes.
        for key, writer in zip(config.json_keys, writers, strict=True):
            directory = partial_path(_tokenizer_directory(writer.prefix))
            writer.discards(directory)
            tokenizer.save(directory)
            writer.prepare(_manifest(config, key, writer.prefix, tokenizer, sources))
        with _signals_wait():
            for writer in writers:
                _publish(writer)
    progress.finish()
    return stats


def _check_files(config: PreprocessConfig, sources: list[Source]) -> None:
    """Refuse files that are read twice, and output that would replace what is none of ours.

    Raises:
        UserError: one of these.
    """
    inputs: set[Path] = set()
    for source in sources:
        path = source.path.resolve()
        if path in inputs:
            raise UserError(f"--input names {source.path} twice; its documents would be in the dataset twice")
        inputs.add(path)
    for key in config.json_keys:
        prefix = config.prefix_of(key)
        for output in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
            if output.resolve() in inputs:
                raise UserError(f"--input {output} would be replaced by the output; give another --output-prefix")
        require_replaceable(_tokenizer_directory(prefix))


def _tokenizer_directory(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + "_tokenizer")


def _manifest(
    config: PreprocessConfig, key: str, prefix: Path, tokenizer: Tokenizer, sources: list[Source]
) -> dict[str, Any]:
    return {
        "json_key": key,
        "append_eod": config.append_eod,
        "inputs": [{"name": source.path.name, "bytes": source.size} for source in sources],
        "tokenizer": tokenizer.describe(),
        "tokenizer_directory": _tokenizer_directory(prefix).name,
        "tokenizer_files": {
            path.name: {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
            for path in sorted(partial_path(_tokenizer_directory(prefix)).iterdir())
        },
    }


def _publish(writer: IndexedDatasetWriter) -> None:
    """Put the dataset and its tokenizer, both complete under temporary names, in their places."""
    directory = _tokenizer_directory(writer.prefix)
    # The old dataset goes before its tokenizer does: data must never be found beside a tokenizer that is not its own.
    remove_dataset(writer.prefix)
    replace_directory(partial_path(directory), directory)
    try:
        writer.publish()
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _report_errors(config: PreprocessConfig, result: TokenizedChunk, stats: PreprocessStats, log: TextIO) -> None:
    """Stop at the first error, or count all and show the first of each reason."""
    if result.messages and config.on_error == "stop":
        raise UserError(f"{result.messages[0][1]}; mend it, or leave such records out with --on-error skip")
    shown: Counter[str] = Counter()
    for reason, message in result.messages:
        if stats.skipped[reason] + shown[reason] < _MESSAGES_PER_REASON:
            print(f"skipped {message}", file=log, flush=True)
        shown[reason] += 1
    stats.skipped += result.reasons


def _nothing_found(config: PreprocessConfig, key: str, stats: PreprocessStats) -> str:
    skipped = "".join(f", {count} with {reason}" for reason, count in stats.skipped.items())
    return (
        f"--input {' '.join(config.input)}: no text under key {key!r} ({stats.empty} empty records{skipped}); "
        "nothing was written"
    )


def _tokenized_chunks(
    config: PreprocessConfig, sources: list[Source], tokenizer: Tokenizer
) -> Generator[tuple[tuple[int, Chunk], TokenizedChunk], None, None]:
    """All chunks in order, each with the number of its source, and their ids."""
    chunks = ((n, chunk) for n, source in enumerate(sources) for chunk in read_chunks(source))
    if config.workers == 1:
        for n, chunk in chunks:
            yield (n, chunk), tokenize_chunk(chunk, tokenizer, config)
        return
    workers = _Workers(config)
    try:
        yield from workers.tokenize(chunks)
    finally:
        workers.end()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Signals wait until the block is left. A worker that starts in it inherits that, until `_work`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals are handled when the block is left, whichever thread they reach."""
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield
        return
    arrived: list[int] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in before:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


class _Workers:
    """Processes that tokenize chunks, each with a pipe of its own.

    A worker that dies, even in the middle of a result, is the end of its pipe. (The results of a `ProcessPoolExecutor`
    share one, which then can wait for ever.)
    """

    def __init__(self, config: PreprocessConfig) -> None:
        # "spawn": a forked child would inherit the locks of whatever threads the caller runs.
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, SpawnProcess] = {}
        for _ in range(config.workers):
            ours, theirs = context.Pipe()
            with _signals_blocked(), theirs:
                process = context.Process(target=_work, args=(theirs, config), daemon=True)
                process.start()
            self._processes[ours] = process

    def tokenize(self, chunks: Iterator[tuple[int, Chunk]]) -> Iterator[tuple[tuple[int, Chunk], TokenizedChunk]]:
        """The chunks in order, each with its number of the source and its ids."""
        under_way: deque[tuple[int, Chunk]] = deque()
        results: dict[int, TokenizedChunk] = {}  # by number of the chunk
        sent: dict[Connection, deque[int]] = {connection: deque() for connection in self._processes}
        taken = 0  # results that were given out

        def next_result() -> tuple[tuple[int, Chunk], TokenizedChunk]:
            nonlocal taken
            while taken not in results:
                for connection in wait([connection for connection, numbers in sent.items() if numbers]):
                    assert isinstance(connection, Connection)
                    with self._death_reported(connection):
                        results[sent[connection].popleft()] = connection.recv()
            taken += 1
            return under_way.popleft(), results.pop(taken - 1)

        for number, (source, chunk) in enumerate(chunks):
            idlest = min(sent, key=lambda connection: len(sent[connection]))
            with self._death_reported(idlest):
                idlest.send(chunk)
            sent[idlest].append(number)
            under_way.append((source, chunk))
            if len(under_way) >= _CHUNKS_PER_WORKER * len(sent):
                yield next_result()
        while under_way:
            yield next_result()

    def end(self) -> None:
        """End all processes, whatever they do."""
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    @contextmanager
    def _death_reported(self, connection: Connection) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            process = self._processes[connection]
            process.join(_EXIT_STATUS_WITHIN_S)
            raise UserError(
                f"--workers {len(self._processes)}: a worker process died (status {process.exitcode}; out of memory?); "
                "nothing was written; use fewer"
            ) from error


def _work(connection: Connection, config: PreprocessConfig) -> None:
    """What a worker process does: for each chunk that comes, send what `tokenize_chunk` gives."""
    for number in _SIGNALS:  # they are the main process's to handle
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    chunks: SimpleQueue[Chunk] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, chunks), daemon=True).start()
    tokenizer = build_tokenizer(config.tokenizer)
    while True:
        connection.send(tokenize_chunk(chunks.get(), tokenizer, config))


def _receive(connection: Connection, chunks: SimpleQueue[Chunk]) -> None:
    """Take chunks as they come, so that the main process never waits to send one; end with it."""
    try:
        while True:
            chunks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


class _Progress:
    """Plain progress lines: what is done, how fast, and how long the rest will take by bytes of input."""

    def __init__(self, sources: list[Source], stats: PreprocessStats, log_interval: int, log: TextIO) -> None:
        sizes = [source.size for source in sources]
        self._before = [sum(sizes[:n]) for n in range(len(sizes))]
        self._total = max(sum(sizes), 1)
        self._stats, self._interval, self._log = stats, log_interval, log
        self._start = self._last_time = time.monotonic()
        self._last_documents = 0

    def update(self, position: tuple[int, Chunk]) -> None:
        """Count a chunk that is written; print when there is something new to say."""
        source, chunk = position
        stats, now = self._stats, time.monotonic()
        stats.text_bytes += len(chunk.data)
        stats.elapsed_s = now - self._start
        if stats.documents - self._last_documents < self._interval or now - self._last_time < 1.0:
            return
        self._last_documents, self._last_time = stats.documents, now
        done = min((self._before[source] + chunk.bytes_read) / self._total, 1.0)
        eta = f"{stats.elapsed_s / done * (1.0 - done):.0f} s" if done else "unknown"
        self._print(f"{100 * done:.1f}% | {self._rates()} | ETA {eta}")

    def finish(self) -> None:
        """Print the totals."""
        stats = self._stats
        stats.elapsed_s = time.monotonic() - self._start
        self._print(f"done | {self._rates()} | {stats.elapsed_s:.1f} s")
        left_out = [f"{count} records with {reason}" for reason, count in sorted(stats.skipped.items())]
        if stats.empty:
            left_out.append(f"{stats.empty} empty records")
        if left_out:
            self._print("left out: " + ", ".join(left_out))
        for prefix in stats.prefixes:
            self._print(f"wrote {prefix}.bin, .idx and .json")

    def _rates(self) -> str:
        stats = self._stats
        seconds = max(stats.elapsed_s, 1e-9)
        return (
            f"{stats.documents:,} documents | {stats.tokens:,} tokens | {stats.text_bytes / 1e6 / seconds:.2f} MB/s | "
            f"{stats.documents / seconds:,.0f} documents/s"
        )

    def _print(self, line: str) -> None:
        print(line, file=self._log, flush=True)
