"""Replayed microbatches: all but the capture itself, which needs a GPU (tests/gpu/test_step_gpu.py)."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.datasets.loader import TensorBatch
from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.training import backends, model_setup
from megatron.training.arguments import parse_args
from megatron.training.cuda_graphs import WARM_UPS, GraphedMicrobatches, check_cuda_graphs
from megatron.training.training import pretrain_in
from tests.distributed import run_distributed
from tests.layouts.comparison import checkpoint_tensors, metrics
from tests.layouts.layout import Layout
from tests.training.test_pretrain import TINY


class RecordedGraph:
    """Does what it has recorded by calling it; watches that the gradients stay where they were at the capture."""

    def __init__(self, device: torch.device) -> None:
        self.work: Callable[[], None] | None = None
        self.warm_ups = self.replays = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        assert self.work is None
        self.warm_ups += 1
        work()

    def capture(self, work: Callable[[], None]) -> None:
        assert self.work is None, "captured twice"
        self.work, self.places = work, self._places(work)

    def replay(self) -> None:
        assert self.work is not None and self._places(self.work) == self.places
        self.replays += 1
        self.work()

    def _places(self, work: Callable[[], None]) -> list[int]:
        return [parameter.grad.data_ptr() for parameter in work.__self__._parameters]  # type: ignore[attr-defined]


def train(rank: int, flags: list[str], folder: Path) -> list[tuple[int, int]]:
    """Train without and with graphs, into folders of these names; returns warm-ups and replays of each graph."""
    made = []

    def make_graph(device: torch.device) -> RecordedGraph:
        made.append(RecordedGraph(device))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "check_cuda_graphs", lambda *_: None)
        patch.setattr(model_setup, "DeviceGraph", make_graph)
        for name, more in (("eager", []), ("graphs", ["--cuda-graphs"])):
            config = parse_args([*flags, *more, "--save", str(folder / name)]).config
            assert pretrain_in(ParallelContext.create(config.parallel, torch.device("cpu")), config) == 0
    return [(graph.warm_ups, graph.replays) for graph in made]


def assert_equal_runs(folder: Path) -> None:
    eager, graphs = (checkpoint_tensors(folder / name) for name in ("eager", "graphs"))
    for name, tensor in eager.items():
        assert torch.equal(tensor, graphs[name]), name
    for key in ("lm_loss", "grad_norm", "validation_lm_loss"):
        assert metrics(folder / "eager", key) == metrics(folder / "graphs", key)


@pytest.mark.parametrize("optimizer", ["adamw-scale", "adafactor"])  # the latter writes into gradients
def test_replays_train_as_passes_do(byte_dataset: Path, tmp_path: Path, optimizer: str) -> None:
    sizes = ["--global-batch-size", "16", "--train-iters", "6", "--eval-interval", "3", "--optimizer", optimizer]
    counts = train(0, [*TINY, *sizes, "--data-path", str(byte_dataset)], tmp_path)
    assert counts == [(WARM_UPS, 12 - WARM_UPS)]
    assert_equal_runs(tmp_path)


def test_replicas_sum_what_replays_leave(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*Layout(dp=2, sharding="no_shard").flags, "--data-path", str(byte_dataset), "--train-iters", "5"]
    first, second = run_distributed(train, 2, [*flags, "--eval-iters", "1"], tmp_path)
    assert first == second and first[0][1] > 0
    assert_equal_runs(tmp_path)


def test_other_shapes_are_computed_as_usual() -> None:
    weight = nn.Parameter(torch.ones(()))
    seen = []

    def compute(microbatch: TensorBatch, factor: torch.Tensor) -> torch.Tensor:
        seen.append(microbatch.labels.data_ptr())
        (weight * microbatch.labels.sum() * factor).backward()
        return torch.stack([microbatch.labels.sum(), factor])

    graph = RecordedGraph(torch.device("cpu"))
    passes = GraphedMicrobatches(compute, [weight], graph)
    factor = torch.tensor(0.5)
    passes.begin_step()
    for number in range(1, WARM_UPS + 3):
        batch = TensorBatch(*[torch.full((2, 3), number, dtype=torch.int32) for _ in range(3)])
        assert passes(batch, factor).tolist() == [6 * number, 0.5]
        assert seen[-1] == seen[0] != batch.labels.data_ptr()
    other = TensorBatch(*[torch.ones(1, 3, dtype=torch.int32) for _ in range(3)])
    assert passes(other, factor).tolist() == [3, 0.5]
    assert seen[-1] == other.labels.data_ptr()
    assert (graph.warm_ups, graph.replays) == (WARM_UPS, 2)
    assert weight.grad is not None and weight.grad.item() == 0.5 * (6 * sum(range(1, WARM_UPS + 3)) + 3)
    passes.begin_step()
    assert weight.grad.item() == 0.0


@pytest.mark.parametrize(
    ("flags", "layout", "message"),
    [
        ([], {"device": torch.device("cpu")}, "captures kernels of a GPU, and this run is on cpu; remove it"),
        ([], {"pp_size": 2}, "--pipeline-model-parallel-size"),
        ([], {"tp_size": 2}, "--tensor-model-parallel-size"),
        ([], {"dp_size": 2}, "add --data-parallel-sharding-strategy no_shard"),
        (["--attention-dropout", "0.1"], {}, "would repeat the same dropout masks; remove it, or --hidden-dropout"),
        (["--check-determinism-interval", "5"], {}, "remove it, or --check-determinism-interval"),
    ],
)
def test_what_cannot_be_captured_is_refused(flags: list[str], layout: dict[str, Any], message: str) -> None:
    config = parse_args([*TINY, *flags, "--cuda-graphs", "--data-path", "x"]).config
    single = {"device": torch.device("cuda"), "dp_size": 1, "tp_size": 1, "pp_size": 1}
    context: Any = SimpleNamespace(**single | layout)
    with pytest.raises(UserError, match=f"^--cuda-graphs .*{message}"):
        check_cuda_graphs(config, context, "optim")
    if context.dp_size > 1:
        check_cuda_graphs(config, context, "no_shard")


def test_a_run_without_a_gpu_is_told_so(byte_dataset: Path) -> None:
    config = parse_args([*TINY, "--cuda-graphs", "--data-path", str(byte_dataset), "--train-iters", "2"]).config
    with pytest.raises(UserError, match="this run is on cpu"):
        pretrain_in(ParallelContext(torch.device("cpu")), config)
