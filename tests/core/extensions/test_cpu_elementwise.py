import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.core.extensions import cpu_elementwise as ours
from megatron.core.extensions import elementwise_kernels as kernels
from tests.elementwise import (
    check_compiled,
    check_loss,
    check_one_gradient_alone,
    check_recomputation,
    check_strides,
    draw,
    gated_reference,
    norm_reference,
)

DTYPES = (torch.float32, torch.bfloat16)
OPERATORS = torch.ops.megatron_t5
INF, NAN = math.inf, math.nan


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Of one rounding to `dtype`, beside a few of fp32."""
    return {"rtol": 2**-8, "atol": 2e-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}


def check(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, **tolerance(actual.dtype))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gated-gelu", "gated-silu"])
@pytest.mark.parametrize("shape", [(3, 5, 2 * 37), (2,), (1, 0), (0, 6), (65, 2 * 512)])
def test_gated_activation(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype, spread=4.0).requires_grad_()
    y = ours.gated_activation(x, kind)
    exact = x.detach().double().requires_grad_()
    expected = gated_reference(exact, kind)
    check(y, expected)
    assert y.dtype == dtype
    gradient = draw(*y.shape, dtype=dtype, seed=1)
    y.backward(gradient)
    expected.backward(gradient.double())
    check(x.grad, exact.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gated-gelu", "gated-silu"])
def test_gated_activation_at_the_ends(kind: str, dtype: torch.dtype) -> None:
    gates = [0.0, 1e-30, 12.0, 100.0, 1e30, INF, -12.0, -100.0, -1e30, -INF, NAN]
    x = torch.tensor([part for gate in gates for part in (gate, 1.5)] * 3, dtype=dtype, requires_grad=True)
    y = ours.gated_activation(x, kind)
    y.sum().backward()
    value, slope = y.detach().double()[: len(gates)], x.grad.double()[: 2 * len(gates) : 2]
    assert value[:6].tolist() == pytest.approx(
        [1.5 * float(torch.tensor(gate, dtype=dtype)) for gate in [0.0, 5e-31, *gates[2:6]]], rel=1e-2, abs=1e-4
    )
    assert value[6:10].abs().max() < 2e-4 and slope[6:10].abs().max() < 2e-4
    assert slope[:2].tolist() == pytest.approx([0.75, 0.75]) and slope[2:6].tolist() == pytest.approx(
        [1.5] * 4, rel=1e-3
    )
    assert value[10].isnan() and slope[10].isnan()
    up = torch.tensor([1.0, INF, 1.0, NAN], dtype=dtype)
    result = ours.gated_activation(up, kind)
    assert result[0] == INF and result[1].isnan()


@pytest.mark.parametrize(("dtype", "output"), [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize("shape", [(3, 5, 37), (1,), (0, 6), (130, 512)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, output: torch.dtype) -> None:
    x, weight = draw(*shape, dtype=dtype).requires_grad_(), draw(shape[-1], seed=1).requires_grad_()
    y = ours.rms_norm(x, weight, 1e-3, output)
    exact, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = norm_reference(exact, exact_weight, 1e-3)
    check(y, expected)
    assert y.dtype == output
    gradient = draw(*shape, dtype=output, seed=2)
    y.backward(gradient)
    expected.backward(gradient.double())
    check(x.grad, exact.grad)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "output"), [(a, b) for a in DTYPES for b in DTYPES])
def test_add_rms_norm(dtype: torch.dtype, output: torch.dtype) -> None:
    residual, branch = (draw(4, 9, 70, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    weight = draw(70, seed=2).requires_grad_()
    total, y = ours.add_rms_norm(residual, branch, weight, 1e-6, output)
    assert torch.equal(total, residual + branch) and torch.equal(y, ours.rms_norm(total, weight, 1e-6, output))
    gradients = draw(4, 9, 70, dtype=dtype, seed=3), draw(4, 9, 70, dtype=output, seed=4)
    torch.autograd.backward((total, y), gradients)
    exact, exact_weight = (t.detach().double().requires_grad_() for t in (total, weight))
    torch.autograd.backward(
        (exact * 1.0, norm_reference(exact, exact_weight, 1e-6)), tuple(g.double() for g in gradients)
    )
    check(residual.grad, exact.grad)
    assert torch.equal(residual.grad, branch.grad)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-4)


def test_one_gradient_alone() -> None:
    check_one_gradient_alone(ours)


def test_norm_of_a_bf16_weight_gives_it_a_bf16_gradient() -> None:
    x, weight = draw(3, 8), draw(8, seed=1, dtype=torch.bfloat16).requires_grad_()
    y = ours.rms_norm(x, weight, 1e-6)
    y.sum().backward()
    check(y, norm_reference(x.double(), weight.detach().double(), 1e-6))
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_what_is_not_finite_comes_out_of_a_norm(bad: float) -> None:
    x = draw(3, 40, dtype=torch.bfloat16)
    x[1, 7] = bad
    x.requires_grad_()
    weight = torch.ones(40, requires_grad=True)
    y = ours.rms_norm(x, weight, 1e-6)
    y.sum().backward()
    for tensor in (y, x.grad):
        assert tensor[1, 7].isnan() and tensor[::2].isfinite().all()
    assert weight.grad[7].isnan()


def test_operands_may_have_any_strides() -> None:
    check_strides(ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_rate_and_mean_and_its_backward_pass_draws_the_same(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 401, dtype=dtype, requires_grad=True)
    y = ours.dropout(x, p)
    y.backward(torch.full_like(y, 3.0))
    dropped = y == 0
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert dropped.float().mean().item() == pytest.approx(p, abs=4 * deviation + 2**-16)
    assert y[~dropped].float().unique().tolist() == pytest.approx([1 / (1 - p)], rel=5e-3)
    torch.testing.assert_close(x.grad, 3 * y, rtol=2**-7, atol=0)


def test_dropout_of_an_element_does_not_depend_on_another() -> None:
    torch.manual_seed(1)
    x = torch.ones(512, 256)
    first, second = ((ours.dropout(x, 0.5) == 0).float() * 2 - 1 for _ in range(2))
    bound = 5 / math.sqrt(x.numel())
    assert (first * second).mean().abs() < bound
    for rows, columns in [(0, 1), (1, 0), (1, 1), (0, 2), (0, 16), (0, 128), (1, 128), (2, 0), (64, 64)]:
        assert (first * first.roll((rows, columns), (0, 1))).mean().abs() < bound, (rows, columns)
    # Variances of the counts of rows and columns are those of coins.
    assert first.mean(0).square().mean().item() * 512 == pytest.approx(1, abs=0.5)
    assert first.mean(1).square().mean().item() * 256 == pytest.approx(1, abs=0.5)


def test_dropout_follows_torch_s_generator_and_draws_nothing_at_rate_0() -> None:
    x = draw(8, 64)
    torch.manual_seed(5)
    first, second = ours.dropout(x, 0.3), ours.dropout(x, 0.3)
    torch.manual_seed(5)
    assert torch.equal(ours.dropout(x, 0.3), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    assert ours.dropout(x, 0.0) is x and torch.equal(ours.dropout_add(x, x, 0.0), x + x)
    ours.add_rms_norm(x, x, torch.ones(64), 1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    x[0] = INF
    assert not ours.dropout(x, 0.5)[0].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 64])
def test_fused_dropout_is_dropout_then_sum(width: int, dtype: torch.dtype) -> None:
    residual, branch = (draw(7, width, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    weight = draw(width, seed=2).requires_grad_()
    inputs = (residual, branch, weight)

    def run(fused: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        if fused:
            total, y = ours.add_rms_norm(residual, branch, weight, 1e-6, p=0.4)
        else:
            total = ours.dropout_add(residual, branch, 0.4)
            y = ours.rms_norm(total, weight, 1e-6)
        return total, y, *torch.autograd.grad(y.float().sin().sum(), inputs)

    for fused, apart in zip(run(True), run(False), strict=True):
        assert torch.equal(fused, apart)
    torch.manual_seed(3)
    kept = ours.dropout(torch.ones_like(branch), 0.4)
    torch.testing.assert_close(run(True)[0], residual + branch * kept, rtol=2**-6, atol=2**-6)


def block(residual: Tensor, branch: Tensor, weight: Tensor, wide: Tensor, narrow: Tensor, p: float) -> Tensor:
    """All operations as a layer uses them."""
    total, normed = ours.add_rms_norm(residual, branch, weight, 1e-6, torch.bfloat16, p)
    inner = ours.dropout(ours.gated_activation(normed @ wide, "gated-gelu"), p)
    return ours.rms_norm(ours.dropout_add(total, (inner @ narrow).float(), p), weight, 1e-6)


def test_recomputation_gives_equal_bits() -> None:
    check_recomputation(block)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_holds_the_operators(backend: str) -> None:
    check_compiled(block, 0.0, backend)

    def drop(x: Tensor) -> Tensor:
        return ours.dropout(x, 0.5)

    def drop_again(x: Tensor) -> Tensor:
        return checkpoint(drop, x, use_reentrant=False)

    for function in (drop, drop_again):
        x = torch.ones(8, 64, requires_grad=True)
        y = torch.compile(function, backend=backend, fullgraph=True)(x)
        y.sum().backward()
        assert torch.equal(x.grad, y)


def test_operators_pass_torch_s_checks() -> None:
    x, seed, half = draw(3, 8), torch.tensor(7), torch.bfloat16
    norm = (x, torch.ones(8), 1e-6)
    for operator, arguments in [
        (OPERATORS.gated, (x, "gelu")),
        (OPERATORS.gated_gradient, (draw(3, 4), x, "silu")),
        (OPERATORS.dropout, (x, seed, 0.5, None)),
        (OPERATORS.dropout, (x, seed, 0.5, x + 1)),
        (OPERATORS.rms_norm, (*norm, half)),
        (OPERATORS.add_rms_norm, (x, *norm, half, 0.0, None)),
        (OPERATORS.add_rms_norm, (x, *norm, half, 0.5, seed)),
        (OPERATORS.rms_norm_gradient, (None, x.to(half), *norm, 0.0, None)),
        (OPERATORS.rms_norm_gradient, (x, x + 1, *norm, 0.5, seed)),
    ]:
        torch.library.opcheck(operator.default, arguments)


def test_bits_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    x, weight, gradient = draw(403, 512), draw(512, seed=1), draw(403, 512, seed=2)
    labels = torch.arange(403)
    seed, log_z, other = torch.tensor(3), torch.empty(403), torch.empty(403)

    def run(count: int) -> list[Tensor]:
        threads(count)
        total, y = OPERATORS.add_rms_norm(x, gradient, weight, 1e-6, torch.float32, 0.1, seed)
        units = OPERATORS.gated(x, "gelu")
        ours.softmax_statistics(x, labels, log_z, other)
        logits = x.clone()
        ours.logits_gradient_(logits, labels, log_z, other, other)
        results = (total, y, units, OPERATORS.gated_gradient(units, x, "gelu"), log_z.clone(), logits)
        return [*results, *OPERATORS.rms_norm_gradient(total, gradient, x, weight, 1e-6, 0.1, seed)]

    for alone, together, again in zip(run(1), run(2), run(2), strict=True):
        assert torch.equal(alone, together) and torch.equal(together, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", [1, 100, 2048, 5003])
def test_statistics_and_gradient_of_logits(words: int, dtype: torch.dtype) -> None:
    check_loss(ours, words, dtype, "cpu", 2**-8 if dtype == torch.bfloat16 else 1e-4)


def test_statistics_of_logits_that_are_not_finite() -> None:
    logits = torch.full((6, 4000), -INF)
    logits[1:] = draw(5, 4000)
    logits[2, 3500], logits[3, 100], logits[4, 1], logits[4, 3999] = INF, NAN, INF, NAN
    logits[5, :2500] = -INF
    log_z, other = torch.empty(6), torch.empty(6)
    ours.softmax_statistics(logits, torch.zeros(6, dtype=torch.int64), log_z, other)
    torch.testing.assert_close(log_z, logits.logsumexp(-1), equal_nan=True)


def test_kernels_refuse_wrong_arguments() -> None:
    x = draw(4)
    for arguments in [("float16", "gelu", 2, 1), ("float32", "relu", 2, 1), ("float32", "gelu", -1, 1)]:
        with pytest.raises(ValueError, match=r"must be"):
            kernels.gated(x.data_ptr(), x.data_ptr(), *arguments)
    seed = torch.tensor(1).data_ptr()
    with pytest.raises(ValueError, match="probability"):
        kernels.dropout(0, x.data_ptr(), x.data_ptr(), "float32", 1, 4, 1.0, seed, 1)
    assert not ours.supports(x.double()) and not ours.supports(x.half()) and not ours.supports(x.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 16384, 100_003])
def test_sums_of_squares(size, dtype, monkeypatch):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    found = ours.sum_of_squares(values)
    assert found == pytest.approx(values.double().square().sum().item(), rel=2e-6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert ours.sum_of_squares(values) == found
    for wrong in (float("inf"), float("-inf"), float("nan")):
        if size:
            values[size // 2] = wrong
            assert not math.isfinite(ours.sum_of_squares(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_beside_its_input_has_the_gradient_of_both(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 33, generator=generator).to(dtype).requires_grad_()
    weight = torch.rand(33, generator=generator).requires_grad_()
    outer = [torch.randn(5, 33, generator=generator).to(dtype) for _ in range(2)]
    same, normed = ours.rms_norm_beside(x, weight, 1e-6)
    assert torch.equal(same, x) and torch.equal(normed, ours.rms_norm(x, weight, 1e-6))
    found = torch.autograd.grad((same, normed), (x, weight), outer)
    gradients = torch.autograd.grad(ours.rms_norm(x, weight, 1e-6), (x, weight), outer[1])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}  # rounded once instead of twice
    torch.testing.assert_close(found[0], gradients[0] + outer[0], **tolerance)
    assert torch.equal(found[1], gradients[1])
