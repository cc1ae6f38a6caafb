"""Where the rows of a run go."""

import json
import math
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
