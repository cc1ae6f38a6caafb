"""Steps whose fate the device decides: the same as where the host does, and nothing in them that the host waits for."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.errors import NumericalError
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor
from megatron.training import training
from megatron.training.arguments import parse_args
from megatron.training.step_verdicts import STEPS_LATER
from megatron.training.training import Trainer, pretrain_in
from tests.distributed import run_distributed
from tests.layouts.comparison import checkpoint_tensors
from tests.layouts.layout import Layout
from tests.training.test_pretrain import TINY

OPTIMIZERS = ("adamw", "adamw-scale", "adafactor")
# A fault in the first step, two in a row, one right before a checkpoint and one in the last step.
FAULTY_STEPS = (1, 4, 5, 8, 10)
STEPS = 10


def train(flags: list[str], faulty_steps: tuple[int, ...], rank: int = 0, faulty_rank: int = 0) -> None:
    """Train with an infinite gradient on one rank in some steps."""
    update = Trainer._update

    def disturbed(trainer: Trainer, loss_sums: torch.Tensor) -> None:
        if rank == faulty_rank and trainer.progress.iteration + 1 in faulty_steps:
            local_tensor(trainer.parameters[1].parameter.grad).view(-1)[2] = math.inf
        update(trainer, loss_sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", disturbed)
        config = parse_args(flags).config
        pretrain_in(ParallelContext.create(config.parallel, torch.device("cpu")), config)


def train_both_ways(rank: int, flags: list[str], folder: Path, faulty_steps: tuple[int, ...], faulty_rank: int) -> None:
    """Into `folder/host` and `folder/device`."""
    for by_device in (False, True):
        save = ["--save", str(folder / ("device" if by_device else "host"))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "decides_by_itself", lambda *_, **__: by_device)  # noqa: B023
            train([*flags, *save], faulty_steps, rank, faulty_rank)


def assert_equal_runs(folder: Path) -> None:
    """Same weights and state at the end, same counts in all checkpoints, same rows but for times."""
    host, device = (checkpoint_tensors(folder / name) for name in ("host", "device"))
    assert host.keys() == device.keys()
    for name, tensor in host.items():
        assert torch.equal(tensor, device[name]), name
    for read in (saved_progress, untimed_rows):
        assert read(folder / "host") == read(folder / "device")


def saved_progress(save: Path) -> dict[str, Any]:
    """By checkpoint."""
    manifests = {path.name: json.loads((path / "manifest.json").read_text()) for path in save.glob("iter_*")}
    assert sorted(manifests) == ["iter_0000005", "iter_0000010"]
    return {name: manifest["progress"] for name, manifest in manifests.items()}


def untimed_rows(save: Path) -> list[dict[str, float]]:
    """Of the metrics, without what depends on the clock."""
    timed = ("_ms", "_per_s", "mfu", "memory_gib")
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.endswith(timed) and not math.isnan(value or 0.0)}
        for row in rows
        if "checkpoint_time_ms" not in row
    ]


def run_flags(model: list[str], data_path: Path) -> list[str]:
    schedule = ["--train-iters", str(STEPS), "--log-interval", "4", "--save-interval", "5", "--eval-interval", "7"]
    return [*model, "--data-path", str(data_path), "--eval-iters", "1", *schedule]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_device_skips_what_the_host_would(byte_dataset: Path, tmp_path: Path, optimizer: str) -> None:
    flags = run_flags([*TINY, "--optimizer", optimizer], byte_dataset)
    train_both_ways(0, flags, tmp_path, FAULTY_STEPS, faulty_rank=0)
    assert_equal_runs(tmp_path)
    assert saved_progress(tmp_path / "device")["iter_0000010"]["skipped_iterations"] == len(FAULTY_STEPS)


def train_layouts(rank: int, layouts: list[Layout], data_path: Path, folder: Path) -> None:
    for number, layout in enumerate(layouts):
        train_both_ways(rank, run_flags(layout.flags, data_path), folder / str(number), (2, 5), faulty_rank=1)


def test_ranks_skip_together(byte_dataset: Path, tmp_path: Path) -> None:
    layouts = [
        Layout(dp=2, sharding="optim_grads_params", optimizer="adafactor"),
        Layout(pp=2, schedule="1f1b", variant="tied"),
    ]
    run_distributed(train_layouts, 2, layouts, byte_dataset, tmp_path)
    for number in range(len(layouts)):
        assert_equal_runs(tmp_path / str(number))


def test_the_parameter_is_named_in_the_step_that_had_the_fault(
    byte_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_both_ways(0, run_flags(TINY, byte_dataset), tmp_path, (2, 3, 7), faulty_rank=0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 6 and lines[:3] == lines[3:]
    assert lines[0].startswith("warning: step 2 skipped: not finite: gradient of ") and "step 7" in lines[2]


def test_too_many_skips_end_the_run_a_little_later(
    byte_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "decides_by_itself", lambda *_, **__: True)
    flags = [*run_flags(TINY, byte_dataset), "--save", str(tmp_path), "--max-consecutive-skips", "1"]
    with pytest.raises(NumericalError, match=r"steps 1 to 2 were not finite.*gradient of"):
        train(flags, tuple(range(1, STEPS + 1)))
    (row,) = untimed_rows(tmp_path)
    assert row["iteration"] == row["skipped_iterations"] == 2 + STEPS_LATER
    assert not list(tmp_path.glob("iter_*"))
