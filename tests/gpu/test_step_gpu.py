"""The step on a GPU: nothing in it waits, faults are skipped there, and CUDA graphs compute what passes do."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron.core.extensions.packages import installed
from megatron.core.parallel_state import ParallelContext
from megatron.training.arguments import parse_args
from megatron.training.cuda_graphs import WARM_UPS
from megatron.training.data import fit_vocabulary, open_data
from megatron.training.step_verdicts import STEPS_LATER
from megatron.training.training import Trainer, pretrain_in
from tests.layouts.comparison import checkpoint_tensors
from tests.training.test_pretrain import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIMIZERS = ("adamw", "adamw-scale", "adafactor")
# Of heads that every kernel takes; two microbatches a step.
MODEL = [*TINY, "--hidden-size", "128", "--kv-channels", "64", "--global-batch-size", "16"]
# Matrix products and the rest of torch are deterministic; fused attention need not be.
EXACT = ["--attention-backend", "unfused"]
TRITON = pytest.mark.skipif(not installed("triton"), reason="needs triton")


def make_trainer(flags: list[str]) -> Trainer:
    config = parse_args(flags).config
    data = open_data(config)
    fit_vocabulary(config, data.tokenizer, given=False)
    return Trainer(config, data, ParallelContext(torch.device("cuda")))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, what makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steps_that_do_not_wait(flags: list[str], byte_dataset: Path, first: int = 2) -> None:
    """Steps after the first ones, in which kernels are compiled and memory is taken."""
    trainer = make_trainer([*MODEL, *flags, "--data-path", str(byte_dataset), "--train-iters", "20"])
    for _ in range(first):
        assert trainer.train_step()
    torch.cuda.synchronize()
    with no_waiting():
        for _ in range(4):
            assert trainer.train_step()
    trainer._settle()
    assert trainer.progress.skipped_iterations == 0
    trainer.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_the_host_does_not_wait_for_steps(byte_dataset: Path, optimizer: str, precision: list[str]) -> None:
    steps_that_do_not_wait([*precision, "--optimizer", optimizer], byte_dataset)


@pytest.mark.parametrize("backend", ["sdpa", "unfused", "flex", pytest.param("triton", marks=TRITON)])
def test_no_attention_makes_the_host_wait(byte_dataset: Path, backend: str) -> None:
    steps_that_do_not_wait(["--bf16", "--attention-backend", backend], byte_dataset)


def test_nor_do_long_rows(byte_dataset: Path) -> None:
    """The gradient of the embedding has another kernel for more than 3072 tokens."""
    steps_that_do_not_wait(["--bf16", "--encoder-seq-length", "512"], byte_dataset)


def test_nor_does_a_compiled_model_or_a_graph(byte_dataset: Path) -> None:
    steps_that_do_not_wait(["--bf16", "--compile"], byte_dataset)
    steps_that_do_not_wait(["--bf16", "--cuda-graphs"], byte_dataset, first=WARM_UPS)


def fingerprint(trainer: Trainer) -> list[torch.Tensor]:
    state = trainer.optimizer.named_state().values()
    return [tensor.detach().clone() for tensor in (*trainer.optimizer.parameters, *state)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("faulty_step", [1, 3])
def test_the_gpu_skips_a_step_that_is_not_finite(
    byte_dataset: Path, optimizer: str, faulty_step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*MODEL, "--optimizer", optimizer, "--data-path", str(byte_dataset), "--train-iters", "20"]
    trainer = make_trainer(flags)
    finish = trainer.model.finish_gradients

    def poisoned() -> None:
        finish()
        if trainer.progress.iteration + 1 == faulty_step:
            trainer.parameters[2].parameter.grad.view(-1)[1].fill_(math.nan)

    trainer.model.finish_gradients = poisoned  # type: ignore[method-assign]
    for step in range(1, faulty_step + STEPS_LATER + 1):
        before = fingerprint(trainer)
        trainer.train_step()
        changed = [not torch.equal(old, new) for old, new in zip(before, fingerprint(trainer), strict=True)]
        assert any(changed) == (step != faulty_step)
        assert trainer.progress.skipped_iterations == (step >= faulty_step + STEPS_LATER)
    expected = f"step {faulty_step} skipped: not finite: gradient of {trainer.parameters[2].name} (rank 0)"
    assert expected in capsys.readouterr().err
    trainer.close()


def train(flags: list[str], save: Path) -> list[float]:
    """The losses of a run."""
    config = parse_args([*flags, "--save", str(save)]).config
    assert pretrain_in(ParallelContext(torch.device("cuda")), config) == 0
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("lm_loss", "grad_norm", "validation_lm_loss") if key in row]


@pytest.mark.parametrize(
    "flags",
    [
        EXACT,
        [*EXACT, "--bf16"],
        [*EXACT, "--fp16", "--initial-loss-scale", "1024"],
        [*EXACT, "--bf16", "--recompute-granularity", "full"],
        [*EXACT, "--bf16", "--compile"],
        [*EXACT, "--bf16", "--optimizer", "adafactor"],
        pytest.param(["--bf16", "--attention-backend", "triton"], marks=TRITON),
    ],
    ids=" ".join,
)
def test_graphs_train_bit_for_bit_as_passes_do(byte_dataset: Path, tmp_path: Path, flags: list[str]) -> None:
    common = [*MODEL, *flags, "--data-path", str(byte_dataset), "--train-iters", "8", "--eval-interval", "4"]
    eager = train(common, tmp_path / "eager")
    assert train([*common, "--cuda-graphs"], tmp_path / "graphs") == eager
    weights = checkpoint_tensors(tmp_path / "graphs")
    for name, tensor in checkpoint_tensors(tmp_path / "eager").items():
        assert torch.equal(tensor, weights[name]), name


def test_runs_with_and_without_the_host_are_the_same(
    byte_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*MODEL, *EXACT, "--data-path", str(byte_dataset), "--train-iters", "8"]
    device = train(flags, tmp_path / "device")
    monkeypatch.setattr("megatron.training.training.decides_by_itself", lambda *_, **__: False)
    assert train(flags, tmp_path / "host") == device
