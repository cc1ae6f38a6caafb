"""Tokenizer training: T5's special pieces, reproducible, clear errors, what long lines are cut to."""

from __future__ import annotations

import gzip
import json
import pydoc_data.topics
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import SentencePieceTokenizer
from tests.programs import load_program

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_program(TOOL)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 kB of the language reference that every Python carries."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    topics = list(pydoc_data.topics.topics.items())[:20]
    path.write_text("".join(json.dumps({"text": text, "topic": name}) + "\n" for name, text in topics))
    return path


def test_model_is_t5s_kind(tool: ModuleType, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "t5.model"
    assert tool.main(["--input", str(corpus), "--output", str(path), "--vocab-size", "400"]) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)
    assert model.vocab_size() == 400
    assert model.encode("\uff34 x  y", out_type=str)[0] == model.encode("T", out_type=str)[0]  # nmt_nfkc, as T5
    tokenizer = SentencePieceTokenizer(path)
    assert tokenizer.sentinel_ids[0] == 499
    text = "The statement is executed."
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    printed = capsys.readouterr().out
    assert "400 pieces + 100 sentinels = 500 ids" in printed and f"--tokenizer-model {path}" in printed
    assert [p.name for p in path.parent.iterdir()] == ["t5.model"]


def test_next_command_works_as_printed(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "words that are enough for a few pieces"
    Path("my corpus.data").write_text(json.dumps({"body": text}) + "\n")
    flags = ["--input", "my corpus.data", "--input-format", "jsonl", "--json-keys", "body", "--vocab-size", "22"]
    assert tool.main([*flags, "--output", "a model.model"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert command[:2] == ["python", "tools/preprocess_data.py"]
    subprocess.run([sys.executable, TOOL.with_name("preprocess_data.py"), *command[2:], "--workers", "1"], check=True)
    (ids,) = IndexedDataset("my_data_body_document")
    assert SentencePieceTokenizer("a model.model").detokenize(ids) == text


def test_interrupted(
    tool: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "sample", interrupt)
    assert tool.main(["--input", str(corpus), "--output", str(tmp_path / "x.model")]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n" and not list(tmp_path.iterdir())


def test_a_signal_ends_the_training_outside_of_python(corpus: Path, tmp_path: Path) -> None:
    flags = [
        "--input",
        str(corpus),
        "--json-keys",
        "text",
        "--output",
        str(tmp_path / "x.model"),
        "--vocab-size",
        "900",
    ]
    script = (
        "import os, runpy, sentencepiece, signal, sys, threading\n"
        "lines = ['the same line again and again'] * 20000\n"
        "train = sentencepiece.SentencePieceTrainer.train\n"
        "def signalled(**arguments):\n"
        "    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    while True:\n"  # a training that never ends
        "        train(**arguments | {'sentence_iterator': iter(lines)})\n"
        "sentencepiece.SentencePieceTrainer.train = signalled\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = f"import sys; sys.argv = {[str(TOOL), *flags]!r}\n{script}"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (143, "interrupted; nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_training_is_reproducible(tool: ModuleType, corpus: Path, tmp_path: Path) -> None:
    """The same lines give the same model, from another file and compressed too; another sample gives another."""
    copy = tmp_path / "copy.jsonl.gz"
    copy.write_bytes(gzip.compress(corpus.read_bytes()))
    models = []
    for source, seed in ((corpus, "1"), (copy, "1"), (corpus, "2")):
        prefix = tmp_path / f"model{len(models)}"
        flags = ["--vocab-size", "300", "--input-sentence-size", "500", "--seed", seed]
        assert tool.main(["--input", str(source), "--output-prefix", str(prefix), *flags]) == 0
        models.append(Path(f"{prefix}.model").read_bytes())
    assert models[0] == models[1] != models[2]


def test_bpe_with_byte_fallback(tool: ModuleType, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "bpe.model"
    flags = ["--model-type", "bpe", "--byte-fallback", "--vocab-size", "500"]
    assert tool.main(["--input", str(corpus), "--output", str(path), *flags]) == 0
    tokenizer = SentencePieceTokenizer(path)
    ids = tokenizer.tokenize("\u6f22 \U0001f600")
    assert tokenizer.unk_id not in ids and tokenizer.detokenize(ids) == "\u6f22 \U0001f600"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--vocab-size", "32000"], "enough for"),
        (["--vocab-size", "30"], "the characters of this text alone need"),
        (["--vocab-size", "2"], "--vocab-size is 2"),
        (["--vocab-size", "1000000000000"], "--vocab-size is 1000000000000"),
        (["--output", "folder.model", "--overwrite"], "folder.model is a directory"),
        (["--json-keys", "body"], "corpus.jsonl:1: no key 'body'"),
        (["--character-coverage", "0.5"], "--character-coverage is 0.5"),
        (["--input-sentence-size", "-1"], "--input-sentence-size is -1"),
        (["--output", "tokenizer.bin"], "name it *.model"),
        (["--output", "exists.model"], "exists.model exists"),
        (["--input", "empty.txt"], "no text"),
        (["--input", "none.txt"], "no such file"),
    ],
)
def test_errors(
    tool: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("exists.model").touch()
    Path("empty.txt").touch()
    Path("folder.model").mkdir()
    assert tool.main(["--input", str(corpus), "--output", "new.model", *flags]) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("error: ") and expected in printed
    assert {path.name for path in tmp_path.iterdir()} == {"exists.model", "empty.txt", "folder.model"}


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab \u00e9\u6f22\U0001f600\n", max_size=80), limit=st.integers(4, 20))
def test_lines_are_cut_without_loss(tool: ModuleType, text: str, limit: int) -> None:
    pieces = list(tool.cut_lines(text, limit))
    assert all(piece and piece == piece.strip() and len(piece.encode()) <= limit for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
