"""FlexAttention against a plain computation in float64, uncompiled as it runs on CPUs.

Shapes: b batch, n heads, q queries, k keys, d channels of a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.errors import UserError
from megatron.core.extensions import flex_attention
from megatron.core.extensions.attention import AttentionOptions, AttentionRequest, choose_attention
from megatron.core.extensions.flex_attention import BACKEND
from megatron.core.extensions.score_bias import ScoreBias, Segments

BATCH, HEADS = 2, 3
OPTIONS = AttentionOptions(0.3, 0.0, False, 0, F.dropout, nullcontext)


def sample(queries: int, keys: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and diagonals."""
    torch.manual_seed(queries * 1000 + keys)
    lengths = (queries, keys, keys)
    inputs = [torch.randn(BATCH, length, HEADS, channels, dtype=dtype, requires_grad=True) for length in lengths]
    return [*inputs, torch.randn(HEADS, queries + keys - 1, requires_grad=True)]


def packed(length: int, documents: int, padding: int) -> Tensor:
    """Segment ids `[b, length]` with another number of documents in each row, and padding at the end."""
    ids = torch.stack([torch.arange(length) * (documents + row) // length + 1 for row in range(BATCH)])
    ids[-1, length - padding :] = 0
    return ids.int()


def reference(query: Tensor, key: Tensor, value: Tensor, diagonals: Tensor | None, bias: ScoreBias) -> Tensor:
    """The same in float64 `[b, q, n, d]`; queries in padding get 0."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = OPTIONS.scale * query @ key.transpose(-1, -2)
    distances = torch.arange(bias.key_length) - torch.arange(bias.query_length)[:, None]
    if diagonals is not None:
        scores = scores + diagonals.double()[:, distances + bias.query_length - 1]
    hidden = (distances > 0) & bias.causal
    if bias.segments is not None:
        hidden = hidden | ~bias.segments.visible() | (bias.segments.key == 0)[:, None, None]
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    return (probabilities @ value).transpose(1, 2)


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses gradients on CPUs, since its fused kernel for them has none; the uncompiled code has."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def check(inputs: list[Tensor], bias: ScoreBias, tolerance: float, *, has_bias: bool = True) -> None:
    """Output and gradients of the backend against the reference."""
    query, key, value, diagonals = inputs
    wanted = inputs if has_bias else inputs[:3]
    given = diagonals if has_bias else None
    # As where each layer has a table of its own, the bias comes after what all layers share was prepared.
    prepared = BACKEND.prepare(bias, query.dtype, query.device)._replace(diagonals=given)
    found = BACKEND.attend(query, key, value, prepared, OPTIONS)
    expected = reference(query, key, value, given, bias)
    assert found.shape == expected.shape and found.dtype == query.dtype
    visible = expected.abs().sum((-2, -1), keepdim=True) > 0
    incoming = torch.randn_like(expected) * visible  # what padding sees matters to nobody
    pairs = [(found * visible, expected)]
    gradients = [torch.autograd.grad(output, wanted, incoming.to(output.dtype)) for output in (found, expected)]
    pairs += list(zip(*gradients, strict=True))
    for one, other in pairs:
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "ragged": (37, 37, 24, {}),
    "cross": (20, 130, 16, {}),
    "causal": (130, 130, 16, {"causal": True}),
    "whole blocks": (128, 128, 16, {"causal": True}),
    "padding": (50, 50, 16, {"segments": Segments(None, (packed(50, 1, 9) > 0).int())}),
    "packed": (140, 140, 16, {"causal": True, "segments": Segments(packed(140, 3, 9), packed(140, 3, 9))}),
    "packed cross": (30, 140, 16, {"segments": Segments(packed(30, 3, 2), packed(140, 3, 9))}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_matches_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    queries, keys, channels, masks = CASES[name]
    check(sample(queries, keys, channels, torch.float32), ScoreBias(queries, keys, **masks), 1e-5)


def test_without_bias_and_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    check(sample(33, 65, 16, torch.float32), ScoreBias(33, 65), 1e-5, has_bias=False)
    check(sample(65, 65, 16, torch.bfloat16), ScoreBias(65, 65, causal=True), 3e-2)


def test_takes_fused_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    fused = torch.randn(BATCH, 20, HEADS, 3, 16)
    bias = ScoreBias(20, 20, causal=True)
    query, key, value = fused.unbind(-2)
    separate = BACKEND.attend(query, key, value, bias, OPTIONS)
    assert torch.equal(BACKEND.attend(fused, None, None, bias, OPTIONS), separate)


def test_a_mask_that_all_rows_share() -> None:
    """Its ids have one row, the batch more."""
    query, key, value, _ = (tensor.detach() for tensor in sample(20, 20, 16, torch.float32))
    bias = ScoreBias(20, 20, segments=Segments(None, (torch.arange(20) < 15).int()[None]))
    found = BACKEND.attend(query, key, value, bias, OPTIONS)
    torch.testing.assert_close(found.double(), reference(query, key, value, None, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiles_more_shapes_than_torch_allows_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = flex_attention._compiled.__wrapped__()
    for batch in range(2, 12):
        query = torch.randn(batch, 1, 4, 16)
        compiled(query, query, query)


@pytest.mark.parametrize(("request_", "reason"), [
    (AttentionRequest(torch.device("cpu"), torch.bfloat16, 64), "computes on cuda, not cpu"),
    (AttentionRequest(torch.device("cuda"), torch.bfloat16, 64, dropout=0.1), "has no --attention-dropout"),
    (AttentionRequest(torch.device("cuda"), torch.bfloat16, 8), "takes --kv-channels from 16 to 256, not 8"),
])  # fmt: skip
def test_refuses(request_: AttentionRequest, reason: str) -> None:
    with pytest.raises(UserError, match=f"--attention-backend flex {reason}"):
        choose_attention("flex", request_)
