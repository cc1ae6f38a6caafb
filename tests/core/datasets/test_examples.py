"""The cache of tokenized examples: contents, what makes another one, many processes at once, damage."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.core.datasets import cache_lock
from megatron.core.datasets import examples as module
from megatron.core.datasets.examples import ExampleStore, open_examples
from megatron.core.datasets.text_to_text_tasks import Task
from megatron.core.errors import UserError
from megatron.core.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
TASK = Task(name="t", prefix="p: ")
ROWS: list[dict[str, Any]] = [
    {"inputs": "one", "targets": "1"},
    {"inputs": "a <extra_id_1> b", "targets": ["<extra_id_0>x", "other"]},
    {"inputs": "ä", "targets": "long enough"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a blank line after each example."""
    path = tmp_path / "data" / "file.jsonl"
    path.parent.mkdir()
    path.write_text("\n\n".join(map(json.dumps, ROWS)))
    return path


def texts(store: ExampleStore) -> list[str]:
    """Inputs and targets in turn, which all end with EOS."""
    sides = np.split(store.tokens, store.boundaries[1:-1])
    assert all(side[-1] == TOKENIZER.eos_id for side in sides)
    return [TOKENIZER.detokenize(side) for side in sides]


def test_contents(path: Path) -> None:
    store = open_examples(path, TASK, TOKENIZER)
    expected = ["p: one", "1", "p: a <extra_id_1> b", "<extra_id_0>x", "p: ä", "long enough"]
    assert (len(store), texts(store)) == (3, expected)
    assert TOKENIZER.sentinel_ids[1] in store.tokens[store.boundaries[2] : store.boundaries[3]]
    assert [store.line(n) for n in range(3)] == [1, 3, 5]
    assert store.lengths(1, 3).tolist() == np.diff(store.boundaries).reshape(3, 2)[1:].tolist()
    assert store.tokens.dtype == np.uint16


def test_chunks_make_no_difference(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_examples(path, TASK, TOKENIZER)
    chunks = module.example_chunks
    monkeypatch.setattr(module, "example_chunks", lambda *args: ([e] for chunk in chunks(*args) for e in chunk))
    pieces = open_examples(path, TASK, TOKENIZER, tmp_path / "other")
    assert texts(pieces) == texts(whole)
    assert (pieces.boundaries == whole.boundaries).all()


def test_made_once_for_the_same_content(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "deep" / "cache"
    first = open_examples(path, TASK, TOKENIZER, cache)
    (directory,) = cache.iterdir()
    assert directory.name.startswith("file.jsonl.") and directory.name.endswith(".cache")
    assert list(path.parent.iterdir()) == [path]
    moved = tmp_path / "moved" / "file.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    monkeypatch.setattr(module, "_make", None)
    assert open_examples(moved, TASK, TOKENIZER, cache).fingerprint == first.fingerprint


def test_whatever_changes_the_ids_makes_another(path: Path, tmp_path: Path) -> None:
    status = path.stat()
    rows = [row | {"i": "other", "t": "texts"} for row in ROWS]
    path.write_text("\n".join(map(json.dumps, rows)))
    stores = [
        open_examples(path, task, tokenizer, tmp_path / "cache")
        for task, tokenizer in (
            (TASK, TOKENIZER),
            (Task(name="t"), TOKENIZER),
            (Task(name="t", inputs_key="i"), TOKENIZER),
            (Task(name="t", targets_key="t"), TOKENIZER),
            (TASK, ByteTokenizer(extra_ids=1)),
        )
    ]
    content = path.read_text()
    path.write_text(content.replace("one", "two"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    stores.append(open_examples(path, TASK, TOKENIZER, tmp_path / "cache"))
    assert len({store.fingerprint for store in stores}) == len(list((tmp_path / "cache").iterdir())) == 6


def test_many_processes_at_once(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"inputs": f"number {n}", "targets": "x" * (n % 9 + 1)}) for n in range(9000)))
    cache = open_examples(path, TASK, TOKENIZER).tokens.filename.parent
    shutil.rmtree(cache)
    program = (
        "import sys; from pathlib import Path; from megatron.core.datasets import examples as e\n"
        "from megatron.core.datasets.text_to_text_tasks import Task\n"
        "from megatron.core.tokenizers import ByteTokenizer\n"
        "make, made = e._make, []; e._make = lambda *args: (made.append(1), make(*args))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "store = e.open_examples(Path(sys.argv[1]), Task(name='t', prefix='p: '), ByteTokenizer())\n"
        "print(store.fingerprint, len(store), len(made))"
    )
    command = [sys.executable, "-c", program, str(path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    expected = open_examples(path, TASK, TOKENIZER).fingerprint
    assert [output[:2] for output in outputs] == [[expected, "9000"]] * 4
    assert sum(int(output[2]) for output in outputs) == 1
    assert sorted(path.parent.iterdir()) == sorted([path, cache])


def test_only_what_dead_processes_of_this_machine_left_is_removed(path: Path) -> None:
    cache = open_examples(path, TASK, TOKENIZER).tokens.filename.parent
    shutil.rmtree(cache)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    names = [f"{host}-{ended.pid}", f"{host}-{os.getppid()}", f"other-{ended.pid}", f"{host}-{ended.pid}-1"]
    entries = [path.parent / f"{cache.name}.partial-{name}-0123abcd" for name in names]
    for entry in entries:
        entry.mkdir()
        (entry / "tokens.bin").write_bytes(b"x")
    open_examples(path, TASK, TOKENIZER)
    assert sorted(path.parent.iterdir()) == sorted([path, cache, *entries[1:]])


def test_the_lock_is_one_process_own(tmp_path: Path) -> None:
    inside: list[int] = []
    crowds: list[int] = []

    def enter_often(number: int) -> None:
        for _ in range(30):
            with cache_lock.locked(tmp_path / "cache"):
                inside.append(number)
                time.sleep(1e-4)
                crowds.append(len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(enter_often, range(8)))
    assert crowds == [1] * 240 and not list(tmp_path.iterdir())


def test_without_locks_the_first_one_publishes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(cache_lock.fcntl, "flock", refuse)
    make = module._make
    first: list[ExampleStore] = []

    def make_after_another(*args: Any) -> None:
        if not first:
            first.append(open_examples_with(make, path))
        make(*args)

    def open_examples_with(function: Any, path: Path) -> ExampleStore:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_make", function)
            return open_examples(path, TASK, TOKENIZER)

    second = open_examples_with(make_after_another, path)
    assert (second.tokens == first[0].tokens).all()
    assert sorted(entry.suffix for entry in path.parent.iterdir()) == [".cache", ".jsonl"]


def test_mistakes_leave_nothing(path: Path, tmp_path: Path) -> None:
    path.write_text(json.dumps(ROWS[0]) + "\n{}\n")
    with pytest.raises(UserError, match=rf"{path}:2: no key 'inputs'"):
        open_examples(path, TASK, TOKENIZER)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match=r"none.jsonl cannot be read"):
        open_examples(tmp_path / "none.jsonl", TASK, TOKENIZER)


def test_texts_without_tokens(path: Path) -> None:
    class Silent(ByteTokenizer):
        def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
            return [[] for _ in texts]

    with pytest.raises(UserError, match=rf"{path}:1: 'inputs' gives no tokens"):
        open_examples(path, TASK, Silent())


def test_cache_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"taken/.* cannot be written: Not a directory; .*--data-cache-path"):
        open_examples(path, TASK, TOKENIZER, tmp_path / "taken")


@pytest.mark.parametrize("name", ["tokens.bin", "boundaries.bin", "lines.bin", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "empty"])
def test_damage_is_noticed(path: Path, name: str, how: str) -> None:
    open_examples(path, TASK, TOKENIZER)
    (cache,) = path.parent.glob("*.cache")
    file = cache / name
    content = file.read_bytes()
    file.unlink()
    if how != "gone":
        file.write_bytes(content[:-8] if how == "cut" else b"")
    with pytest.raises(UserError, match=rf"{cache} is damaged .*; remove it"):
        open_examples(path, TASK, TOKENIZER)
