"""Attention on CPUs against a plain computation in float64.

Shapes: b batch, n heads, q queries, k keys, d channels of a head.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.core.extensions import amx_attention, attention_kernels, cpu_attention, tiled_attention
from megatron.core.extensions.cpu_attention import attention
from megatron.core.extensions.score_bias import ScoreBias, masked_score
from megatron.core.extensions.seeds import seed

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def use_tiles(monkeypatch: pytest.MonkeyPatch, wanted: bool, dtype: torch.dtype) -> None:
    """Chooses one of the two ways of computing; skips the test if this processor does not have it."""
    if wanted and dtype == torch.bfloat16 and not amx_attention.available():
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(cpu_attention, "USE_TILES", wanted)


@pytest.fixture(params=["float32", "float32 tiles", "bfloat16", "bfloat16 tiles"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    name, *tiles = request.param.split()
    result: torch.dtype = getattr(torch, name)
    use_tiles(monkeypatch, bool(tiles), result)
    return result


def sample(
    dtype: torch.dtype, batch: int = 2, heads: int = 3, queries: int = 37, keys: int = 37, channels: int = 32
) -> list[Tensor]:
    """Query, key, value as views of a fused projection, and diagonals."""
    torch.manual_seed(queries * 1000 + keys)
    fused = (torch.randn(batch, keys, heads, 3, channels) * 0.5).to(dtype)
    query, key, value = fused.unbind(-2)
    if queries != keys:
        query = (torch.randn(batch, queries, heads, channels) * 0.5).to(dtype)
    return [tensor.requires_grad_() for tensor in (query, key, value, torch.randn(heads, queries + keys - 1))]


def padding_mask(batch: int, keys: int, dtype: torch.dtype) -> Tensor:
    """Hides the last keys of each row but the first: `[b, 1, 1, k]`."""
    hidden = torch.arange(keys) >= keys - 3 * torch.arange(batch)[:, None]
    return torch.zeros(batch, keys, dtype=dtype).masked_fill(hidden, masked_score(dtype))[:, None, None]


def reference(
    query: Tensor, key: Tensor, value: Tensor, diagonals: Tensor | None, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The definition, in float64."""
    bias = ScoreBias(query.shape[1], key.shape[1], diagonals, None, causal).dense(torch.float64, query.device)
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = scale * query @ key.transpose(2, 3)
    for added in (bias, mask):
        scores = scores if added is None else scores + added
    return (scores.softmax(-1) @ value).transpose(1, 2)


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return torch.autograd.grad(output, inputs, gradient)


@pytest.mark.parametrize(
    ("queries", "keys", "biased", "masked", "causal", "scale"),
    [
        (37, 37, True, False, False, 1.0),
        (64, 64, True, True, True, 1.0),
        (33, 33, False, False, True, 0.25),
        (19, 70, False, True, False, 1.0),
        (19, 70, True, True, True, 0.5),
        (1, 5, True, False, False, 1.0),
        (5, 1, True, False, True, 1.0),
        (161, 300, True, True, True, 0.5),
        (161, 300, True, False, False, 1.0),
    ],
)
def test_equals_float64(
    dtype: torch.dtype, queries: int, keys: int, biased: bool, masked: bool, causal: bool, scale: float
) -> None:
    *inputs, diagonals = sample(dtype, queries=queries, keys=keys)
    mask = padding_mask(2, keys, dtype) if masked and keys > 5 else None
    output = attention(*inputs, diagonals if biased else None, mask, causal=causal, scale=scale)
    expected = reference(*inputs, diagonals.double() if biased else None, mask, causal, scale)
    assert output.dtype == dtype and output.is_contiguous() and output.shape == inputs[0].shape
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)
    differentiated = [*inputs, diagonals] if biased else inputs
    for actual, wanted in zip(gradients(output, differentiated), gradients(expected, differentiated), strict=True):
        # of the gradient of the bias, each element is a sum of up to b q products
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (19, 70)])
def test_fused_projections_change_no_bit(dtype: torch.dtype, queries: int, keys: int) -> None:
    """Of one tensor for all, or for keys and values, the same results and one gradient."""
    *inputs, diagonals = sample(dtype, queries=queries, keys=keys)
    output = attention(*inputs, diagonals, None, causal=True)
    expected = gradients(output, [*inputs, diagonals])
    query, key, value = (tensor.detach() for tensor in inputs)
    for parts in ([query, key, value],) * (queries == keys) + ([key, value],):
        fused = torch.stack(parts, dim=-2).requires_grad_()
        projections = (fused, None, None) if len(parts) == 3 else (query.requires_grad_(), fused, None)
        result = attention(*projections, diagonals, None, causal=True)
        assert torch.equal(result, output)
        differentiated = [tensor for tensor in projections if tensor is not None]
        *actual, fused_gradient, bias_gradient = gradients(result, [*differentiated, diagonals])
        for a, b in zip((*actual, *fused_gradient.unbind(-2), bias_gradient), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 1, 1, 70), (2, 1, 19, 70), (2, 3, 1, 70), (2, 3, 19, 70)])
def test_masks_broadcast(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    *inputs, diagonals = sample(dtype, queries=19, keys=70)
    mask = torch.randn(shape)
    output = attention(*inputs, diagonals, mask, causal=False)
    expected = reference(*inputs, diagonals, mask, False, 1.0)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=TOLERANCES[dtype])
    for actual, wanted in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=TOLERANCES[dtype], atol=4 * TOLERANCES[dtype])


@pytest.mark.parametrize("channels", [64, 160])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tiles_are_no_less_accurate(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: int) -> None:
    *inputs, diagonals = sample(dtype, queries=130, keys=130, channels=channels)
    expected = reference(*inputs, diagonals.double(), None, True, channels**-0.5)
    wanted = (expected, *gradients(expected, [*inputs, diagonals]))
    errors = []
    for tiles in (True, False):
        use_tiles(monkeypatch, tiles, dtype)
        output = attention(*inputs, diagonals, None, causal=True, scale=channels**-0.5)
        results = (output, *gradients(output, [*inputs, diagonals]))
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(results, wanted, strict=True)])
    assert all(tiled <= 1.25 * plain for tiled, plain in zip(*errors, strict=True)), errors


def test_tiles_leave_products_of_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both configure the processor's tiles, in turns and on the same threads."""
    use_tiles(monkeypatch, True, torch.bfloat16)
    *inputs, diagonals = sample(torch.bfloat16, queries=96, keys=96)
    a, b = torch.randn(70, 90).bfloat16(), torch.randn(90, 50).bfloat16()
    product = a @ b
    output = attention(*inputs, diagonals, None, causal=False)
    for _ in range(3):
        assert torch.equal(a @ b, product)
        assert torch.equal(attention(*inputs, diagonals, None, causal=False), output)
        gradients(attention(*inputs, diagonals, None, causal=False), inputs)


def test_any_strides(dtype: torch.dtype) -> None:
    *inputs, diagonals = sample(dtype, queries=40, keys=40)
    output = attention(*inputs, diagonals, None, causal=False)
    strided = [
        tensor.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_() for tensor in inputs
    ]
    assert all(tensor.stride(-1) != 1 for tensor in strided)
    result = attention(*strided, diagonals, None, causal=False)
    assert torch.equal(result, output)
    weights = torch.randn(40, generator=torch.Generator().manual_seed(2)).to(dtype)
    for function in (lambda x: (x.sum((0, 2, 3)) * weights).sum(), lambda x: x.sum()):  # gradients are expanded tensors
        for a, b in zip(
            torch.autograd.grad(function(result), strided, retain_graph=True),
            torch.autograd.grad(function(output), inputs, retain_graph=True),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_row_without_visible_keys_is_uniform(dtype: torch.dtype) -> None:
    *inputs, _ = sample(dtype, queries=4, keys=40)
    mask = torch.full((2, 1, 1, 40), masked_score(dtype), dtype=dtype)
    output = attention(*inputs, None, mask, causal=False)
    expected = inputs[2].float().mean(1, keepdim=True).expand(-1, 4, -1, -1)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=TOLERANCES[dtype])
    assert all(gradient.isfinite().all() for gradient in gradients(output, inputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_not_hidden(dtype: torch.dtype, bad: float) -> None:
    # oneDNN's bf16 products of odd sizes let a NaN through to the row before; 64 is not one.
    *inputs, diagonals = (tensor.detach().clone() for tensor in sample(dtype, queries=64, keys=64))
    inputs[1][0, 30, 1, 0] = bad
    output = attention(*inputs, diagonals, None, causal=True)
    rows = output[0, :, 1].isnan().any(-1)
    if bad != bad:
        assert rows[30:].all()
    assert not rows[:30].any()  # the key comes after these queries
    assert output[0, :, 0].isfinite().all() and output[1].isfinite().all()
    inputs[1][0, 30, 1] = bad
    assert attention(*inputs, diagonals, None, causal=False)[0, :, 1].isnan().any(-1).any()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_and_threads_change_no_bit(dtype: torch.dtype, dropout: float) -> None:
    *inputs, diagonals = sample(dtype, queries=96, keys=96)
    results = []
    threads_before = torch.get_num_threads()
    try:
        for recompute, threads in ((False, 1), (True, 1), (True, 2), (False, 2), (False, 3)):
            torch.set_num_threads(threads)
            torch.manual_seed(5)
            output = attention(*inputs, diagonals, None, causal=True, dropout=dropout, recompute=recompute)
            results.append((output, *gradients(output, [*inputs, diagonals])))
    finally:
        torch.set_num_threads(threads_before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def dropped_probabilities(query: Tensor, key: Tensor, dropout: float, seed: int) -> Tensor:
    """Probabilities after dropout `[b, n, q, k]`, by giving every key a channel of its own."""
    batch, keys, heads, _ = key.shape
    value = torch.eye(keys, dtype=key.dtype)[None, :, None].expand(batch, -1, heads, -1)
    torch.manual_seed(seed)
    padded_query, padded_key = (torch.nn.functional.pad(x, (0, keys - x.shape[-1])) for x in (query, key))
    return attention(padded_query, padded_key, value, None, None, causal=False, dropout=dropout).transpose(1, 2)


def test_dropout_rate_and_independence() -> None:
    query, key, *_ = sample(torch.float32, batch=4, heads=4, queries=128, keys=130, channels=8)
    query, key = query.detach(), key.detach()
    plain = dropped_probabilities(query, key, 0.0, 0)
    dropout = 0.1
    first, second = (dropped_probabilities(query, key, dropout, seed) for seed in (1, 2))
    kept = first != 0
    torch.testing.assert_close(first[kept], plain[kept] / (1 - dropout), rtol=1e-4, atol=1e-8)
    count = kept.numel()
    deviation = (dropout * (1 - dropout) / count) ** 0.5
    assert abs((~kept).float().mean().item() - dropout) < 5 * deviation
    # both dropped: independent between calls, neighbouring keys, queries, heads and rows
    pairs = [(kept, second != 0), (kept[..., 1:], kept[..., :-1]), (kept[:, :, 1:], kept[:, :, :-1])]
    pairs += [(kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])]
    pairs += [(kept[:, :, 1:, 1:], kept[:, :, :-1, :-1])]
    for a, b in pairs:
        both = (~a & ~b).float().mean().item()
        assert abs(both - dropout**2) < 6 * (dropout**2 / a.numel()) ** 0.5
    assert (~kept).float().mean((0, 1, 2)).sub(dropout).abs().max() < 6 * (dropout * 0.9 / (16 * 128)) ** 0.5


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_the_same_in_the_backward_pass(recompute: bool) -> None:
    *inputs, diagonals = sample(torch.float32, queries=12, keys=12)
    arguments = [*inputs, diagonals]
    direction = [torch.randn_like(tensor) for tensor in arguments]

    def loss(step: float) -> Tensor:
        torch.manual_seed(3)
        moved = [tensor + step * change for tensor, change in zip(arguments, direction, strict=True)]
        output = attention(*moved, None, causal=False, scale=0.5, dropout=0.3, recompute=recompute)
        return (output.double() ** 2).sum()

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(0.0), arguments), direction, strict=True))
    step = 1e-3
    difference = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close(slope.double(), difference, rtol=2e-3, atol=2e-3)


def test_dropout_follows_the_generator() -> None:
    *inputs, diagonals = sample(torch.float32)
    torch.manual_seed(7)
    first, second = (attention(*inputs, diagonals, None, causal=False, dropout=0.5) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(attention(*inputs, diagonals, None, causal=False, dropout=0.5), first)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    again = torch.utils.checkpoint.checkpoint(
        lambda *tensors: attention(*tensors, None, causal=False, dropout=0.5), *inputs, diagonals, use_reentrant=False
    )
    for a, b in zip(gradients(again, inputs), gradients(first, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_operator_is_well_formed(recompute: bool) -> None:
    inputs = sample(torch.float32, queries=9, keys=14)
    mask, seed = padding_mask(2, 14, torch.float32), torch.tensor([11])
    forward = torch.ops.megatron_t5.attention.default
    torch.library.opcheck(forward, (*inputs, mask, None, False, 1.0, 0.0, recompute))
    torch.library.opcheck(forward, (*inputs[:3], None, None, seed, True, 0.5, 0.1, recompute))
    query, key_value = (torch.randn(2, 9, 3, *shape, requires_grad=True) for shape in ((8,), (2, 8)))
    torch.library.opcheck(forward, (query, key_value, None, None, None, None, True, 0.5, 0.0, recompute))
    context, *saved = forward(*(tensor.detach() for tensor in inputs), mask, None, True, 1.0, 0.0, recompute)
    backward = torch.ops.megatron_t5.attention_backward.default
    for fused in (1, 2):
        options = (True, 1.0, 0.0, fused, True)
        torch.library.opcheck(backward, (context, *saved, inputs[3].detach(), mask, None, *options))


@pytest.mark.parametrize("mask_shape", [None, (2, 1, 1, 14)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tiled_operator_is_well_formed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mask_shape: tuple[int, ...] | None
) -> None:
    use_tiles(monkeypatch, True, dtype)
    inputs = sample(dtype, queries=9, keys=14)
    mask = None if mask_shape is None else torch.randn(mask_shape)
    forward = torch.ops.megatron_t5.tiled_attention.default
    torch.library.opcheck(forward, (*inputs, mask, False, 1.0))
    query, key_value = (torch.randn(2, 9, 3, *shape, dtype=dtype, requires_grad=True) for shape in ((32,), (2, 32)))
    torch.library.opcheck(forward, (query, key_value, None, None, None, True, 0.5))
    detached = [tensor.detach() for tensor in inputs]
    context, statistics = forward(*detached, mask, False, 1.0)
    backward = torch.ops.megatron_t5.tiled_attention_backward.default
    torch.library.opcheck(backward, (context, context, statistics, *detached, mask, False, 1.0, True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(dtype: torch.dtype, backend: str) -> None:
    def block(query: Tensor, key: Tensor, value: Tensor, diagonals: Tensor) -> Tensor:
        return attention(query * 2, key, value, diagonals, None, causal=True).flatten(2).relu()

    inputs = sample(dtype, queries=16, keys=16)
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend=backend)):
        output = function(*inputs)
        results.append((output, *gradients(output, inputs)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_empty_batch(dtype: torch.dtype) -> None:
    inputs = [torch.empty(0, 4, 2, 32, dtype=dtype, requires_grad=True) for _ in range(3)]
    output = attention(*inputs, torch.zeros(2, 7), None, causal=False)
    assert output.shape == (0, 4, 2, 32)
    assert gradients(output, inputs)[0].shape == (0, 4, 2, 32)


def test_projections_must_match(dtype: torch.dtype) -> None:
    """Kernels read by address: what does not match the query would be read out of bounds."""
    query, key, value = (torch.randn(2, 8, 3, 32).to(dtype) for _ in range(3))
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    for bad in (key.to(other), key[:, :, :2], key[..., :16], key[:, :7], key.expand(2, 8, 3, 32).repeat(2, 1, 1, 1)):
        for projections in ((query, bad, value), (query, key, bad)):
            with pytest.raises(AssertionError):
                attention(*projections, None, None, causal=False)
            with pytest.raises(AssertionError):
                torch.ops.megatron_t5.tiled_attention(*projections, None, None, False, 1.0)
            with pytest.raises(AssertionError):
                torch.ops.megatron_t5.attention(*projections, None, None, None, False, 1.0, 0.0, False)
    with pytest.raises(AssertionError):
        attention(query, torch.stack((key, value), -2)[:, :, :2], None, None, None, causal=False)
    mask = torch.zeros(1, 1, 1, 8, requires_grad=True)
    with pytest.raises(AssertionError, match="no gradient"):
        attention(query, key, value, None, mask, causal=False)


def test_what_was_saved_must_match(dtype: torch.dtype) -> None:
    """The operators of backward passes check what they are given, too."""
    query, key, value = (torch.randn(2, 8, 3, 32).to(dtype) for _ in range(3))
    options = (None, None, None, False, 1.0, 0.0)
    context, *saved = torch.ops.megatron_t5.attention(query, key, value, *options, False)
    for index in range(len(saved)):
        for bad in (saved[index].double(), saved[index][:, :5]):
            changed = [*saved[:index], bad, *saved[index + 1 :]]
            with pytest.raises(AssertionError):
                torch.ops.megatron_t5.attention_backward(context, *changed, *options, 1, False)
    if cpu_attention.keeps_probabilities(dtype, 32, 0.0):
        return
    context, statistics = torch.ops.megatron_t5.tiled_attention(query, key, value, None, None, False, 1.0)
    arguments = (context, context, statistics, query, key, value)
    for index in range(len(arguments)):
        for bad in (arguments[index].double(), arguments[index][:, :5]):
            changed = [*arguments[:index], bad, *arguments[index + 1 :]]
            with pytest.raises(AssertionError):
                torch.ops.megatron_t5.tiled_attention_backward(*changed, None, None, False, 1.0, False)


@pytest.mark.parametrize("single", ["query", "key and value", "value", "fused"])
def test_a_batch_of_one_is_expanded(dtype: torch.dtype, single: str) -> None:
    query, key, value = (torch.randn(3, 8, 2, 32).to(dtype) for _ in range(3))
    fused = torch.stack((key, value), -2)
    inputs = {
        "query": [query[:1], key, value],
        "key and value": [query, key[:1], value[:1]],
        "value": [query, key, value[:1]],
        "fused": [query, fused[:1]],
    }[single]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    whole = [tensor.detach().expand(3, *tensor.shape[1:]).contiguous().requires_grad_() for tensor in inputs]
    results = []
    for tensors in (inputs, whole):
        output = attention(*tensors, *[None] * (3 - len(tensors)), None, None, causal=False)
        results.append((output, gradients(output, tensors)))
    assert torch.equal(results[0][0], results[1][0])
    for actual, expanded, tensor in zip(results[0][1], results[1][1], inputs, strict=True):
        assert actual.shape == tensor.shape
        torch.testing.assert_close(actual, expanded.sum_to_size(tensor.shape))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_rate_that_rounds_to_nothing_drops_nothing(recompute: bool) -> None:
    *inputs, diagonals = sample(torch.float32)
    results = []
    for dropout in (1e-6, 0.0):
        output = attention(*inputs, diagonals, None, causal=True, dropout=dropout, recompute=recompute)
        results.append((output, *gradients(output, [*inputs, diagonals])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def attend_without_memory(dtype: torch.dtype, threads: int) -> None:
    """Kernels whose workspaces do not fit into what memory is left; run in a process of its own."""
    torch.set_num_threads(threads)
    query = torch.zeros(1, 64, 4, 32, dtype=dtype)
    key, value = (torch.zeros(1, 100_000, 4, 32, dtype=dtype) for _ in range(2))
    few = query, key[:, :256], value[:, :256]
    attention(*few, None, None, causal=False)  # starts the threads
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 20), limits[1]))
    try:
        with pytest.raises(MemoryError):
            attention(query, key, value, None, None, causal=False)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not attention(*few, None, None, causal=False).any()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and sizes of processes are Linux's")
def test_too_little_memory_is_an_error_of_python() -> None:
    """An exception that leaves a thread of OpenMP would end the process."""
    dtypes = [torch.float32] + [torch.bfloat16] * amx_attention.available()
    code = f"import torch\nfrom {__name__} import attend_without_memory as run\n"
    code += "\n".join(f"run({dtype}, {threads})" for dtype in dtypes for threads in (1, 2))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert result.returncode == 0, result.stderr


def test_seeds() -> None:
    torch.manual_seed(3)
    first, second = seed(), seed()
    torch.manual_seed(3)
    assert torch.equal(seed(5), first + 5) and not torch.equal(first, second)
    with torch.device("meta"):
        assert seed().device.type == "cpu"
        torch.manual_seed(3)
        assert torch.equal(seed(), first)


def test_what_is_supported() -> None:
    cpu = torch.device("cpu")
    assert cpu_attention.supports(cpu, torch.bfloat16) and cpu_attention.supports(cpu, torch.float32)
    assert not cpu_attention.supports(cpu, torch.float16) and not cpu_attention.supports(cpu, torch.float64)
    assert not cpu_attention.supports(torch.device("meta"), torch.float32)


@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 64), (torch.float32, 48)])
def test_what_keeps_probabilities(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: int) -> None:
    use_tiles(monkeypatch, True, dtype)
    assert not cpu_attention.keeps_probabilities(dtype, channels, 0.0)
    assert cpu_attention.keeps_probabilities(dtype, channels - 8, 0.0)
    assert cpu_attention.keeps_probabilities(dtype, 272, 0.0)
    assert cpu_attention.keeps_probabilities(dtype, channels, 0.1)
    use_tiles(monkeypatch, False, dtype)
    assert cpu_attention.keeps_probabilities(dtype, channels, 0.0)


def test_kernels_refuse_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="sizes"):
        attention_kernels.ScoreRule(1, 0, 1, 1, False, 1.0, 0, 0, 0, 0, 0, 0, 0.0)
    with pytest.raises(ValueError, match="dropout"):
        attention_kernels.ScoreRule(1, 1, 1, 1, False, 1.0, 0, 0, 0, 0, 0, 0, 1.0)
    rule = attention_kernels.ScoreRule(1, 1, 1, 1, False, 1.0, 0, 0, 0, 0, 0, 0, 0.0)
    with pytest.raises(ValueError, match="float16"):
        attention_kernels.softmax(rule, "float16", 0, 0, 0, False, 1)
    with pytest.raises(ValueError, match="2 or 4 bytes"):
        attention_kernels.copy_heads(8, 0, (1, 1, 1, 1), 0, (1, 1, 1, 1), 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="multiple of 32" if amx_attention.available() else "no AMX"):
        amx_attention.forward(rule, 40, [0] * 4, [(1, 1, 1, 1)] * 4, 0, 1)
    if amx_attention.available():
        with pytest.raises(ValueError, match="strides"):
            amx_attention.forward(rule, 32, [0] * 4, [(1, 1, 1, 2)] * 4, 0, 1)
        with pytest.raises(ValueError, match="gradients"):
            amx_attention.backward(rule, 32, [0] * 4, [(1, 1, 1, 1)] * 4, 0, 0, 1)
    with pytest.raises(ValueError, match="multiple of 16"):
        tiled_attention.forward(rule, 40, [0] * 4, [(1, 1, 1, 1)] * 4, 0, 1)
    with pytest.raises(ValueError, match="number of addresses"):
        tiled_attention.backward(rule, 32, [0] * 4, [(1, 1, 1, 1)] * 4, 0, 0, 1)
    with pytest.raises(ValueError, match="strides"):
        tiled_attention.forward(rule, 32, [0] * 4, [(1, 1, 1, 2)] * 4, 0, 1)
