"""Preprocessing that is stopped at any instant and resumed writes the bytes of an undisturbed run; shards."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megatron.core.config import TokenizerConfig
from megatron.core.datasets import preprocessing, preprocessing_output
from megatron.core.datasets.corpus import open_corpus
from megatron.core.datasets.corpus_reader import read_chunks
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetWriter, encode_manifest
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.core.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
BYTES = TokenizerConfig(tokenizer_type="ByteTokenizer")
FORMS: dict[str, dict[str, Any]] = {
    "in.jsonl": {},
    "in.jsonl.gz": {"shard_tokens": 4000, "append_eod": True, "json_keys": ["text", "title"]},
    "in.jsonl.zst": {"overwrite": True, "shard_tokens": 5000},
    "in.txt": {"text_sample_by": "paragraph", "overwrite": True},
}


def write_input(path: Path, records: int = 120, words: int = 60) -> Path:
    generator = random.Random(len(path.name))
    texts = [" ".join(generator.choices(["a", "bc", "d\u00e9f"], k=generator.randrange(words))) for _ in range(records)]
    if path.suffix == ".txt":
        path.write_bytes("\n\n".join(texts).encode())
        return path
    rows = [{"text": text, "title": text[: n % 5]} for n, text in enumerate(texts)]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress, ".jsonl": bytes}
    path.write_bytes(pack[path.suffix](content))
    return path


def build(path: Path, prefix: Path, **options: Any) -> str:
    log = io.StringIO()
    given = {"input": [str(path)], "output_prefix": str(prefix), "tokenizer": BYTES, "journal_interval_s": 0.0}
    preprocess(PreprocessConfig(**given | options), log)
    return log.getvalue()


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "read_chunks", functools.partial(read_chunks, chunk_bytes=1500))


class Killed(BaseException):
    """The process ends here, without cleaning up."""


@contextmanager
def killed_at(step: int) -> Iterator[list[int]]:
    """The process is "killed" before its file operation number `step`; gives a list with the operations so far."""
    done = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if done[0] == step:
                raise Killed
            done[0] += 1
            return function(*arguments, **named)

        return call

    def close_only(run: Any, keep: bool) -> None:
        for output in run._outputs:
            output.close()
        run._journal.close()

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "rename"), (os, "unlink")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(IndexedDatasetWriter, "_append", counted(IndexedDatasetWriter._append))
        patch.setattr(preprocessing_output.OutputWriter, "discard", preprocessing_output.OutputWriter.close)
        patch.setattr(preprocessing._Run, "_end", close_only)
        yield done


@pytest.mark.parametrize("name", FORMS)
def test_killed_between_any_two_steps(tmp_path: Path, small_chunks: None, name: str) -> None:
    options = FORMS[name]
    path = write_input(tmp_path / name)
    (tmp_path / "whole").mkdir()
    build(path, tmp_path / "whole" / "x", **options)
    expected = digests(tmp_path / "whole")
    old = write_input(tmp_path / "old.jsonl", records=10)
    generator = random.Random(0)
    step, trial, resumed = 0, 0, 0
    while True:
        trial += 1
        folder = tmp_path / str(trial)
        if options.get("overwrite"):
            build(old, folder / "x")
        with killed_at(step) as done:
            try:
                build(path, folder / "x", **options)
            except Killed:
                pass
            else:
                break
        assert done[0] == step
        again = options | ({"overwrite": True} if options.get("overwrite") else {})
        log = build(path, folder / "x", resume=True, **again)
        resumed += "resuming after" in log
        assert digests(folder) == expected, f"killed at step {step}"
        step += generator.randrange(1, 24)
    assert trial > 6 and resumed > 3


def test_shards_are_one_corpus(tmp_path: Path, small_chunks: None) -> None:
    path = write_input(tmp_path / "in.jsonl")
    build(path, tmp_path / "one")
    build(path, tmp_path / "cut", shard_tokens=1000)
    whole = IndexedDataset(tmp_path / "one_text_document")
    corpus = open_corpus(tmp_path / "cut_text_document")
    assert len(corpus.shards) > 5
    assert np.array_equal(np.concatenate(corpus.pieces), whole.tokens)
    assert (corpus.num_documents, corpus.num_tokens) == (whole.num_documents, whole.num_tokens)
    for shard in corpus.shards[:-1]:  # the last document is the first that reaches 1000
        assert shard.num_tokens - len(shard[-1]) < 1000 <= shard.num_tokens
    assert corpus.manifest is not None and (tmp_path / corpus.manifest["tokenizer_directory"]).is_dir()
    assert corpus.shards[3].manifest is not None
    assert corpus.shards[3].manifest["tokenizer_directory"] == "cut_text_document_tokenizer"
    with pytest.raises(UserError, match=r"cut_text_document\.json exists"):
        build(path, tmp_path / "cut", shard_tokens=1000)
    build(path, tmp_path / "cut", shard_tokens=3000, overwrite=True)  # fewer shards: none of the old ones stays
    fewer = open_corpus(tmp_path / "cut_text_document")
    assert len(fewer.shards) == len(list(tmp_path.glob("cut_text_document-*.idx"))) < len(corpus.shards)
    build(path, tmp_path / "cut", overwrite=True)
    assert not list(tmp_path.glob("cut_text_document-*"))


def test_what_cannot_be_resumed_is_refused(tmp_path: Path, small_chunks: None) -> None:
    path = write_input(tmp_path / "in.jsonl")
    with killed_at(60), pytest.raises(Killed):
        build(path, tmp_path / "x")
    left = digests(tmp_path)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--append-eod", {"append_eod": True}),
        ("--shard-tokens", {"shard_tokens": 10}),
        ("tokenizer", {"tokenizer": TokenizerConfig(tokenizer_type="ByteTokenizer", vocab_extra_ids=10)}),
        ("--json-keys", {"json_keys": ["text", "title"]}),
    ]
    for flag, change in changes:
        with pytest.raises(UserError, match=f"--resume: .*x_text_document.journal.partial .*{flag}") as caught:
            build(path, tmp_path / "x", resume=True, **change)
        assert "\n" not in str(caught.value)
        (tmp_path / "x_title_document.journal.partial").unlink(missing_ok=True)
        assert digests(tmp_path) == left
    path.touch()
    with pytest.raises(UserError, match="--input"):
        build(path, tmp_path / "x", resume=True)
    build(path, tmp_path / "x")  # without --resume it starts over
    assert not list(tmp_path.glob("*.partial"))
    build(path, tmp_path / "y", resume=True)  # nothing to resume
    assert "the output is complete" in build(path, tmp_path / "y", resume=True)
    with pytest.raises(UserError, match=r"y_text_document\.idx exists"):
        build(path, tmp_path / "y", resume=True, append_eod=True)


def test_damaged_leftovers(tmp_path: Path, small_chunks: None) -> None:
    path = write_input(tmp_path / "in.jsonl")
    (tmp_path / "whole").mkdir()
    build(path, tmp_path / "whole" / "x")
    journal = tmp_path / "a" / "x_text_document.journal.partial"
    with killed_at(80), pytest.raises(Killed):
        build(path, tmp_path / "a" / "x")
    journal.write_bytes(journal.read_bytes()[:-7])  # a torn line: the piece before it counts
    assert "resuming" in build(path, tmp_path / "a" / "x", resume=True)
    assert digests(tmp_path / "a") == digests(tmp_path / "whole")
    with killed_at(80), pytest.raises(Killed):
        build(path, tmp_path / "b" / "x")
    (tmp_path / "b" / "x_text_document.bin.partial").write_bytes(b"")
    with pytest.raises(UserError, match="drop --resume"):
        build(path, tmp_path / "b" / "x", resume=True)
    (tmp_path / "b" / "x_text_document.journal.partial").write_bytes(os.urandom(3000))
    build(path, tmp_path / "b" / "x", resume=True)
    assert digests(tmp_path / "b") == digests(tmp_path / "whole")


def test_a_bad_record_after_hours_can_be_skipped(tmp_path: Path, small_chunks: None) -> None:
    path = write_input(tmp_path / "in.jsonl")
    path.write_bytes(path.read_bytes() + b"{broken\n")
    with pytest.raises(UserError, match=r"in\.jsonl:121"):
        build(path, tmp_path / "x")
    assert "resuming after" in build(path, tmp_path / "x", resume=True, on_error="skip")
    build(path, tmp_path / "y", on_error="skip")
    same = [(tmp_path / f"{n}_text_document.idx").read_bytes() for n in "xy"]
    assert same[0] == same[1] and not list(tmp_path.glob("*.partial"))


def kill_and_resume(root: Path, path: Path, trial: int, expected: dict[str, str], run_s: float) -> int:
    """Kill runs with SIGKILL at random moments, at least one, until one ends; returns the kills."""
    generator = random.Random(trial)
    folder = root / f"trial{trial}"
    flags = ["--input", path, "--output-prefix", folder / "x", "--tokenizer-type", "ByteTokenizer", "--append-eod"]
    flags += ["--workers", generator.choice([1, 2]), "--journal-interval", 0, "--shard-tokens", 700_000, "--resume"]
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, TOOL, *map(str, flags)], stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=generator.uniform(0.1, 1.1) * run_s if kills < 4 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors
        assert digests(folder) == expected, f"trial {trial} after {kills} kills"
        if kills:
            return kills
        shutil.rmtree(folder)  # it was too quick


def check_kills(root: Path, trials: int) -> None:
    path = write_input(root / "in.jsonl.gz", records=25_000, words=100)
    begin = time.monotonic()
    flags = ["--input", path, "--output-prefix", root / "whole" / "x", "--tokenizer-type", "ByteTokenizer"]
    flags += ["--append-eod", "--workers", 1, "--shard-tokens", 700_000]
    subprocess.run([sys.executable, TOOL, *map(str, flags)], check=True, capture_output=True)
    run_s = time.monotonic() - begin
    expected = digests(root / "whole")
    kills = [kill_and_resume(root, path, trial, expected, run_s) for trial in range(trials)]
    print(f"{trials} of {trials} trials gave the same bytes, {sum(kills)} kills")
    assert sum(kills) >= trials


def test_killed_at_random(tmp_path: Path) -> None:
    check_kills(tmp_path, 1)


@pytest.mark.slow
def test_killed_at_random_fifty_times(tmp_path: Path) -> None:
    check_kills(tmp_path, 50)


def test_only_the_output_of_the_same_run_is_complete(tmp_path: Path) -> None:
    """Other flags and files are not taken for it, whatever their names and sizes."""
    path, prefix = tmp_path / "in" / "a.txt", tmp_path / "x"
    (tmp_path / "other").mkdir()
    for folder in ("in", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.txt").write_text("one\ntwo\n\nthree\n")
    build(path, prefix, shard_tokens=5)
    before = digests(tmp_path)
    assert "the output is complete" in build(path, prefix, shard_tokens=5, resume=True, workers=2)

    def refused(given: Path, **options: Any) -> None:
        with pytest.raises(UserError, match=r"json exists, and its manifest names another run .*--overwrite"):
            build(given, prefix, resume=True, **{"shard_tokens": 5} | options)
        assert digests(tmp_path) == before

    refused(path, shard_tokens=6)
    refused(path, text_sample_by="paragraph")
    refused(path, append_eod=True)
    refused(tmp_path / "other" / "a.txt")
    manifest = tmp_path / "x_text_document.json"
    content = json.loads(manifest.read_bytes())
    del content["manifest_crc32"], content["run"]
    manifest.write_bytes(encode_manifest(content))  # as older releases wrote it
    before = digests(tmp_path)
    refused(path)
    path.write_text("six\ntwo\n\nthree\n")  # of the same length
    before = digests(tmp_path)
    refused(path)
    build(path, prefix, shard_tokens=5, resume=True, overwrite=True)
    assert "the output is complete" in build(path, prefix, shard_tokens=5, resume=True)


def test_another_key_of_a_run_that_was_written_meanwhile(tmp_path: Path, small_chunks: None) -> None:
    path = write_input(tmp_path / "in.jsonl")
    with killed_at(100), pytest.raises(Killed):
        build(path, tmp_path / "x", json_keys=["text", "title"])
    with killed_at(60), pytest.raises(Killed):
        build(path, tmp_path / "x", json_keys=["title"])
    with pytest.raises(UserError, match=r"another run has begun to write .*x_title_document.journal.partial"):
        build(path, tmp_path / "x", json_keys=["text", "title"], resume=True)
