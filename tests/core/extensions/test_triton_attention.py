"""Attention in Triton against a plain computation in float64, in Triton's interpreter where there is no GPU.

Shapes: b batch, n heads, q queries, k keys, d channels of a head.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron.core.config import ModelConfig
from megatron.core.extensions import triton_attention
from megatron.core.extensions.attention import AttentionRequest
from megatron.core.extensions.triton_attention import BACKEND, attention, dropout_mask
from megatron.core.extensions.triton_attention_tiles import Tile, Tiles, choose_tiles
from megatron.core.transformer.relative_position_bias import RelativePositionBias

pytest.importorskip("triton")
DEVICE = "cpu" if os.getenv("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
# Of the norm of a result.
TOLERANCES = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


class Case(NamedTuple):
    """What is computed; `constant_beyond` makes the bias constant there, `fused` is of the projections."""

    lengths: tuple[int, int]
    causal: bool
    biased: bool
    dtype: str
    channels: int
    segments: str
    scale: float
    dropout: float
    constant_beyond: int | None
    fused: int


OPTIONS: dict[str, tuple[Any, ...]] = {
    "lengths": ((1, 1), (17, 17), (64, 64), (77, 77), (130, 130), (17, 64), (77, 17), (130, 77)),
    "causal": (False, True),
    "biased": (True, True, False),
    "dtype": tuple(TOLERANCES),
    "channels": (16, 24, 64, 80, 128, 256),
    "segments": ("none", "padding", "packed", "empty rows"),
    "scale": (1.0, 0.125),
    "dropout": (0.0, 0.0, 0.2),
    "constant_beyond": (None, 0, 20),
    "fused": (1, 2, 3),
}


def pairwise(count: int, seed: int = 1) -> list[Case]:
    """Cases that together have as many pairs of options as can be had greedily."""
    generator = random.Random(seed)
    seen: set[Any] = set()
    cases = []
    for _ in range(count):
        drawn = [Case(*(generator.choice(values) for values in OPTIONS.values())) for _ in range(60)]
        best = max(drawn, key=lambda case: len(set(itertools.combinations(enumerate(case), 2)) - seen))
        seen |= set(itertools.combinations(enumerate(best), 2))
        cases.append(best)
    return cases


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long to start a program as to compute a tile."""
    monkeypatch.setattr(triton_attention, "BIAS_PROGRAMS", 24)


def constant_from(values: Tensor, queries: int, distance: int | None) -> Tensor:
    """Diagonals `[n, q + k - 1]`, equal from a distance on."""
    if distance is None:
        return values
    distances = torch.arange(values.shape[1], device=values.device) - (queries - 1)
    return values[:, (distances.clamp(-distance, distance) + queries - 1).clamp(0, values.shape[1] - 1)]


def segment_ids(kind: str, batch: int, queries: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Ids `[b, q]` and `[b, k]`."""
    if kind == "none":
        return None, None
    rows = torch.arange(batch, device=DEVICE)[:, None]
    if kind == "padding":
        return None, (torch.arange(keys, device=DEVICE) < keys - 5 * rows).int()
    of_queries = 1 + (torch.arange(queries, device=DEVICE) + 3 * rows) * 4 // queries
    of_keys = 1 + (torch.arange(keys, device=DEVICE) + rows) * 4 // keys
    if kind == "empty rows":  # padding amid the queries, a segment without keys, a row of the batch without any
        of_queries = of_queries.masked_fill(of_queries == 2, 0)
        of_keys = of_keys.masked_fill((of_keys == 3) | (rows == 1), 0)
    return of_queries.int(), of_keys.int()


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    diagonals: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    causal: bool,
    scale: float,
    kept: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The definition, in float64."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = scale * query @ key.transpose(2, 3)  # [b, n, q, k]
    distances = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
    if diagonals is not None:
        scores = scores + diagonals.double()[:, distances + query.shape[2] - 1]
    visible = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        visible &= (distances <= 0).to(DEVICE)
    if key_segments is not None:
        visible &= key_segments[:, None, None, :] != 0
        if query_segments is not None:
            visible &= query_segments[:, None, :, None] == key_segments[:, None, None, :]
    peak = scores.masked_fill(~visible, -1e300).amax(-1, keepdim=True)
    powers = (scores - peak).masked_fill(~visible, -1e300).exp()
    probabilities = powers / powers.sum(-1, keepdim=True).clamp(min=1e-300)
    if kept is not None:
        probabilities = probabilities * kept / (1.0 - dropout)
    return (probabilities @ value).transpose(1, 2)


def close(actual: Tensor, expected: Tensor, tolerance: float, rest: float = 0.1) -> None:
    """By norm; `rest` is what of terms of about 1 that cancel may stay in each element."""
    assert actual.shape == expected.shape and torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).norm().item()
    assert error <= tolerance * (expected.double().norm().item() + rest * expected.numel() ** 0.5), error


def by_side(gradient: Tensor, queries: int, distance: int | None) -> Tensor:
    """Of diagonals `[n, q + k - 1]` that are equal beyond a distance, with one sum for those of a side."""
    if distance is None:
        return gradient
    distances = torch.arange(gradient.shape[1], device=gradient.device) - (queries - 1)
    left, right = distances <= -max(distance, 1), distances >= max(distance, 1)
    sides = [gradient[:, side].sum(1, keepdim=True) for side in (left, right)]
    return torch.cat([sides[0], gradient[:, ~left & ~right], sides[1]], dim=1)


def sample(case: Case, heads: int = 2, batch: int = 2) -> tuple[list[Tensor], Tensor | None]:
    """Projections, as many as tensors hold them, and diagonals."""
    queries, keys = case.lengths
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size).to(DEVICE, dtype)

    size = (case.channels**-0.25) / case.scale**0.5
    query, key = (
        draw(batch, queries, heads, case.channels, size=size),
        draw(batch, keys, heads, case.channels, size=size),
    )
    projections = [query, key, draw(batch, keys, heads, case.channels)]
    if case.fused == 3 and queries == keys:
        projections = [torch.stack(projections, dim=-2)]
    elif case.fused == 2:
        projections = [query, torch.stack(projections[1:], dim=-2)]
    diagonals = None
    if case.biased:
        diagonals = torch.randn(heads, queries + keys - 1, generator=generator).to(DEVICE)
        diagonals = constant_from(diagonals, queries, case.constant_beyond).requires_grad_()
    return [tensor.requires_grad_() for tensor in projections], diagonals


def check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Result and gradients against those in float64."""
    queries, keys = case.lengths
    projections, diagonals = sample(case)
    ids = segment_ids(case.segments, 2, queries, keys)
    kept = None
    if case.dropout:
        seed = torch.tensor([2**40 + 3], device=DEVICE)
        monkeypatch.setattr(triton_attention, "_seed", lambda *_: seed)
        kept = dropout_mask(seed, 2, 2, queries, keys, case.dropout)
    given = [*projections, None, None][:3]
    output = attention(
        *given, diagonals, *ids, causal=case.causal, scale=case.scale,
        constant_beyond=case.constant_beyond if case.biased else None, dropout=case.dropout,
    )  # fmt: skip
    separate = triton_attention.separate(*given)
    expected = reference(*separate, diagonals, *ids, case.causal, case.scale, kept, case.dropout)
    assert output.is_contiguous() and output.dtype == projections[0].dtype
    close(output, expected, TOLERANCES[case.dtype])
    inputs = projections if diagonals is None else [*projections, diagonals]
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    actual = torch.autograd.grad(output, inputs, gradient.to(output.dtype))
    wanted = torch.autograd.grad(expected, inputs, gradient.to(output.dtype).double())
    # Of a single key the gradients are 0, but for the rounding of the result, with which they are computed.
    tolerance, rest = 2 * TOLERANCES[case.dtype], 1.0 if keys == 1 else 0.1
    for mine, theirs in zip(actual[: len(projections)], wanted, strict=False):
        close(mine, theirs, tolerance, rest)
    if diagonals is not None:
        close(*(by_side(g[-1], queries, case.constant_beyond) for g in (actual, wanted)), tolerance, rest)


def name(case: Case) -> str:
    return "-".join(map(str, case)).replace(" ", "")


@pytest.mark.parametrize("case", pairwise(12), ids=name)
def test_equals_float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("segments", OPTIONS["segments"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", OPTIONS["lengths"])
def test_grid_equals_float64(
    lengths: tuple[int, int], causal: bool, segments: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every combination of these four, and with each, all others once over the whole grid."""
    generator = random.Random(repr((lengths, causal, segments, dtype)))
    drawn = {option: generator.choice(values) for option, values in OPTIONS.items()}
    fixed = {"lengths": lengths, "causal": causal, "segments": segments, "dtype": dtype}
    check(Case(**(drawn | fixed)), monkeypatch)


PLAIN = Case((77, 77), False, True, "float32", 16, "none", 1.0, 0.0, None, 1)


def run(case: Case, **options: Any) -> tuple[Tensor, ...]:
    """Result and gradients."""
    projections, diagonals = sample(case)
    given = [*projections, None, None][:3]
    ids = segment_ids(case.segments, 2, *case.lengths)
    settings = {"causal": case.causal, "dropout": case.dropout, "constant_beyond": case.constant_beyond} | options
    output = attention(*given, diagonals, *ids, **settings)
    inputs = projections if diagonals is None else [*projections, diagonals]
    return output, *torch.autograd.grad(output, inputs, output.detach().cos())


def test_same_bits_again() -> None:
    case = PLAIN._replace(segments="packed", constant_beyond=20, dropout=0.1, lengths=(40, 40))
    for first, second in zip(*([*_seeded(case)] for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def _seeded(case: Case, **options: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return run(case, **options)


def test_fused_projections_and_strides_change_no_bit() -> None:
    case = PLAIN._replace(lengths=(40, 40), causal=True)
    output, *expected, bias = run(case)
    for fused in (2, 3):
        result, *gradients, bias_gradient = run(case._replace(fused=fused))
        assert torch.equal(result, output) and torch.equal(bias_gradient, bias)
        of_last = gradients[-1].unbind(-2)
        for actual, wanted in zip((*gradients[:-1], *of_last), expected, strict=True):
            assert torch.equal(actual, wanted)
    projections, diagonals = sample(case)
    strided = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in projections]
    wide = strided[2].repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(attention(*strided[:2], wide, diagonals, None, None, causal=True), output)
    # A row of the batch for all, and a gradient without strides.
    one = [projections[0], *(tensor[:1] for tensor in projections[1:])]
    result = attention(*one, diagonals, None, None, causal=True)
    assert torch.equal(result[:1], output[:1])
    result.sum().backward()


def test_streams_and_seeds_drop_other_places() -> None:
    drawn = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    masks = [dropout_mask(drawn + stream, 2, 2, 64, 64, 0.25) for stream in range(2)]
    for mask in masks:
        assert abs(mask.double().mean().item() - 0.75) < 0.02
        pairs = (mask[0, 0], mask[0, 1], mask[1, 0], mask[0, 0].T)
        for first, second in itertools.combinations(pairs, 2):
            assert abs((first == second).double().mean().item() - 0.625) < 0.05
    assert abs((masks[0] == masks[1]).double().mean().item() - 0.625) < 0.05


def test_dropped_places_have_no_pattern() -> None:
    """Places share the bits of their row and their column; what becomes of them must not show it."""
    mask = dropout_mask(torch.full((1,), 7, dtype=torch.int64, device=DEVICE), 1, 1, 512, 512, 0.5)[0, 0].double() - 0.5
    for sums in (mask.sum(0), mask.sum(1), mask.diagonal()[None].sum(1)):
        assert sums.abs().max() < 5 * (0.25 * 512) ** 0.5
    for left, right in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[1:, 1:], mask[:-1, :-1])):
        assert abs((left * right).mean()) < 5 * 0.25 / left.numel() ** 0.5
    # What a sum of a row's and a column's bits alone would show.
    minors = mask[1:, 1:] * mask[1:, :-1] * mask[:-1, 1:] * mask[:-1, :-1]
    assert abs(minors.mean()) < 5 * 0.0625 / minors.numel() ** 0.5


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bucket_table_gets_the_dense_gradient(bidirectional: bool) -> None:
    config = ModelConfig(
        encoder_num_layers=1, num_attention_heads=2, kv_channels=16, hidden_size=32,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    bias = RelativePositionBias(config, bidirectional=bidirectional).to(DEVICE)
    torch.nn.init.normal_(bias.weight)
    case = PLAIN._replace(causal=not bidirectional, lengths=(110, 110))
    projections, _ = sample(case, batch=1)
    diagonals = bias(110, 110)
    output = attention(*projections, diagonals, None, None, causal=case.causal, constant_beyond=bias.constant_beyond)
    expected = reference(*projections, diagonals, None, None, case.causal, 1.0)
    close(output, expected, 1e-5)
    gradient = expected.detach().cos()
    (actual,) = torch.autograd.grad(output, bias.weight, gradient.float(), retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, bias.weight, gradient)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_extreme_scores(shift: float) -> None:
    """T5's scores are not scaled: rows whose sum of exponentials is no fp32 number, and probabilities of 0 and 1."""
    case = PLAIN._replace(lengths=(70, 70))
    projections, diagonals = sample(case)
    assert diagonals is not None
    query, key, value = projections
    query = (query.detach() * 40).requires_grad_()
    diagonals = (diagonals.detach() + shift).requires_grad_()
    inputs = [query, key, value, diagonals]
    output = attention(*inputs, None, None, causal=False)
    expected = reference(*inputs, None, None, False, 1.0)
    close(output, expected, 1e-4)
    gradient = expected.detach().cos()
    actual = torch.autograd.grad(output, inputs, gradient.float())
    for mine, theirs in zip(actual, torch.autograd.grad(expected, inputs, gradient), strict=True):
        close(mine, theirs, 1e-3)


def test_queries_that_see_no_key_are_zero() -> None:
    case = PLAIN._replace(segments="empty rows", lengths=(70, 70))
    output, query_gradient, key_gradient, *_ = run(case)
    of_queries, of_keys = segment_ids("empty rows", 2, 70, 70)
    assert of_queries is not None and of_keys is not None
    visible = (of_queries[:, :, None] == of_keys[:, None, :]) & (of_keys[:, None, :] != 0)
    blind, unseen = ~visible.any(2), ~visible.any(1)
    assert 0 < blind.sum() < blind.numel()
    assert not output[blind].any() and not query_gradient[blind].any() and not key_gradient[unseen].any()
    assert output[~blind].all()


def test_recomputation_draws_the_same() -> None:
    case = PLAIN._replace(lengths=(20, 20), biased=False)
    projections, _ = sample(case)

    def attend(*inputs: Tensor) -> Tensor:
        return attention(*inputs, None, None, None, causal=False, dropout=0.3)

    results = []
    for function in (attend, lambda *inputs: checkpoint(attend, *inputs, use_reentrant=False)):
        torch.manual_seed(5)
        output = function(*projections)
        results.append((output, *torch.autograd.grad(output.square().sum(), projections)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("fused", [1, 3])
def test_compiles(fused: int) -> None:
    case = PLAIN._replace(lengths=(20, 20), fused=fused, causal=True)
    projections, diagonals = sample(case)
    given = [*projections, None, None][:3]

    def attend(*inputs: Tensor | None) -> Tensor:
        return attention(*inputs, None, None, causal=True, constant_beyond=8).square()

    results = []
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        output = function(*given, diagonals)
        results.append((output, *torch.autograd.grad(output.sum(), [*projections, diagonals])))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_operator_is_described_as_it_is() -> None:
    projections, diagonals = sample(PLAIN._replace(lengths=(20, 17)))
    ids = segment_ids("packed", 2, 20, 17)
    arguments = (*projections, diagonals, *ids, None, True, 1.0, 8, 0.0)
    torch.library.opcheck(
        torch.ops.megatron_t5.triton_attention.default, arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


class Allocations(TorchDispatchMode):
    """Records how many numbers each tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.sizes += [tensor.numel() for tensor in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(tensor)]
        return result


def test_nothing_is_as_large_as_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = Tiles(Tile(64, 64), Tile(64, 64), Tile(64, 64), Tile(64, 64))
    monkeypatch.setattr(triton_attention, "choose_tiles", lambda *_: tiles)
    projections, diagonals = sample(PLAIN._replace(lengths=(256, 256)), batch=1)
    inputs = (*(tensor.detach() for tensor in projections), diagonals, None, None, None, False, 1.0, None, 0.0)
    with Allocations() as allocations, torch.no_grad():
        context, statistics = triton_attention._forward(*inputs)
        triton_attention._backward(context, context, statistics, *inputs, True)
    assert 0 < max(allocations.sizes) < 2 * 256 * 256 // 2


@pytest.mark.parametrize("constant_beyond", [None, 0, 1, 128, 5000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (10, 0)])
def test_workspace_keeps_its_bound(
    capability: tuple[int, int] | None, causal: bool, constant_beyond: int | None
) -> None:
    """Of all tiles and lengths; `BiasSums` asserts it, too."""
    for channels, dtype in itertools.product((16, 80, 128, 256), (torch.float32, torch.bfloat16)):
        tiles = choose_tiles(capability, channels, dtype.itemsize)
        for queries, keys in ((1, 1), (1, 4096), (500, 114), (512, 512), (4096, 4096)):
            query, key = (
                torch.empty(4, length, 12, channels, dtype=dtype, device="meta") for length in (queries, keys)
            )
            diagonals = torch.empty(12, queries + keys - 1, device="meta")
            problem = triton_attention.Problem.of(
                query, key, key, diagonals, None, None, None, causal, 1.0, constant_beyond, 0.0, tiles=tiles
            )
            sums = triton_attention.BiasSums.of(problem)
            free = 12 * sums.diagonals * 8 * 2 * sums.side
            assert torch.Size(sums.shape(12)).numel() <= max(12 * queries * keys // 64, free)
            assert sums.first <= 0 < sums.first + sums.diagonals


def test_refuses_what_it_cannot_compute() -> None:
    request = AttentionRequest(torch.device(DEVICE), torch.bfloat16, 64, has_diagonals=True)
    assert BACKEND.refuses(request) is None
    assert "--kv-channels" in str(BACKEND.refuses(request._replace(head_dim=8)))
    assert "float64" in str(BACKEND.refuses(request._replace(dtype=torch.float64)))
    assert BACKEND.refuses(request._replace(has_mask=True))
    assert BACKEND.refuses(request._replace(device=torch.device("meta")))


def test_refuses_a_second_derivative() -> None:
    inputs = [torch.randn(1, 20, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    gradients = torch.autograd.grad(attention(*inputs, None, None, None, causal=False).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients[0].square().sum().backward()


@pytest.fixture
def usual_precision() -> Iterator[None]:
    """Afterwards both interfaces of torch have their first values."""
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["high", "highest", "tf32", "ieee"])
def test_products_follow_torch_s_settings(setting: str, usual_precision: None) -> None:
    """By the older interface and by the newer one, after which the getter of the older is an error."""
    if setting.startswith("high"):
        torch.set_float32_matmul_precision(setting)
    else:
        torch.backends.cuda.matmul.fp32_precision = setting
    query = torch.zeros(1, 20, 2, 16, device=DEVICE)
    inputs = (query, query, query, None, None, None, None, False, 1.0, None, 0.0)
    constants = triton_attention.Problem.of(*inputs).constants(Tile(64, 32))
    assert constants["PRECISION"] == ("tf32" if setting in ("high", "tf32") else "ieee")
