"""Turns text corpora into indexed datasets of token ids.

    files -> chunks of whole records -> texts -> ids (preprocessing_workers.py) -> writers, in order

The stages overlap: a bounded number of chunks is under way, so that memory does not grow with the corpus, and results
are written in the order of the input, so that the output does not depend on the number of workers. A worker that
dies ends the run with an error. `<output_prefix>_<key>_document.{bin,idx,json}` appear complete or not at all. What a
killed run has written is kept until the next one, which goes on from there if asked to (preprocessing_journal.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.corpus_reader import (
    START,
    InputFormat,
    Position,
    SampleBy,
    Source,
    find_sources,
    read_chunks,
)
from megatron.core.datasets.indexed_format import (
    bin_path,
    idx_path,
    is_sharded,
    manifest_format,
    manifest_path,
    optimal_dtype,
)
from megatron.core.datasets.output_lock import journal_path
from megatron.core.datasets.preprocessing_journal import PUBLISHING, Journal, is_publishing
from megatron.core.datasets.preprocessing_output import (
    OutputWriter,
    manifest_of,
    publish_output,
    require_own_manifests,
    tokenizer_directory,
    unfinished_bytes,
)
from megatron.core.datasets.preprocessing_workers import (
    MESSAGES_PER_REASON,
    Ahead,
    NumberedChunk,
    Progress,
    TokenizedChunk,
    TokenizeOptions,
    Workers,
    signals_wait,
    tokenize_here,
)
from megatron.core.errors import UserError
from megatron.core.file_utils import read_json
from megatron.core.tokenizers import Tokenizer, build_tokenizer, require_replaceable

_CHUNKS_READ_AHEAD = 2


@dataclass(kw_only=True)
class PreprocessConfig:
    """What to preprocess, and how.

    Attributes:
        input: Files, directories and glob patterns; `hf://NAME` (table_reader.py).
        output_prefix: Start of the output's names; its directory is created.
        tokenizer: Tokenizer flags.
        json_keys: Keys of the texts; one dataset each.
        append_eod: End each document with the tokenizer's eos id.
        workers: Processes that tokenize; 1 tokenizes in a thread of this process.
        input_format: `auto` goes by the file's name.
        text_sample_by: What a document is in plain text.
        on_error: What to do with a record that cannot be used.
        overwrite: Replace datasets that exist.
        resume: Go on after the last piece that a run with the same flags finished before it was stopped.
        shard_tokens: Cut the output into shards of so many tokens (the last document of each goes beyond).
        journal_interval_s: Seconds between two pieces; what is done since the last one is done again by `resume`.
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
    resume: bool = False
    shard_tokens: int | None = None
    journal_interval_s: float = 10.0
    log_interval: int = 1000

    def __post_init__(self) -> None:
        for flag, value in (("--workers", self.workers), ("--log-interval", self.log_interval)):
            if value < 1:
                raise UserError(f"{flag} is {value}; it must be at least 1")
        if self.shard_tokens is not None and self.shard_tokens < 1:
            raise UserError(f"--shard-tokens is {self.shard_tokens}; it must be at least 1")
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


def preprocess(config: PreprocessConfig, log: TextIO | None = None) -> PreprocessStats:
    """Write one dataset for each key of `config.json_keys`, with its manifest and a copy of the tokenizer.

    Args:
        config: What to do.
        log: Where progress lines go; stderr by default.

    Raises:
        UserError: an input, the tokenizer or the output is unusable, a record is (with `on_error` "stop"), or there
            is no text at all. Nothing is left under the output's names then. Unfinished files stay, after other errors
            and signals too, if there is a piece to go on from; a line of `log` tells.
    """
    log = log or sys.stderr
    sources = find_sources(config.input, config.input_format, config.text_sample_by)
    _check_files(config, sources)
    tokenizer = build_tokenizer(config.tokenizer)
    if config.resume and not config.overwrite and _is_complete(config, sources, tokenizer):
        print("nothing to resume: the output is complete", file=log, flush=True)
        return PreprocessStats(prefixes=[config.prefix_of(key) for key in config.json_keys])
    with ExitStack() as stack:
        with signals_wait():
            run = stack.enter_context(_Run(config, sources, tokenizer, log))
        if not run.is_finished:
            results = run.results()
            stack.callback(results.close)
            for progress, result in results:
                run.write(progress, result)
            run.prepare()
        with signals_wait():
            run.publish()
    return run.stats


class _Run:
    """A run of `preprocess`: journal, outputs and statistics. As a context manager, it clears up after an error."""

    def __init__(self, config: PreprocessConfig, sources: list[Source], tokenizer: Tokenizer, log: TextIO) -> None:
        self._config, self._sources, self._tokenizer, self._log = config, sources, tokenizer, log
        self._prefixes = [config.prefix_of(key) for key in config.json_keys]
        goes_on = config.resume and is_publishing(self._prefixes[0])
        for prefix in self._prefixes:
            found = manifest_path(prefix) if is_sharded(prefix) else idx_path(prefix)
            if found.exists() and not config.overwrite and not goes_on:
                which = ", and its manifest names another run (other flags or files)" if config.resume else ""
                raise UserError(f"{found} exists{which}; give another --output-prefix, or --overwrite to replace it")
        self._run = run_fingerprint(config, sources, tokenizer)
        self._journal = Journal(self._prefixes, _identity(config, sources, tokenizer), config.resume)
        state = self._journal.state or {}
        stats = state.get("stats", {})
        self.stats = PreprocessStats(**{**stats, "skipped": Counter(stats.get("skipped")), "prefixes": self._prefixes})
        self.is_finished = PUBLISHING in state
        self._is_published = False
        self._num_shards: list[int | None] = state.get(PUBLISHING, [])
        self._source, self._position = state.get("source", 0), Position(*state.get("position", START))
        self._outputs: list[OutputWriter] = []
        self._progress = _Progress(sources, self.stats, config.log_interval, log)
        self._piece_written = time.monotonic()
        try:
            if not self.is_finished:
                self._open_outputs(state.get("outputs"))
        except BaseException:
            self._end(keep=bool(state))
            raise
        if state:
            self._say(f"resuming after {self.stats.documents:,} documents")

    def _open_outputs(self, states: list[dict[str, Any]] | None) -> None:
        config, dtype = self._config, optimal_dtype(self._tokenizer.vocab_size)
        for n, (key, prefix) in enumerate(zip(config.json_keys, self._prefixes, strict=True)):
            output = OutputWriter(
                prefix,
                dtype,
                self._manifest(key),
                self._tokenizer,
                shard_tokens=config.shard_tokens,
                overwrite=config.overwrite,
                state=states[n] if states else None,
            )
            self._outputs.append(output)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is None or self._is_published:  # a signal waited until everything had its name
            self._end(keep=True)
            return
        state = self._journal.state
        if state is not None:
            size = sum(unfinished_bytes(output.prefix, output.num_shards) for output in self._outputs)
            self._say(
                f"unfinished files are kept ({self._prefixes[0]}*.partial, {size / 1e6:.1f} MB): the same command with "
                f"--resume goes on after {state['stats']['documents']:,} documents, without it starts over"
            )
        elif not isinstance(error, UserError):
            self._say("nothing unfinished is left")
        self._end(keep=state is not None)

    def _end(self, keep: bool) -> None:
        with ExitStack() as stack:  # all of them, in the reverse order, if one fails too
            stack.callback(self._journal.close)
            if not keep:
                stack.callback(self._journal.remove)
            for output in self._outputs:
                stack.callback(output.close if keep else output.discard)

    def results(self) -> Generator[tuple[Progress, TokenizedChunk], None, None]:
        """The ids of everything that is still to be done, in order."""
        config = self._config
        options = TokenizeOptions(config.tokenizer, config.json_keys, config.append_eod)
        chunks = Ahead(self._chunks(), _CHUNKS_READ_AHEAD)
        if config.workers == 1:
            yield from tokenize_here(chunks, self._tokenizer, options)
            return
        workers = Workers(config.workers, options)
        try:
            yield from workers.tokenize(chunks)
        finally:
            workers.end()

    def _chunks(self) -> Iterator[NumberedChunk]:
        position = self._position
        for number in range(self._source, len(self._sources)):
            for chunk in read_chunks(self._sources[number], start=position, keys=self._config.json_keys):
                yield NumberedChunk(number, chunk)
            position = START

    def write(self, progress: Progress, result: TokenizedChunk) -> None:
        """Append a chunk's documents, and make a piece of what was written since the last one when it is time."""
        stats = self.stats
        _report_errors(self._config, result, stats, self._log)
        for output, tokens, lengths in zip(self._outputs, result.tokens, result.lengths, strict=True):
            output.add_documents(tokens, lengths)
        stats.documents += len(result.lengths[0])
        stats.tokens += sum(map(len, result.tokens))
        stats.empty += result.empty
        self._source, self._position = progress.source, progress.end
        self._progress.update(progress)
        if time.monotonic() - self._piece_written >= self._config.journal_interval_s:
            self._journal.add(self._state() | {"outputs": [output.checkpoint() for output in self._outputs]})
            self._piece_written = time.monotonic()

    def _state(self) -> dict[str, Any]:
        stats = {name: value for name, value in vars(self.stats).items() if name != "prefixes"}
        return {"source": self._source, "position": list(self._position), "stats": stats}

    def prepare(self) -> None:
        """Write all that takes disk space, which comes before the first old dataset goes."""
        for key, output in zip(self._config.json_keys, self._outputs, strict=True):
            if output.num_tokens == 0:
                raise UserError(_nothing_found(self._config, key, self.stats))
        for output in self._outputs:
            output.prepare()
        self._num_shards = [output.num_shards for output in self._outputs]

    def publish(self) -> None:
        """Give everything its name."""
        for output in self._outputs:
            output.require_own_files()
        if not self.is_finished:
            self._journal.add(self._state() | {PUBLISHING: self._num_shards})
        for key, prefix, num_shards in zip(self._config.json_keys, self._prefixes, self._num_shards, strict=True):
            publish_output(prefix, num_shards, manifest_of(prefix, self._manifest(key)))
        self._journal.remove()
        self._is_published = True
        self._progress.finish()

    def _manifest(self, key: str) -> dict[str, Any]:
        return {
            "json_key": key,
            "append_eod": self._config.append_eod,
            "inputs": [{"name": source.path.name, "bytes": source.size} for source in self._sources],
            "run": self._run,
            "tokenizer": self._tokenizer.describe(),
        }

    def _say(self, line: str) -> None:
        print(line, file=self._log, flush=True)


def _is_complete(config: PreprocessConfig, sources: list[Source], tokenizer: Tokenizer) -> bool:
    """Whether an earlier run with these flags and files ended well, as the manifests tell."""
    run = run_fingerprint(config, sources, tokenizer)
    for key in config.json_keys:
        prefix = config.prefix_of(key)
        journal = journal_path(prefix)
        if journal.exists() and journal.stat().st_size:
            return False
        if manifest_format(manifest_path(prefix)) is None or not (is_sharded(prefix) or idx_path(prefix).exists()):
            return False
        found = read_json(manifest_path(prefix))
        if (found.get("run"), found.get("json_key")) != (run, key):
            return False
    return True


def run_fingerprint(config: PreprocessConfig, sources: list[Source], tokenizer: Tokenizer) -> str:
    """What a manifest says of the run that wrote it: a sha256 over its flags and the files' paths, sizes and times."""
    return hashlib.sha256(json.dumps(_identity(config, sources, tokenizer)).encode()).hexdigest()[:16]


def _identity(config: PreprocessConfig, sources: list[Source], tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides on the bytes of the output, by flag."""
    return {
        "--input": [[str(source.path.resolve()), source.size, source.path.stat().st_mtime_ns] for source in sources],
        "--input-format or --text-sample-by": [source.records for source in sources],
        "--json-keys": config.json_keys,
        "--append-eod": config.append_eod,
        "--shard-tokens": config.shard_tokens,
        "tokenizer": tokenizer.describe(),
    }


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
        require_replaceable(tokenizer_directory(prefix))
        require_own_manifests(prefix)


def _report_errors(config: PreprocessConfig, result: TokenizedChunk, stats: PreprocessStats, log: TextIO) -> None:
    """Stop at the first error, or count all and show the first of each reason."""
    if result.messages and config.on_error == "stop":
        raise UserError(f"{result.messages[0][1]}; mend it, or leave such records out with --on-error skip")
    shown: Counter[str] = Counter()
    for reason, message in result.messages:
        if stats.skipped[reason] + shown[reason] < MESSAGES_PER_REASON:
            print(f"skipped {message}", file=log, flush=True)
        shown[reason] += 1
    stats.skipped += result.reasons


def _nothing_found(config: PreprocessConfig, key: str, stats: PreprocessStats) -> str:
    skipped = "".join(f", {count} with {reason}" for reason, count in stats.skipped.items())
    return (
        f"--input {' '.join(config.input)}: no text under key {key!r} ({stats.empty} empty records{skipped}); "
        "nothing was written"
    )


class _Progress:
    """Plain progress lines: what is done, how fast, and how long the rest will take by bytes of input."""

    def __init__(self, sources: list[Source], stats: PreprocessStats, log_interval: int, log: TextIO) -> None:
        sizes = [source.size for source in sources]
        self._before = [sum(sizes[:n]) for n in range(len(sizes))]
        self._total = max(sum(sizes), 1)
        self._stats, self._interval, self._log = stats, log_interval, log
        self._last_time = time.monotonic()
        self._start = self._last_time - stats.elapsed_s  # of the first run, where this one goes on
        self._last_documents = stats.documents

    def update(self, progress: Progress) -> None:
        """Count a chunk that is written; print when there is something new to say."""
        stats, now = self._stats, time.monotonic()
        stats.text_bytes += progress.text_bytes
        stats.elapsed_s = now - self._start
        if stats.documents - self._last_documents < self._interval or now - self._last_time < 1.0:
            return
        self._last_documents, self._last_time = stats.documents, now
        done = min((self._before[progress.source] + progress.bytes_read) / self._total, 1.0)
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
            files = ".json and its shards" if is_sharded(prefix) else ".bin, .idx and .json"
            self._print(f"wrote {prefix}{files}")

    def _rates(self) -> str:
        stats = self._stats
        seconds = max(stats.elapsed_s, 1e-9)
        return (
            f"{stats.documents:,} documents | {stats.tokens:,} tokens | {stats.text_bytes / 1e6 / seconds:.2f} MB/s | "
            f"{stats.documents / seconds:,.0f} documents/s"
        )

    def _print(self, line: str) -> None:
        print(line, file=self._log, flush=True)
