"""Triton's kernels for norms, activations and the loss on a GPU, against float64 and against torch."""

from __future__ import annotations

import pytest
import torch

from megatron.core.config import ComputeConfig
from megatron.core.extensions import elementwise, torch_elementwise
from megatron.core.extensions import triton_elementwise as ours
from tests.elementwise import check_add_norm, check_gated, check_loss, check_norm, draw
from tests.gpu.test_gpu import loss_and_gradients

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT, BRAIN, HALF)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gated-gelu", "gated-silu"])
@pytest.mark.parametrize("shape", [(3, 5, 2 * 37), (2,), (1, 0), (64, 2 * 2048)])
def test_gated_activation(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    check_gated(ours, kind, dtype, shape, "cuda")


@pytest.mark.parametrize(("dtype", "output"), [(dtype, dtype) for dtype in DTYPES] + [(FLOAT, HALF), (FLOAT, BRAIN)])
@pytest.mark.parametrize("shape", [(7, 1), (3, 3, 5), (900, 512), (300, 768), (33, 1000), (65, 4096), (40, 8192),
                                   (9, 9000), (5, 65536), (0, 6)])  # fmt: skip
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, output: torch.dtype) -> None:
    check_norm(ours, shape, dtype, output, "cuda", epsilon=1e-3)


@pytest.mark.parametrize(("dtype", "output"), [(dtype, dtype) for dtype in DTYPES] + [(FLOAT, HALF)])
@pytest.mark.parametrize("width", [1, 70, 768, 4096, 9000])
def test_sum_and_norm(width: int, dtype: torch.dtype, output: torch.dtype) -> None:
    torch.manual_seed(0)
    check_add_norm(ours, width, dtype, output, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", [1, 100, 4096, 32128, 250112])
def test_statistics_and_gradient_of_logits(words: int, dtype: torch.dtype) -> None:
    check_loss(ours, words, dtype, "cuda")


def test_the_norm_rounds_as_torch_s_operations() -> None:
    x, weight = draw(512, 768, dtype=BRAIN, device="cuda"), draw(768, seed=1, device="cuda")
    found, expected = (module.rms_norm(x, weight, 1e-6, BRAIN) for module in (ours, torch_elementwise))
    assert (found == expected).float().mean() > 0.95
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-6)


def test_more_than_2_31_logits() -> None:
    rows, words = 70_000, 32_128
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB")
    logits = torch.zeros(rows, words, dtype=BRAIN, device="cuda")
    logits[-1, 5] = 12.0
    labels = torch.full((rows,), 5, device="cuda")
    log_z, label_logit = torch.empty(2, rows, device="cuda").unbind()
    ours.softmax_statistics(logits, labels, log_z, label_logit)
    expected = torch.zeros(words, dtype=torch.float64)
    expected[5] = 12.0
    assert log_z[-1].item() == pytest.approx(expected.logsumexp(0).item(), rel=1e-6) and label_logit[-1] == 12.0
    assert log_z[0].item() == pytest.approx(torch.tensor(float(words)).log().item(), rel=1e-6)
    ones = torch.ones(rows, device="cuda")
    ours.logits_gradient_(logits, labels, log_z, ones, ones)
    gradient = expected.softmax(0)
    gradient[5] -= 1.0
    torch.testing.assert_close(logits[-1].double().cpu(), gradient, rtol=2**-7, atol=1e-6)


def add_norm_results(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    inputs = [draw(2000, 768, dtype=BRAIN, seed=s, device="cuda").requires_grad_() for s in (0, 1)]
    weight = draw(768, seed=2, device="cuda").requires_grad_()
    total, y = ours.add_rms_norm(*inputs, weight, 1e-6, p=0.1)
    return [total, y, *torch.autograd.grad((total, y), (*inputs, weight), (y.detach(), total.detach()))]


def test_bits_are_the_same_in_every_run() -> None:
    for first, second in zip(add_norm_results(1), add_norm_results(1), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(add_norm_results(1)[0], add_norm_results(2)[0])


def test_the_host_does_not_wait() -> None:
    add_norm_results(1)  # compiles
    residual, branch = (draw(2000, 768, dtype=BRAIN, seed=s, device="cuda").requires_grad_() for s in (0, 1))
    weight = draw(768, seed=2, device="cuda").requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total, y = ours.add_rms_norm(residual, branch, weight, 1e-6, p=0.1)
        torch.autograd.backward((total, y), (y.detach(), total.detach()))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_drops_anew_in_every_replay() -> None:
    residual, branch = (torch.full((300, 512), value, device="cuda") for value in (0.0, 1.0))
    weight = torch.ones(512, device="cuda")
    ours.add_rms_norm(residual, branch, weight, 1e-6, p=0.5)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, _ = ours.add_rms_norm(residual, branch, weight, 1e-6, p=0.5)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(total == 0)
    assert [float(mask.float().mean()) for mask in masks] == pytest.approx([0.5, 0.5], abs=0.02)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_takes_the_operators(dynamic: bool) -> None:
    def both(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ours.gated_activation(ours.rms_norm(x, weight, 1e-6) * 2.0, "gated-gelu") + 1.0

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    x, weight = draw(50, 768, device="cuda").requires_grad_(), draw(768, seed=1, device="cuda").requires_grad_()
    results = []
    for function in (both, compiled):
        y = function(x, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_auto_is_triton_on_a_gpu() -> None:
    tensor = torch.ones(2, device="cuda")
    assert elementwise.choose_norm(ComputeConfig()).module(tensor) is ours
    assert elementwise.choose_activation(ComputeConfig(compile=True)).module(tensor) is torch_elementwise
    assert elementwise.choose_cross_entropy("auto").module(tensor) is ours


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_gives_the_cpu_gradients(backend: str) -> None:
    compute = ComputeConfig(
        attention_backend="unfused", norm_backend=backend, activation_backend=backend, cross_entropy_backend=backend
    )  # type: ignore[arg-type]
    expected = loss_and_gradients("cpu", ComputeConfig(attention_backend="unfused"), (192, 64))
    found = loss_and_gradients("cuda", compute, (192, 64))
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name
