"""Text given to the trainer: prepared once as the tool does it, by one of many processes, again after a change."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.core.config import DataConfig, TokenizerConfig
from megatron.core.datasets import cache_lock, corpus_cache, table_reader
from megatron.core.datasets.corpus_cache import is_text, prepare_text
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.core.errors import UserError

BYTES = TokenizerConfig(tokenizer_type="ByteTokenizer")
TEXTS = [f"document {n}: " + "words and words " * (n % 5) for n in range(50)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of JSON lines in a folder of its own."""
    path = tmp_path / "data" / "corpus.jsonl"
    path.parent.mkdir()
    return write(path, TEXTS)


def write(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def prepare(path: Path | str, log: io.StringIO | None = None, **config: Any) -> Path:
    return prepare_text(str(path), BYTES, DataConfig(**config), workers=1, log=log or io.StringIO())


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def texts_of(prefix: Path) -> list[str]:
    """Documents of a dataset of bytes, whose ids follow three special ones."""
    dataset = IndexedDataset(prefix)
    return [bytes(int(i) - 3 for i in dataset[n]).decode() for n in range(dataset.num_documents)]


def test_the_dataset_of_the_tool_made_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = prepare(corpus)
    (cache,) = set(corpus.parent.iterdir()) - {corpus}
    assert prefix == cache / "corpus_text_document"
    assert cache.name.startswith("corpus.jsonl.") and cache.suffix == ".cache"
    own = corpus.with_name("own")
    preprocess(PreprocessConfig(input=[str(corpus)], output_prefix=str(own), tokenizer=BYTES), io.StringIO())
    assert contents(prefix) == contents(Path(f"{own}_text_document"))
    monkeypatch.setattr(corpus_cache, "preprocess", None)
    assert prepare(corpus) == prefix
    monkeypatch.chdir(corpus.parent)
    assert prepare(corpus.name) == prefix
    (corpus.parent / "link").symlink_to(corpus.parent)
    assert prepare(corpus.parent / "link" / corpus.name).parent.name == cache.name


def test_another_state_key_or_tokenizer_makes_another_and_leaves_the_old_one(corpus: Path) -> None:
    prefixes = [prepare(corpus)]
    write(corpus, TEXTS[1:])
    log = io.StringIO()
    prefixes.append(prepare(corpus, log))
    assert f"{prefixes[0].parent} is of an older state" in log.getvalue()
    rows = [json.dumps({"text": text, "title": f"title {n}"}) for n, text in enumerate(TEXTS)]
    corpus.write_text("\n".join(rows))
    prefixes += [prepare(corpus), prepare(corpus, text_key="title")]
    more = TokenizerConfig(tokenizer_type="ByteTokenizer", vocab_extra_ids=50)
    prefixes.append(prepare_text(str(corpus), more, DataConfig(), log=io.StringIO()))
    assert len({prefix.parent for prefix in prefixes}) == 5
    assert [texts_of(prefix)[0] for prefix in prefixes] == [TEXTS[0], TEXTS[1], TEXTS[0], "title 0", TEXTS[0]]


def test_patterns_and_a_place_of_ones_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        write(tmp_path / folder / "deep" / "x.jsonl", [folder, "x"])
        (tmp_path / folder / "deep" / "y.txt").write_text("one line\nanother\n")
    caches = tmp_path / "caches"
    prefixes = [prepare(tmp_path / folder / "deep" / "x.jsonl", data_cache_path=str(caches)) for folder in "ab"]
    assert [texts_of(prefix) for prefix in prefixes] == [["a", "x"], ["b", "x"]]
    pattern = prepare(tmp_path / "*" / "deep" / "?.*")
    assert texts_of(pattern) == ["a", "x", "one line", "another", "b", "x", "one line", "another"]
    assert pattern.parent.parent == tmp_path and "*" not in pattern.parent.name
    assert sorted(path.name for path in tmp_path.iterdir() if path != pattern.parent) == ["a", "b", "caches"]


def test_data_sets_of_the_hub_lie_beside_what_was_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": TEXTS})
    file = tmp_path / "downloaded.arrow"
    with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)
    monkeypatch.setattr(table_reader, "hub_files", lambda address: [file])
    assert is_text("hf://owner/name@train")
    prefix = prepare("hf://owner/name@train")
    assert texts_of(prefix) == TEXTS
    assert prefix.parent.parent == tmp_path and prefix.parent.name.startswith("owner_name_train.")


def test_what_is_text(corpus: Path) -> None:
    prefix = prepare(corpus)
    assert is_text(str(corpus)) and is_text(f"{corpus.parent}/*.jsonl") and is_text(str(corpus.parent))
    short = str(prefix).removesuffix("_text_document")
    Path(short).mkdir()  # a directory of the same name does not hide a dataset
    assert not is_text(str(prefix)) and not is_text(short)
    assert not is_text(f"{corpus}x") and not is_text(f"{corpus.parent}/*.none")


def test_mistakes_are_told_in_the_trainers_flags_and_leave_nothing(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a tokenizer; give --tokenizer-type"):
        prepare_text(str(corpus), TokenizerConfig(), DataConfig())
    with pytest.raises(UserError, match=r"corpus.jsonl:1: no key 'body' .*see --text-key; .*preprocess_data.py --on-e"):
        prepare(corpus, text_key="body")
    other = corpus.with_suffix(".doc")
    other.write_text("words")
    with pytest.raises(UserError, match=r"--data-path .*corpus.doc: .*give tools/preprocess_data.py --input-format"):
        prepare(other)
    other.unlink()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Not a directory; name a directory .*--data-cache-path"):
        prepare(corpus, data_cache_path=str(tmp_path / "file" / "caches"))
    os.mkfifo(other.with_suffix(".txt"))
    with pytest.raises(UserError, match=r"--data-path .*corpus.txt is no file that can be read again"):
        prepare(other.with_suffix(".txt"))
    other.with_suffix(".txt").unlink()
    assert list(corpus.parent.iterdir()) == [corpus]


def test_a_file_that_changes_meanwhile_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*args: Any) -> None:
        preprocess(*args)
        write(corpus, TEXTS[:7])

    monkeypatch.setattr(corpus_cache, "preprocess", changed)
    with pytest.raises(UserError, match=r"--data-path .* was changed while it was read"):
        prepare(corpus)
    assert list(corpus.parent.iterdir()) == [corpus]


PROGRAM = """
import functools, sys, time
from megatron.core.config import DataConfig, TokenizerConfig
from megatron.core.datasets import cache_lock, corpus_cache, preprocessing
cache_lock.FIRST_MESSAGE_AFTER_S = 0.05
corpus_cache.PreprocessConfig = functools.partial(preprocessing.PreprocessConfig, journal_interval_s=0)
preprocessing.read_chunks = functools.partial(preprocessing.read_chunks, chunk_bytes=1000)
write = preprocessing.OutputWriter.add_documents
def slowly(*args):
    write(*args)
    print("written", flush=True)
    time.sleep(float(sys.argv[2]))
preprocessing.OutputWriter.add_documents = slowly
bytes = TokenizerConfig(tokenizer_type="ByteTokenizer")
print(corpus_cache.prepare_text(sys.argv[1], bytes, DataConfig(), workers=1), flush=True)
"""


def start(corpus: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(corpus), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_of_many_processes_makes_it_and_the_others_wait(corpus: Path) -> None:
    outputs = [process.communicate(timeout=60) for process in [start(corpus, 0.2) for _ in range(4)]]
    assert len({out.split()[-1] for out, _ in outputs}) == 1
    assert [sum(line in err for _, err in outputs) for line in ("preparing ", "done | 50 documents")] == [1, 1]
    assert sum("waiting for process " in err for _, err in outputs) >= 1
    (cache,) = set(corpus.parent.iterdir()) - {corpus}
    assert cache.suffix == ".cache"


def test_what_a_killed_process_leaves_is_not_complete_and_is_gone_on_with(corpus: Path) -> None:
    killed, waiting = start(corpus, 0.2), None
    try:
        assert killed.stdout is not None
        assert [killed.stdout.readline() for _ in range(3)] == ["written\n"] * 3
        waiting = start(corpus, 0.0)
        time.sleep(0.2)
        assert not list(corpus.parent.glob("*.cache"))
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    out, err = waiting.communicate(timeout=60)
    assert texts_of(Path(out.split()[-1])) == TEXTS, err
    assert "resuming after " in err
    assert sorted(path.suffix for path in corpus.parent.iterdir()) == [".cache", ".jsonl"]


def test_a_kill_before_the_last_rename(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        preprocess(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_cache, "preprocess", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus)
    assert not list(corpus.parent.glob("*.cache"))
    monkeypatch.setattr(corpus_cache, "preprocess", None)
    assert texts_of(prepare(corpus)) == TEXTS
    assert sorted(path.suffix for path in corpus.parent.iterdir()) == [".cache", ".jsonl"]


def test_without_locks_the_first_one_publishes(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no locks here")

    first: list[Path] = []

    def after_another(*args: Any) -> None:
        if not first:
            first.append(Path())
            first[0] = prepare(corpus)
        preprocess(*args)

    monkeypatch.setattr(cache_lock.fcntl, "flock", refuse)
    monkeypatch.setattr(corpus_cache, "preprocess", after_another)
    assert [prepare(corpus)] == first
    assert sorted(path.suffix for path in corpus.parent.iterdir()) == [".cache", ".jsonl"]
