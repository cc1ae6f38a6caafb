"""Attention backends on a GPU against float64: values, gradients, the bits of two runs, memory, compilation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.config import ComputeConfig
from megatron.core.extensions.attention import (
    AttentionOptions,
    AttentionRequest,
    attention_backend,
    choose_attention,
)
from megatron.core.extensions.score_bias import ScoreBias, Segments
from megatron.core.transformer.relative_position_bias import relative_position_bucket
from tests.gpu.test_gpu import loss_and_gradients

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {FLOAT: 1e-4, BRAIN: 2e-2, HALF: 4e-3}
BATCH, HEADS, MAX_DISTANCE = 2, 3, 128
# Queries, keys, channels, and what hides keys.
CASES: dict[str, tuple[int, int, int, str]] = {
    "whole tiles": (512, 512, 64, ""),
    "causal": (1024, 1024, 128, "causal"),
    "ragged": (257, 257, 80, ""),
    "ragged causal": (333, 333, 24, "causal"),
    "cross": (114, 300, 64, "no bias"),
    "padding": (192, 192, 64, "padding"),
    "packed": (450, 450, 64, "packed causal"),
    "packed cross": (130, 450, 64, "packed no bias"),
    "wide": (200, 200, 256, ""),
    "narrow": (64, 200, 16, ""),
}


def options(scale: float = 0.3) -> AttentionOptions:
    return AttentionOptions(scale, 0.0, False, 0, F.dropout, nullcontext)


def packed(length: int) -> Tensor:
    """Ids of three and four documents in two rows, and padding at the end of the second."""
    ids = torch.stack([torch.arange(length) * (3 + row) // length + 1 for row in range(BATCH)])
    ids[1, -length // 10 :] = 0
    return ids.int().cuda()


class Sample:
    """Inputs of a case, and its result by a backend or in float64."""

    def __init__(self, name: str, dtype: torch.dtype, *, std: float = 1.0) -> None:
        self.queries, self.keys, channels, self.kind = CASES[name]
        generator = torch.Generator("cuda").manual_seed(self.queries)
        lengths = (self.queries, self.keys, self.keys, self.queries)
        tensors = [
            torch.randn(BATCH, length, HEADS, channels, device="cuda", generator=generator) for length in lengths
        ]
        tensors[0] *= std
        *self.projections, self.gradient = (tensor.to(dtype) for tensor in tensors)
        self.table = torch.randn(HEADS, 32, device="cuda", generator=generator)
        self.causal = "causal" in self.kind
        self.segments = None
        if "packed" in self.kind:
            self.segments = Segments(packed(self.queries), packed(self.keys))
        if "padding" in self.kind:
            self.segments = Segments(None, (packed(self.keys) > 0).int())
        if self.segments is not None and self.segments.query is not None:  # what padding sees matters to nobody
            self.gradient = self.gradient * (self.segments.query > 0)[..., None, None]

    def diagonals(self, table: Tensor) -> Tensor | None:
        if "no bias" in self.kind:
            return None
        distances = torch.arange(1 - self.queries, self.keys, device="cuda")
        buckets = relative_position_bucket(
            distances, bidirectional=not self.causal, num_buckets=32, max_distance=MAX_DISTANCE
        )
        return table[:, buckets]

    def results(self, dtype: torch.dtype, attend: Any) -> list[Tensor]:
        """Output, and gradients of query, key, value and table (where there is a bias)."""
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in self.projections]
        table = self.table.to(torch.float64 if dtype == torch.float64 else FLOAT).requires_grad_()
        output = attend(*leaves, self.diagonals(table))
        wanted = leaves if "no bias" in self.kind else [*leaves, table]
        gradients = torch.autograd.grad(output, wanted, self.gradient.to(dtype))
        shown = self.gradient.abs().sum((-2, -1), keepdim=True) > 0
        return [output.detach() * shown, *gradients]

    def by(self, name: str) -> list[Tensor]:
        """Of a backend."""
        backend = attention_backend(name)

        def attend(query: Tensor, key: Tensor, value: Tensor, diagonals: Tensor | None) -> Tensor:
            bias = ScoreBias(
                self.queries, self.keys, diagonals, causal=self.causal, segments=self.segments,
                constant_beyond=None if diagonals is None else MAX_DISTANCE,
            )  # fmt: skip
            bias = backend.prepare(bias, query.dtype, query.device)
            return backend.attend(query, key, value, bias, options())

        return self.results(self.projections[0].dtype, attend)

    def expected(self) -> list[Tensor]:
        """In float64."""
        distances = torch.arange(self.keys, device="cuda") - torch.arange(self.queries, device="cuda")[:, None]
        hidden = (distances > 0) & self.causal
        if self.segments is not None:
            hidden = hidden | ~self.segments.visible() | (self.segments.key == 0)[:, None, None]

        def attend(query: Tensor, key: Tensor, value: Tensor, diagonals: Tensor | None) -> Tensor:
            query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
            scores = options().scale * query @ key.transpose(-1, -2)
            if diagonals is not None:
                scores = scores + diagonals[:, distances + self.queries - 1]
            # Rows that see nothing are not looked at; they are only not to be NaN.
            scores = scores.masked_fill(hidden & ~hidden.all(-1, keepdim=True), -torch.inf)
            return (scores.softmax(-1) @ value).transpose(1, 2)

        return self.results(torch.float64, attend)


def check(sample: Sample, name: str, tolerance: float) -> None:
    for found, expected in zip(sample.by(name), sample.expected(), strict=True):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_matches_float64(name: str, case: str, dtype: torch.dtype) -> None:
    if dtype == HALF and case not in ("whole tiles", "packed"):
        pytest.skip("fp16 differs from bf16 in the number format only")
    check(Sample(case, dtype), name, TOLERANCES[dtype])


@pytest.mark.parametrize("case", ["whole tiles", "ragged causal", "packed", "cross"])  # each is compiled for seconds
def test_flex_matches_float64(case: str) -> None:
    check(Sample(case, BRAIN), "flex", TOLERANCES[BRAIN])


@pytest.mark.parametrize("case", ["whole tiles", "packed", "ragged"])
def test_two_runs_give_the_same_bits(case: str) -> None:
    sample = Sample(case, BRAIN)
    first = sample.by("triton")
    for _ in range(3):
        assert all(map(torch.equal, first, sample.by("triton")))


@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_large_scores(name: str) -> None:
    """Unscaled scores of hundreds, at a length at which torch's cuDNN backend has given NaN."""
    for found in Sample("padding", BRAIN, std=100.0).by(name):
        assert found.isfinite().all()


def test_memory_is_linear() -> None:
    """Nothing as large as the bias as a matrix."""
    heads, length = 12, 4096
    fused = torch.randn(1, length, heads, 3, 64, dtype=BRAIN, device="cuda", requires_grad=True)
    diagonals = torch.randn(heads, 2 * length - 1, device="cuda", requires_grad=True)
    backend = attention_backend("triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = backend.attend(fused, None, None, ScoreBias(length, length, diagonals), options())
    output.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < heads * length * length / 2  # a quarter of the matrix in bf16


def test_compiles_in_one_graph() -> None:
    backend = attention_backend("triton")
    weight = torch.randn(192, 3 * 192, device="cuda", dtype=BRAIN) * 192**-0.5
    table = torch.randn(HEADS, 2 * 130 - 1, device="cuda")

    def layer(hidden: Tensor, diagonals: Tensor) -> Tensor:
        fused = (hidden @ weight).unflatten(-1, (HEADS, 3, 64))
        return backend.attend(fused, None, None, ScoreBias(130, 130, diagonals), options()).flatten(2)

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        torch.manual_seed(1)
        inputs = [torch.randn(BATCH, 130, 192, device="cuda", dtype=BRAIN).requires_grad_(), table.requires_grad_()]
        output = function(*inputs)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), inputs)))
    for eager, compiled in zip(*results, strict=True):
        assert (eager.double() - compiled.double()).norm() <= 1e-2 * eager.double().norm()


def test_auto_takes_the_kernel_with_a_bias() -> None:
    request = AttentionRequest(torch.device("cuda"), BRAIN, 64, has_diagonals=True)
    assert choose_attention("auto", request).name == "triton"
    assert choose_attention("auto", request._replace(has_diagonals=False)).name == "sdpa"


@pytest.mark.parametrize("name", ["triton", "flex"])
def test_model_has_the_gradients_of_the_cpu(name: str) -> None:
    expected = loss_and_gradients("cpu", ComputeConfig(attention_backend="unfused"), (192, 64))
    found = loss_and_gradients("cuda", ComputeConfig(attention_backend=name), (192, 64))  # type: ignore[arg-type]
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-4 * value.norm() + 1e-7, key


def test_dropout_keeps_its_share() -> None:
    """Of values that are all 1, the mean stays 1; another call drops others."""
    backend = attention_backend("triton")
    query, key = (torch.randn(4, 256, 8, 64, device="cuda", dtype=BRAIN) for _ in range(2))
    value = torch.ones_like(query)
    dropping = options()._replace(dropout=0.25)
    first, second = (backend.attend(query, key, value, ScoreBias(256, 256), dropping) for _ in range(2))
    assert abs(float(first.float().mean()) - 1.0) < 0.01
    assert not torch.equal(first, second)
