"""Text given to `--data-path`: the run is that of the dataset that the tool makes of it; mistakes are told."""

import json
from pathlib import Path

import pytest

from tests.corpora import make_byte_dataset, write_prose
from tests.training.test_pretrain import TINY, launch, rows, run_here

FLAGS = [*TINY, "--tokenizer-type", "ByteTokenizer", "--train-iters", "6"]


def test_two_processes_prepare_it_once_and_train_as_on_the_dataset(tmp_path: Path):
    corpus = write_prose(tmp_path / "corpus.jsonl")
    dataset = make_byte_dataset(corpus)
    metrics = [tmp_path / f"{name}.jsonl" for name in ("text", "again", "dataset")]
    batch = ["--global-batch-size", "16", "--micro-batch-size"]
    flags = [*FLAGS, "--data-path", str(corpus), *batch]
    result = launch([*flags, "8", "--metrics-file", str(metrics[0])], processes=2)
    assert result.returncode == 0, result.stderr
    assert (result.stderr.count("preparing"), result.stderr.count("done | 60 documents")) == (1, 1)
    assert len(list(tmp_path.glob("corpus.jsonl.*"))) == 1
    again = run_here([*flags, "16", "--metrics-file", str(metrics[1])])
    assert again.returncode == 0 and "preparing" not in again.stderr
    run_here([*FLAGS, "--data-path", str(dataset), *batch, "16", "--metrics-file", str(metrics[2])])
    assert rows(metrics[1]) == rows(metrics[2])
    assert rows(metrics[0]) == pytest.approx(rows(metrics[2]), rel=1e-4)


def test_a_broken_line_ends_the_run_with_one_line(tmp_path: Path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "words"}) + "\n{]\n")
    result = run_here([*FLAGS, "--data-path", str(corpus)])
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{corpus}:2: invalid JSON" in errors[0]
    assert "tools/preprocess_data.py --on-error skip" in errors[0]
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_tokenizer_is_asked_for(tmp_path: Path):
    corpus = write_prose(tmp_path / "corpus.jsonl")
    result = run_here([*TINY, "--data-path", str(corpus)])
    assert result.returncode == 1 and "is text, which needs a tokenizer; give --tokenizer-type" in result.stderr
