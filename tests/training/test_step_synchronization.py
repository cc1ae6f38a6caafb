"""Steps whose fate the device decides: the same as where the host does, and nothing in them that the host waits for."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.errors import NumericalError
from megatron.core.optimizer.logical_matrices import LogicalMatrices
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor, model_parameters
from megatron.training import training
from megatron.training.arguments import parse_args
from megatron.training.step_verdicts import STEPS_LATER
from megatron.training.training import Trainer, pretrain_in
from tests.distributed import run_distributed
from tests.fake_gpu import NoCopies
from tests.layouts.comparison import checkpoint_tensors
from tests.layouts.layout import Layout
from tests.training.test_numerics import make_trainer
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


# ---------------------------------------------------------------------------------------------------------------------
# What the host would wait for. A meta tensor has no values, so that reading one raises, as it would stop a GPU.

META = torch.device("meta")


class Unread:
    """Takes the place of the verdicts, whose copy to the host goes beside the step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def add(self, step: int, *numbers: Any) -> None:
        self.steps.append(step)

    def take(self, last_step: int) -> list[Any]:
        return []


def on_meta(value: Any, moved: dict[int, tuple[Any, Any]]) -> Any:
    """`value` with every tensor in it replaced by one without values, each by one and the same."""
    if id(value) not in moved:
        if isinstance(value, nn.Parameter):
            result: Any = nn.Parameter(torch.empty_like(value, device=META))
        elif isinstance(value, torch.Tensor):
            result = torch.empty_like(value, device=META)
        elif isinstance(value, list):
            result = [on_meta(item, moved) for item in value]
        elif isinstance(value, dict):
            result = {key: on_meta(item, moved) for key, item in value.items()}
        else:
            result = value
            if isinstance(value, LogicalMatrices):
                vars(value).update({k: on_meta(v, moved) for k, v in vars(value).items() if k != "optimizer"})
        moved[id(value)] = result, value
    return moved[id(value)][0]


def trainer_on_meta(flags: list[str]) -> Trainer:
    """A trainer as on a GPU, on a device that computes nothing."""
    trainer = make_trainer(flags)
    moved: dict[int, tuple[Any, Any]] = {}
    for stage in trainer.model.stages:
        for module in stage.modules():
            module._parameters.update(on_meta(dict(module._parameters), moved))
    vars(trainer.optimizer).update({k: on_meta(v, moved) for k, v in vars(trainer.optimizer).items()})
    trainer.parameters = trainer.model.parameters = model_parameters(trainer.model.stages)
    assert all(p.parameter is q for p, q in zip(trainer.parameters, trainer.optimizer.parameters, strict=True))
    trainer.context = trainer.model.context = replace(trainer.context, device=META)
    trainer.window.device = META
    batch = trainer.train_loader.step_batch(0).to(META)  # of a GPU, another stream has copied it
    trainer.prefetcher.step_batch = lambda first_sample: batch  # type: ignore[method-assign]
    trainer.verdicts = Unread()  # type: ignore[assignment]
    return trainer


SIZES = ["--hidden-size", "128", "--kv-channels", "64", "--global-batch-size", "16"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_nothing_in_a_step_waits_for_the_device(byte_dataset: Path, optimizer: str, precision: list[str]) -> None:
    flags = [*TINY, *SIZES, *precision, "--optimizer", optimizer, "--attention-backend", "unfused"]
    trainer = trainer_on_meta([*flags, "--data-path", str(byte_dataset), "--train-iters", "9", "--clip-grad", "1.0"])
    assert trainer.num_microbatches == 2
    with NoCopies():
        for _ in range(3):
            assert trainer.train_step()
    assert trainer.verdicts.steps == [1, 2, 3]  # type: ignore[union-attr]


def test_waiting_would_be_noticed() -> None:
    x = torch.ones(3, device=META)
    for read in (x.tolist, x.sum().item, x.nonzero, lambda: bool(x[0] > 0), x.cpu):
        with NoCopies(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
            read()
    for write in (lambda: torch.ones(3).to(META), lambda: x.copy_(torch.ones(3))):
        with NoCopies(), pytest.raises(AssertionError):
            write()
