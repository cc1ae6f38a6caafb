"""Text given to `--data-path`: the run is that of the dataset that the tool makes of it; mistakes are told."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron.core.datasets import corpus_cache, examples
from megatron.core.parallel_state import ParallelContext
from megatron.training.arguments import parse_args
from megatron.training.stopping import StopControl
from megatron.training.training import pretrain_in
from tests.corpora import make_byte_dataset, write_prose
from tests.distributed import run_distributed
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


def test_a_dataset_whose_name_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "data").mkdir()
    make_byte_dataset(write_prose(tmp_path / "data" / "corpus.jsonl"))
    folder = (tmp_path / "data").rename(tmp_path / os.fsdecode(b"\xff"))
    flags = [*TINY, "--train-iters", "1", "--eval-iters", "0", "--data-path", str(folder / "bytes")]
    flags += ["--save", str(folder)]
    config = parse_args(flags).config
    assert pretrain_in(ParallelContext(torch.device("cpu")), config) == 0
    assert f"saved {tmp_path}/\\udcff/iter_0000001" in capsys.readouterr().out


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


def texts_of(objective: str, folder: Path) -> list[str]:
    """Flags of a small text corpus or task."""
    if objective == "denoising":
        return ["--data-path", str(write_prose(folder / "corpus.jsonl"))]
    (folder / "task.jsonl").write_text(json.dumps({"inputs": "question", "targets": "answer"}) + "\n")
    (folder / "tasks.yaml").write_text("- {name: a, train: task.jsonl}\n")
    return ["--objective", "text-to-text", "--task-config", str(folder / "tasks.yaml")]


def take_for_ever(patch: pytest.MonkeyPatch, signalled: bool) -> None:
    """Tokenization begins, and does not end; a signal comes meanwhile, or else once this process waits for others."""

    def tokenize(*arguments: object) -> None:
        if signalled:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)

    def wait(control: StopControl) -> None:
        if not control._signals:
            os.kill(os.getpid(), signal.SIGTERM)
        tell_others(control)

    tell_others = StopControl.tell_others
    patch.setattr(StopControl, "tell_others", wait)
    patch.setattr(corpus_cache, "preprocess", tokenize)
    patch.setattr(examples, "_tokenize", tokenize)


@pytest.mark.parametrize("objective", ["denoising", "text-to-text"])
def test_a_signal_interrupts_the_preparation_and_the_same_command_goes_on(objective: str, tmp_path: Path):
    flags = [*TINY, "--tokenizer-type", "ByteTokenizer", "--train-iters", "1", *texts_of(objective, tmp_path)]
    save = ["--save", str(tmp_path / "run"), "--eval-iters", "0"]
    with pytest.MonkeyPatch.context() as patch:
        take_for_ever(patch, signalled=True)
        for more, status in ((save, 0), ([], 128 + signal.SIGTERM)):
            result = run_here([*flags, *more])
            assert (result.returncode, "stopped after step 0: SIGTERM; " in result.stdout) == (status, True)
    assert not list(tmp_path.glob("*.partial*"))
    result = run_here([*flags, *save])
    assert result.returncode == 0 and "done in" in result.stdout


def _stopped_status(rank: int, folder: Path, objectives: dict[str, list[str]]) -> list[int]:
    """Exit status of a rank of runs whose second one gets a signal while the first prepares the data."""
    statuses = []
    for name, data in objectives.items():
        store = torch.distributed.FileStore(str(folder / f"{name}.store"), 2)
        config = parse_args([*FLAGS, *data]).config
        with pytest.MonkeyPatch.context() as patch:
            take_for_ever(patch, signalled=False)
            statuses.append(pretrain_in(ParallelContext.create(config.parallel, torch.device("cpu"), store), config))
    return statuses


def test_a_signal_to_a_waiting_process_ends_the_preparation_of_another(tmp_path: Path):
    data = {objective: texts_of(objective, tmp_path) for objective in ("denoising", "text-to-text")}
    assert run_distributed(_stopped_status, 2, tmp_path, data, timeout=50) == [[128 + signal.SIGTERM] * 2] * 2
