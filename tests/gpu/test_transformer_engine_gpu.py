"""Transformer Engine itself, on a GPU: near our own layers, and its FP8 recipes near bf16."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.extensions import packages, transformer_engine
from megatron.core.extensions.attention import AttentionOptions
from megatron.core.extensions.score_bias import ScoreBias, Segments
from megatron.core.extensions.unfused_attention import BACKEND as UNFUSED
from megatron.core.parallel_state import ParallelContext
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain_in
from tests.training.test_pretrain import TINY, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not packages.installed("transformer_engine"), reason="transformer_engine is not installed"),
]
CUDA = torch.device("cuda")
ENGINE = ["--transformer-impl", "transformer_engine"]
WIDTHS = ["--hidden-size", "128", "--num-attention-heads", "4", "--kv-channels", "32", "--ffn-hidden-size", "256"]
NEEDS = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Both are finite, and their relative distance is small."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, float(error)


def test_the_package_loads() -> None:
    assert transformer_engine.problem() is None


def test_linear_product() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 20, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(96, 64, device=CUDA))
    expected = F.linear(x.float(), weight)
    result = transformer_engine.LinearProduct()(x, weight)
    assert result.dtype == torch.bfloat16
    assert_near(result, expected, 0.01)
    weighting = torch.randn_like(expected)
    gradients = torch.autograd.grad(result, (x, weight), weighting.bfloat16())
    for found, wanted in zip(gradients, torch.autograd.grad(expected, (x, weight), weighting), strict=True):
        assert_near(found, wanted, 0.01)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 7, 1024, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    parameters = [torch.nn.Parameter(torch.randn(1024, device=CUDA)) for _ in range(1 if kind == "rms" else 2)]
    if kind == "rms":
        result = transformer_engine.rms_norm(x, *parameters, 1e-6, torch.bfloat16)
        expected = F.rms_norm(x.float(), (1024,), parameters[0], 1e-6)
    else:
        result = transformer_engine.layer_norm(x, *parameters, 1e-6, torch.bfloat16)
        expected = F.layer_norm(x.float(), (1024,), *parameters, 1e-6)
    assert_near(result, expected, 0.01)
    weighting = torch.randn_like(expected)
    inputs = (x, *parameters)
    expected_gradients = torch.autograd.grad(expected, inputs, weighting)
    for found, wanted in zip(
        torch.autograd.grad(result, inputs, weighting.bfloat16()), expected_gradients, strict=True
    ):
        assert_near(found, wanted, 0.01)


@pytest.mark.parametrize("queries", [128, 114])
@pytest.mark.parametrize("has_diagonals", [False, True])
@pytest.mark.parametrize("hides", ["nothing", "future", "segments"])
def test_attention(queries: int, has_diagonals: bool, hides: str) -> None:
    torch.manual_seed(3)
    shapes = ((2, queries, 4, 64), (2, 128, 4, 64), (2, 128, 4, 64))
    inputs = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    diagonals = None
    if has_diagonals:
        diagonals = torch.randn(4, queries + 127, device=CUDA, requires_grad=True)
        inputs.append(diagonals)
    segments = None
    if hides == "segments":
        ids = (torch.arange(128, device=CUDA, dtype=torch.int32) // 50 + 1).expand(2, -1)
        segments = Segments(ids[:, :queries], ids)
    given = ScoreBias(queries, 128, diagonals, causal=hides == "future", segments=segments)
    options = AttentionOptions(0.125, 0.0, False, 0, F.dropout, nullcontext)
    weighting = torch.randn(shapes[0], device=CUDA)
    results = []
    for backend, dtype in ((transformer_engine.BACKEND, torch.bfloat16), (UNFUSED, torch.float32)):
        prepared = backend.prepare(given._replace(backend=backend.name), dtype, CUDA)
        result = backend.attend(*(each.to(dtype) for each in inputs[:3]), prepared, options)
        results.append((result, *torch.autograd.grad(result, inputs, weighting.to(dtype))))
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected, 0.03)


def losses(data: Path, save: Path, *flags: str, steps: int = 20) -> dict[int, float]:
    """Of a run on the GPU, by step."""
    given = [*TINY, *WIDTHS, "--bf16", "--data-path", str(data), "--train-iters", str(steps), *flags]
    config = parse_args([*given, "--metrics-file", str(save)]).config
    pretrain_in(ParallelContext(device=CUDA), config)
    return rows(save)


@pytest.mark.parametrize(
    "more", [[], ["--attention-backend", "transformer_engine"], ["--recompute-granularity", "full"]]
)
def test_training_is_near_the_local_layers(byte_dataset: Path, tmp_path: Path, more: list[str]) -> None:
    expected = losses(byte_dataset, tmp_path / "local.jsonl")
    assert losses(byte_dataset, tmp_path / "engine.jsonl", *ENGINE, *more) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("number_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("recipe", list(NEEDS))
def test_fp8_is_near_bf16(byte_dataset: Path, tmp_path: Path, recipe: str, number_format: str) -> None:
    if torch.cuda.get_device_capability() < NEEDS[recipe]:
        pytest.skip(f"this GPU has no {recipe} scaling")
    expected = losses(byte_dataset, tmp_path / "bf16.jsonl")
    flags = [*ENGINE, "--fp8-format", number_format, "--fp8-recipe", recipe]
    found = losses(byte_dataset, tmp_path / "fp8.jsonl", *flags)
    assert found == pytest.approx(expected, rel=0.03) and found != expected


def test_fp8_recomputes_what_it_computed(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*ENGINE, "--fp8-format", "hybrid", "--micro-batch-size", "2", "--global-batch-size", "8"]
    once = losses(byte_dataset, tmp_path / "once.jsonl", *flags)
    again = losses(byte_dataset, tmp_path / "again.jsonl", *flags, "--recompute-granularity", "full")
    assert again == pytest.approx(once, rel=1e-3)
