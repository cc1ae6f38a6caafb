"""Checks of elementwise kernels, for whatever device they are called on; values and gradients against float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of one rounding.

    To nearest; but Triton's interpreter cuts off what bf16 does not hold, which is twice as much.
    """
    return ROUNDING[dtype] * (2 if dtype == torch.bfloat16 and device.type == "cpu" else 1)


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 2.0, device: str = "cpu"
) -> Tensor:
    """Normal numbers that are the same on all devices."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).to(dtype).to(device)


def close(actual: Tensor, expected: Tensor, *dtypes: torch.dtype, roundings: int = 1) -> None:
    """`actual` is what comes of so many roundings to each of the dtypes (and of arithmetic in fp32) of `expected`."""
    once = sum(rounding(dtype, actual.device) for dtype in dtypes)
    expected = expected.to(actual.device)
    bound = 2e-6 + 1.1 * roundings * once
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound * max(1.0, largest) * 0.5)


def leaf(tensor: Tensor) -> Tensor:
    """An exact copy to differentiate by."""
    return tensor.detach().double().requires_grad_()


def gated_reference(x: Tensor, kind: str) -> Tensor:
    """Gated activation by torch."""
    gate, up = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (F.silu(gate) if kind == "gated-silu" else F.gelu(gate, approximate="tanh")) * up


def norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm by torch."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def check_gated(ours: ModuleType, kind: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    """Values and gradient of a gated activation."""
    x = draw(*shape, dtype=dtype, spread=4.0, device=device).requires_grad_()
    y = ours.gated_activation(x, kind)
    exact = leaf(x)
    expected = gated_reference(exact, kind)
    close(y.detach(), expected.detach(), dtype)
    gradient = draw(*y.shape, dtype=dtype, seed=1, device=device)
    y.backward(gradient)
    expected.backward(gradient.double())
    close(x.grad, exact.grad, dtype)


def check_norm(
    ours: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, output: torch.dtype, device: str, epsilon: float
) -> None:
    """Values and gradients of a norm, alone and beside its input."""
    x = draw(*shape, dtype=dtype, device=device).requires_grad_()
    weight = draw(shape[-1], seed=1, device=device).requires_grad_()
    exact, exact_weight = leaf(x), leaf(weight)
    expected = norm_reference(exact, exact_weight, epsilon)
    gradient = draw(*shape, dtype=output, seed=2, device=device)
    also = draw(*shape, dtype=dtype, seed=3, device=device)
    expected.backward(gradient.double())
    y = ours.rms_norm(x, weight, epsilon, output)
    assert y.dtype == output
    close(y.detach(), expected.detach(), dtype, output, roundings=3)
    x_gradient, weight_gradient = torch.autograd.grad(y, (x, weight), gradient)
    close(x_gradient, exact.grad, dtype, output, roundings=2)
    close(weight_gradient, exact_weight.grad)
    same, y_again = ours.rms_norm_beside(x, weight, epsilon, output)
    assert torch.equal(same, x) and torch.equal(y_again, y)
    both = torch.autograd.grad((same, y_again), (x, weight), (also, gradient))
    close(both[0], exact.grad + also.double(), dtype, output, roundings=2)
    assert torch.equal(both[1], weight_gradient)


def check_add_norm(ours: ModuleType, width: int, dtype: torch.dtype, output: torch.dtype, device: str) -> None:
    """Sum and norm, and their gradients, with and without dropout."""
    residual, branch = (draw(2, 3, width, dtype=dtype, seed=s, device=device).requires_grad_() for s in (0, 1))
    weight = draw(width, seed=2, device=device).requires_grad_()
    gradients = [draw(2, 3, width, dtype=d, seed=s, device=device) for d, s in ((dtype, 3), (output, 4))]
    for p in (0.0, 0.4):
        total, y = ours.add_rms_norm(residual, branch, weight, 1e-6, output, p)
        assert torch.equal(y, ours.rms_norm(total, weight, 1e-6, output))
        of_residual, of_branch, of_weight = torch.autograd.grad((total, y), (residual, branch, weight), gradients)
        # Where the branch was kept shows in its gradient.
        kept = (of_branch != 0).double() / (1.0 - p)
        if p == 0.0:
            assert torch.equal(of_residual, of_branch)
        elif width >= 128:
            assert abs(float((of_branch == 0).double().mean()) - p) < 0.05
        close(total.detach(), residual.detach().double() + branch.detach().double() * kept, dtype)
        close(of_branch, of_residual.double() * kept, dtype)
        exact, exact_weight = leaf(total), leaf(weight)
        outputs = (exact * 1.0, norm_reference(exact, exact_weight, 1e-6))
        torch.autograd.backward(outputs, [gradient.double() for gradient in gradients])
        close(of_residual, exact.grad, dtype, output, roundings=2)
        close(of_weight, exact_weight.grad)


def check_one_gradient_alone(ours: ModuleType) -> None:
    """Of a sum and its norm, one is used and the other is not."""
    residual, branch, weight = draw(3, 8).requires_grad_(), draw(3, 8, seed=1), draw(8, seed=2)
    total, y = ours.add_rms_norm(residual, branch, weight, 1e-6)
    (of_total,) = torch.autograd.grad(total.sum(), residual, retain_graph=True)
    assert torch.equal(of_total, torch.ones(3, 8))
    (of_norm,) = torch.autograd.grad(y.sum(), residual)
    (expected,) = torch.autograd.grad(ours.rms_norm(residual + branch, weight, 1e-6).sum(), residual)
    assert torch.equal(of_norm, expected)


def check_strides(ours: ModuleType) -> None:
    """Operands need not be contiguous, nor need gradients."""
    x = draw(6, 4, 2 * 10).transpose(0, 1)
    weight = draw(20, 2)[:, 1]
    assert torch.equal(ours.gated_activation(x, "gated-gelu"), ours.gated_activation(x.contiguous(), "gated-gelu"))
    assert torch.equal(ours.rms_norm(x, weight, 1e-6), ours.rms_norm(x.contiguous(), weight.contiguous(), 1e-6))
    wide = draw(5, 40)[:, ::2].requires_grad_()
    ours.rms_norm(wide, weight, 1e-6).sum().backward()  # the gradient is an expanded scalar
    copy = wide.detach().contiguous().requires_grad_()
    ours.rms_norm(copy, weight, 1e-6).backward(torch.ones(5, 20))
    assert torch.equal(wide.grad, copy.grad)


def block_results(block: Callable[..., Tensor], p: float) -> list[Tensor]:
    """What a block of operations gives, and its gradients.

    Args:
        block: Takes residual and branch `[3, 16]`, a weight of norms, matrices `[16, 48]` and `[24, 16]` of a feed
            forward layer, and `p`.
        p: Probability of dropout.
    """
    torch.manual_seed(0)
    half = torch.bfloat16
    inputs = draw(3, 16), draw(3, 16), draw(16), draw(16, 48, dtype=half), draw(24, 16, dtype=half)
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    y = block(*inputs, p)
    return [y, *torch.autograd.grad(y.sin().sum(), inputs)]


def check_recomputation(block: Callable[..., Tensor]) -> None:
    """A block that is computed again in the backward pass drops the same."""
    again = block_results(lambda *inputs: checkpoint(block, *inputs, use_reentrant=False), 0.3)
    for actual, expected in zip(again, block_results(block, 0.3), strict=True):
        assert torch.equal(actual, expected)


def check_compiled(block: Callable[..., Tensor], p: float, backend: str) -> None:
    """torch.compile takes a block as one graph."""
    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
    for actual, expected in zip(block_results(compiled, p), block_results(block, p), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


def check_loss(ours: ModuleType, words: int, dtype: torch.dtype, device: str, tolerance: float | None = None) -> None:
    """Statistics of logits and the gradient in their place, whose relative error is that of a rounding if not given."""
    logits = draw(9, words, dtype=dtype, spread=6.0, device=device)
    logits[5] += 300.0
    labels = torch.tensor([0, words - 1, -100, words, words // 2, 0, 0, 0, -1], device=device)
    log_z, label_logit = torch.empty(2, 9, device=device).unbind()
    ours.softmax_statistics(logits, labels, log_z, label_logit)
    exact = logits.double()
    torch.testing.assert_close(log_z.double(), exact.logsumexp(-1), rtol=1e-6, atol=2e-6)
    onehot = (labels[:, None] == torch.arange(words, device=device)).double()
    assert torch.equal(label_logit.double(), (exact * onehot).sum(-1))
    label_scale, softmax_scale = draw(9, seed=1, device=device), draw(9, seed=2, device=device)
    expected = exact.softmax(-1) * softmax_scale.double()[:, None] - onehot * label_scale.double()[:, None]
    ours.logits_gradient_(logits, labels, log_z, label_scale, softmax_scale)
    tolerance = tolerance or 2e-5 + 1.1 * rounding(dtype, logits.device)
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=2e-7)
