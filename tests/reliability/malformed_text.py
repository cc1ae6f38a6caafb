"""R10: malformed input of preprocessing, and workers that are killed.

`--on-error stop` names file and line and leaves nothing; `skip` counts the records by reason and writes the bytes that
the clean rest gives. A worker that is killed ends the run at once, with nothing left, and the next run is whole.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.preprocessing import PreprocessConfig, PreprocessStats, preprocess
from megatron.core.errors import UserError
from tests.reliability.forked import outcome_in_child

BAD_LINES = {  # reason and part of the message
    b'{"text": "cut': ("invalid JSON", "column"),
    b'["text"]': ("not a JSON object", "a JSON array, expected an object with 'text'"),
    b'{"body": "x"}': ("no key 'text'", "(keys: 'body'); see --json-keys"),
    b'{"text": null}': ("'text' is not a string", "is a JSON null"),
    b'{"text": 3}': ("'text' is not a string", "is a JSON number"),
    b'{"text": "\xff"}': ("invalid UTF-8", "byte 0xff at column 11"),
    b'{"text": "\\ud800"}': ("unpaired surrogate", "unpaired surrogate"),
    b"[" * 100_000: ("invalid JSON", "invalid JSON"),
    b'{"text": ' + b"9" * 5000 + b"}": ("invalid JSON", "invalid JSON"),
}


class Case(NamedTuple):
    """An input file, and what is to come of it.

    Attributes:
        name: Of the file.
        content: Its bytes.
        clean: Bytes of a file `clean.jsonl` that gives the same dataset; None: there is no text at all.
        line: Where `--on-error stop` stops; None: there is nothing wrong.
        skipped: Records that `skip` leaves out, by reason.
    """

    name: str
    content: bytes
    clean: bytes | None
    line: int | None = None
    skipped: dict[str, int] = {}  # noqa: RUF012 - never changed


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def cases() -> Iterator[Case]:
    good = jsonl("one", "two")
    more_bad = [b'{"text": "nul \x00"}', b'{"text": ["a"]}', b'{"text": {}}', b'{"Text": "x"}', b"\x00\x00", b"}"]
    reasons = ["invalid JSON", "'text' is not a string", "'text' is not a string", "no key 'text'"]
    reasons += ["invalid JSON", "invalid JSON"]
    bad = {line: reason for line, (reason, _) in BAD_LINES.items()} | dict(zip(more_bad, reasons, strict=True))
    packings: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("in.jsonl", bytes), ("in.jsonl.gz", gzip.compress), ("in.jsonl.zst", zstandard.compress),
    ]  # fmt: skip
    for line, reason in bad.items():
        for name, pack in packings:
            content = jsonl("one") + b"\r\n" + line + b"\n" + jsonl("two") + line + b"\n"
            yield Case(name, pack(content), good, 3, {reason: 2})
    yield Case("in.txt", b"one\n\xfftwo\ntwo\n", good, 2, {"invalid UTF-8": 1})
    yield Case("in.jsonl", b"\xef\xbb\xbf" + good, good)
    yield Case("in.jsonl", good.replace(b"\n", b"\r\n"), good)
    yield Case("in.jsonl", b"\n \n" + good.rstrip(b"\n"), good)
    yield Case("in.jsonl", jsonl("one", "", "two"), good)
    yield Case("in.jsonl", jsonl("nul \0"), jsonl("nul \0"))
    yield Case("in.txt", b"nul \0\n", jsonl("nul \0"))
    long_text = "long text " * 5_000_000  # 50 MB
    yield Case("in.jsonl", jsonl(long_text, "two"), jsonl(long_text, "two"))
    yield Case("in.txt", (long_text.strip() + "\ntwo\n").encode(), jsonl(long_text.strip(), "two"))
    for empty in (b"", b"\n\n", jsonl("", ""), b"\xef\xbb\xbf"):
        yield Case("in.jsonl", empty, None)
    generator = random.Random(0)
    lines = [jsonl("".join(generator.choices("abcdefgh", k=400))) for _ in range(4000)]
    unreadable = {"unreadable rest of a file": 1}
    for name, pack in packings[1:]:
        whole, tail = pack(b"".join(lines[:2000])), pack(b"".join(lines[2000:]))
        # A compressed file is readable up to a place that its format decides: members before the damaged one are.
        yield Case(name, whole + tail[:3], b"".join(lines[:2000]), 2001, unreadable)
        yield Case(name, whole + b"garbage", b"".join(lines[:2000]), 2001, unreadable)
        yield Case(name, b"no such format", None, 1, unreadable)


def build(path: Path, output: Path, on_error: str = "stop", workers: int = 1) -> PreprocessStats:
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer")
    options: dict[str, Any] = {"input": [str(path)], "output_prefix": str(output), "on_error": on_error}
    return preprocess(PreprocessConfig(**options, tokenizer=tokenizer, workers=workers), io.StringIO())


def dataset_bytes(output: Path) -> tuple[bytes, bytes]:
    return Path(f"{output}_text_document.bin").read_bytes(), Path(f"{output}_text_document.idx").read_bytes()


def refusal(path: Path, output: Path, on_error: str) -> str:
    """The message of a build that is refused and leaves nothing; "" when it is not refused."""
    try:
        build(path, output, on_error)
    except UserError as error:
        left = [found.name for found in output.parent.iterdir() if found.name.startswith(output.name)]
        assert not left, f"left {left}"
        return str(error)
    return ""


def check_stop(case: Case, path: Path, output: Path) -> None:
    message = refusal(path, output, "stop")
    if case.line is not None:
        assert message.startswith(f"{path}:{case.line}: ") and "\n" not in message, message
    elif case.clean is None:
        assert "no text under key 'text'" in message, message
    else:
        assert not message, message


def check_skip(case: Case, path: Path, output: Path) -> None:
    if case.clean is None:
        message = refusal(path, output, "skip")
        assert "no text under key 'text'" in message, message
        return
    clean = path.with_name("clean.jsonl")
    clean.write_bytes(case.clean)
    build(clean, path.with_name("clean"))
    stats = build(path, output, "skip")
    assert dict(stats.skipped) == case.skipped, stats.skipped
    assert dataset_bytes(output) == dataset_bytes(path.with_name("clean")), "other bytes than the clean rest gives"


def case_trial(case: Case, check: Callable[[Case, Path, Path], None]) -> str:
    """What a check of a case comes to: "passed", or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / case.name
        path.write_bytes(case.content)

        def run() -> str:
            check(case, path, Path(folder) / "x")
            return "passed"

        return outcome_in_child(run)


def killed_worker_trial(path: Path, whole: Path, seed: int) -> str:
    """One of two workers is killed amid the work on `path`: "passed", or what went wrong.

    `whole` is the output of a build without disturbance.
    """
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "x"

        def run() -> str:
            moment = generator.uniform(0, 1.5), generator.random()
            threading.Thread(target=kill_a_worker, args=moment, daemon=True).start()
            try:
                build(path, output, workers=2)
            except UserError as error:
                assert "a worker process died (status -9;" in str(error), error
                assert not list(output.parent.iterdir()), f"left {list(output.parent.iterdir())}"
                build(path, output)
            assert dataset_bytes(output) == dataset_bytes(whole), "other bytes than a whole build"
            return "passed"

        return outcome_in_child(run)


def kill_a_worker(delay_s: float, which: float) -> None:
    """Kill a worker of this process, a moment after the last of two has started."""
    children: list[str] = []
    while len(children) < 2:
        time.sleep(0.01)
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        children = [child for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    time.sleep(delay_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(children[int(which * len(children))]), signal.SIGKILL)


def row(what: str, outcomes: dict[str, str], seconds: float) -> dict[str, Any]:
    failures = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome != "passed"]
    counts = {"trials": len(outcomes), "passed": len(outcomes) - len(failures), "seconds": round(seconds, 1)}
    return {"test": "R10", "what": what, **counts} | ({"failures": failures} if failures else {})


def count(trials: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of R10; `trials` workers are killed."""
    rows = []
    checks = {
        "malformed input stops with file and line, nothing is left": check_stop,
        "malformed input skipped and counted, same bytes as the clean rest": check_skip,
    }
    for what, check in checks.items():
        begin = time.monotonic()
        outcomes = {f"case {n}, {case.name}": case_trial(case, check) for n, case in enumerate(cases())}
        rows.append(row(what, outcomes, time.monotonic() - begin))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder) / "in.txt", Path(folder) / "whole"
        path.write_bytes(b"some words of a line\n" * 300_000)  # 6 chunks
        build(path, whole)
        killed = {f"seed {seed + n}": killed_worker_trial(path, whole, seed + n) for n in range(trials)}
    what = "a worker is killed: an error or a whole dataset, then a clean build"
    return [*rows, row(what, killed, time.monotonic() - begin)]
