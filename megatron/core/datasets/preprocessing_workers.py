"""Turns chunks of text into ids, in one process or in several: the stage of preprocessing that takes the time.

    chunk -> texts (a thread) -> ids (a thread) -> whoever takes the results

Tokenizer libraries let other threads run while they work, so parsing and moving data cost no time of theirs. A worker
process does the same with the chunks that come through its pipe. The results are in the order of the chunks.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.corpus_reader import Chunk, Position, parse_records
from megatron.core.datasets.indexed_format import optimal_dtype
from megatron.core.errors import UserError
from megatron.core.tokenizers import Tokenizer, build_tokenizer

MESSAGES_PER_REASON = 3  # of skipped records; the rest is only counted
# Those that end a tool (megatron/training/arguments.py), and the end of a terminal, which stops a trainer.
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}

_CHUNKS_PER_WORKER = 3  # under way at a time: one in work, one waiting, one whose result waits for its turn
_CHUNKS_AHEAD = 2  # that wait between two threads
_STOPPED_WITHIN_S = 0.05
_EXIT_STATUS_WITHIN_S = 1.0

T = TypeVar("T")


class TokenizeOptions(NamedTuple):
    """What workers need to know."""

    tokenizer: TokenizerConfig
    json_keys: list[str]
    append_eod: bool


class NumberedChunk(NamedTuple):
    """A chunk, and the number of its source."""

    source: int
    chunk: Chunk


class Progress(NamedTuple):
    """How far a result reaches."""

    source: int  # number of the file
    text_bytes: int  # of the chunk
    bytes_read: int  # of the file on disk
    end: Position


class ParsedChunk(NamedTuple):
    """A chunk's texts."""

    texts: list[list[str]]  # for each key, one of each good record
    reasons: Counter[str]
    messages: list[tuple[str, str]]  # (reason, "file:line: detail") of the first errors


class TokenizedChunk(NamedTuple):
    """A chunk's documents as ids; compact, since it travels between processes."""

    tokens: list[npt.NDArray[Any]]  # for each key, ids of all documents end to end
    lengths: list[npt.NDArray[np.int32]]  # for each key, ids of each document
    empty: int
    reasons: Counter[str]
    messages: list[tuple[str, str]]


class WorkerDiedError(UserError):
    """A worker process is gone."""


def parse_chunk(chunk: Chunk, keys: list[str]) -> ParsedChunk:
    """The texts of a chunk, and what is wrong with the rest of it."""
    reasons: Counter[str] = Counter()
    messages: list[tuple[str, str]] = []
    texts: list[list[str]] = [[] for _ in keys]
    for record in parse_records(chunk, keys):
        if record.reason is None:
            for column, text in zip(texts, record.texts, strict=True):
                column.append(text)
            continue
        reasons[record.reason] += 1
        if reasons[record.reason] <= MESSAGES_PER_REASON:
            messages.append((record.reason, f"{chunk.place(record.line)}: {record.detail}"))
    if chunk.error is not None:
        reason = "unreadable rest of a file"
        reasons[reason] += 1
        messages.append((reason, f"{chunk.place(chunk.end.line)}: cannot be read from here on: {chunk.error}"))
    return ParsedChunk(texts, reasons, messages)


def tokenize_parsed(parsed: ParsedChunk, tokenizer: Tokenizer, append_eod: bool) -> TokenizedChunk:
    """Tokenize the texts of a chunk.

    A record whose texts all give no ids is left out; with several keys, one that is empty in some stays (of length 0
    there), so that document n of each dataset comes from the same record.
    """
    dtype = optimal_dtype(tokenizer.vocab_size)
    rows = [tokenizer.tokenize_to_arrays(texts) for texts in parsed.texts]
    kept = np.logical_or.reduce([lengths > 0 for _, lengths in rows])
    tokens, all_lengths = [], []
    for ids, lengths in rows:
        lengths = lengths[kept]  # what is left out has no ids
        ids = ids.astype(dtype)
        if append_eod:
            ids = np.insert(ids, np.cumsum(lengths), tokenizer.eos_id)
            lengths = lengths + 1
        tokens.append(ids)
        all_lengths.append(lengths.astype(np.int32))
    return TokenizedChunk(tokens, all_lengths, int((~kept).sum()), parsed.reasons, parsed.messages)


def tokenize_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, options: TokenizeOptions
) -> Iterator[TokenizedChunk]:
    """The ids of all chunks, in order; parsing and tokenizing have a thread each."""
    parsed = Ahead((parse_chunk(chunk, options.json_keys) for chunk in chunks), _CHUNKS_AHEAD)
    return Ahead((tokenize_parsed(part, tokenizer, options.append_eod) for part in parsed), _CHUNKS_AHEAD)


class Ahead(Iterator[T]):
    """Items that a thread takes before they are asked for.

    An exception comes where its item would have come. After `close`, or when nobody holds this any more, the thread
    ends as soon as it has the item that it is at; it never keeps the process from ending.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        """Start; up to `depth` items wait, 0 is without limit."""
        self._waiting: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._stopped = threading.Event()
        # The thread has no reference to this object, which could not go away otherwise.
        threading.Thread(target=_take_ahead, args=(items, self._waiting, self._stopped), daemon=True).start()

    def __next__(self) -> T:
        if self._stopped.is_set():
            raise StopIteration
        kind, value = self._waiting.get()
        if kind == "item":
            item: T = value
            return item
        self._stopped.set()
        raise StopIteration if kind == "end" else value

    def close(self) -> None:
        """Take no more."""
        self._stopped.set()

    def __del__(self) -> None:
        self.close()


def _take_ahead(items: Iterator[Any], waiting: queue.Queue[tuple[str, Any]], stopped: threading.Event) -> None:
    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                waiting.put((kind, value), timeout=_STOPPED_WITHIN_S)
                return

    try:
        for item in items:
            put("item", item)
            if stopped.is_set():
                return
        put("end", None)
    except BaseException as error:
        put("error", error)


def tokenize_here(
    chunks: Iterator[NumberedChunk], tokenizer: Tokenizer, options: TokenizeOptions
) -> Iterator[tuple[Progress, TokenizedChunk]]:
    """Tokenize chunks in this process; reading, parsing and tokenizing have a thread each."""
    under_way: deque[Progress] = deque()

    def noted() -> Iterator[Chunk]:
        for source, chunk in chunks:
            under_way.append(Progress(source, len(chunk.data), chunk.bytes_read, chunk.end))
            yield chunk

    for result in tokenize_chunks(noted(), tokenizer, options):
        yield under_way.popleft(), result


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Signals wait until the block is left. A worker that starts in it inherits that, until `work`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals are handled when the block is left, whichever thread they reach."""
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield
        return
    arrived: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in before:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


class Workers:
    """Processes that tokenize chunks, each with a pipe of its own.

    A worker that dies, even in the middle of a result, is the end of its pipe. (The results of a `ProcessPoolExecutor`
    share one, which then can wait for ever.)
    """

    def __init__(self, number: int, options: TokenizeOptions) -> None:
        # "spawn": a forked child would inherit the locks of whatever threads the caller runs.
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, SpawnProcess] = {}
        for _ in range(number):
            ours, theirs = context.Pipe()
            with signals_blocked(), theirs:
                process = context.Process(target=work, args=(theirs, options), daemon=True)
                process.start()
            self._processes[ours] = process

    def tokenize(self, chunks: Iterator[NumberedChunk]) -> Iterator[tuple[Progress, TokenizedChunk]]:
        """The ids of the chunks, in order."""
        under_way: deque[Progress] = deque()
        results: dict[int, TokenizedChunk] = {}  # by number of the chunk
        sent: dict[Connection, deque[int]] = {connection: deque() for connection in self._processes}
        taken = 0  # results that were given out

        def next_result() -> tuple[Progress, TokenizedChunk]:
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
            under_way.append(Progress(source, len(chunk.data), chunk.bytes_read, chunk.end))
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
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            process = self._processes[connection]
            process.join(_EXIT_STATUS_WITHIN_S)
            raise WorkerDiedError(
                f"--workers {len(self._processes)}: a worker process died (status {process.exitcode}; out of memory?); "
                "no dataset was written; use fewer"
            ) from error


def work(connection: Connection, options: TokenizeOptions) -> None:
    """What a worker process does: for each chunk that comes, send its ids."""
    for number in SIGNALS:  # they are the main process's to handle
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # Chunks are taken as they come, so that the main process never waits to send one; it limits their number.
    chunks = Ahead(_received(connection), 0)
    for result in tokenize_chunks(chunks, build_tokenizer(options.tokenizer), options):
        connection.send(result)


def _received(connection: Connection) -> Iterator[Chunk]:
    """The chunks that come through a pipe; the process ends with the one at its other end."""
    try:
        while True:
            yield connection.recv()
    except (EOFError, OSError):
        os._exit(1)
