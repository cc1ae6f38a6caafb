"""Where the rows of a run go."""

import json
import math
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

from megatron.core.errors import UserError
from megatron.training.config import LoggingConfig
from megatron.training.metrics import JsonlSink, TensorBoardSink, WandbSink, device_peak_tflops


def test_rows_without_a_finite_value_are_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl", 0)
    sink.write({"iteration": 1, "lm_loss": math.nan, "grad_norm": math.inf})
    sink.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"iteration": 1, "lm_loss": null, "grad_norm": null}\n'


def test_rows_that_will_be_written_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"iteration": i}) + "\n" for i in (1, 2, 2, 3)) + '{"iteration": 4, "lm_')
    JsonlSink(path, 2).close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 2]


def test_an_evaluation_that_is_made_again_is_dropped_where_the_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    written = [{"iteration": i, key: 1.0} for i in (1, 2, 3) for key in ("lm_loss", "validation_lm_loss")]
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    JsonlSink(path, 2, ["validation"]).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == written[:3]


def test_rows_are_lost_while_the_disk_is_full_and_only_they(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path, 0)
    sink.write({"iteration": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))  # a part of a line fits
        sink.write({"iteration": 2})
        sink.write({"iteration": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    sink.write({"iteration": 4})
    sink.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 4]
    assert capsys.readouterr().err.count("rows are lost") == 1


@pytest.mark.parametrize("content", ["some text\n", '{"text": "a document"}\n', "[1]\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="is not a metrics file"):
        JsonlSink(path, 0)
    assert path.read_text() == content


def test_tensorboard_hides_what_is_written_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((0, 4), (2, 3)):  # stopped after step 4, continued from step 2
        sink = TensorBoardSink(str(tmp_path), first)
        for step in range(first + 1, last + 1):
            sink.write({"iteration": step, "lm_loss": float(first)})
        sink.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("lm_loss")
    assert [(event.step, event.value) for event in events] == [(1, 0.0), (2, 0.0), (3, 2.0)]


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 NVL", 835.0), ("NVIDIA GB200", 2500.0), ("NVIDIA H20", None)],
)
def test_peak_of_the_device_by_its_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak_tflops(torch.device("cuda"), LoggingConfig()) == peak


def test_wandb_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Error(Exception):
        pass

    def init(**_: object) -> NoReturn:
        raise Error("api_key not configured\n(no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Error=Error, init=init))
    with pytest.raises(UserError, match=r"--wandb-project t5: api_key not configured \(no-tty\); "):
        WandbSink("t5", None, {})


def test_wandb_gets_no_rows_of_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    run = SimpleNamespace(log=lambda values, step: steps.append(step))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Error=Exception, init=lambda **_: run))
    sink = WandbSink("t5", None, {})
    for iteration in (1, 5, 3, 6):  # a checkpoint of step 3 that was written meanwhile
        sink.write({"iteration": iteration, "lm_loss": 1.0})
    assert steps == [1, 5, 5, 6]
