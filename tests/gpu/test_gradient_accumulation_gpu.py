"""Weight gradients that are added up within their product, on a GPU: by torch, and by apex where it is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron.core.extensions import apex, gradient_accumulation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kernel", ["torch", "apex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_three_microbatches(monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype) -> None:
    """Nearer to float64 than gradients that are rounded and added, and in the memory of the first."""
    if kernel == "apex" and not apex.has_weight_gradient_kernel():
        pytest.skip("apex is not installed")
    monkeypatch.setattr(apex, "has_weight_gradient_kernel", lambda: kernel == "apex")
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(96, 160, device="cuda"))
    plain = nn.Parameter(weight.detach().clone())
    linear = gradient_accumulation.accumulating_linear(lambda: weight)
    exact = torch.zeros(96, 160, device="cuda", dtype=torch.float64)
    places = set()
    for _ in range(3):
        x = torch.randn(2, 37, 160, device="cuda", dtype=dtype)
        gradient = torch.randn(2, 37, 96, device="cuda", dtype=dtype)
        linear(x, weight).backward(gradient)
        (x @ plain.to(dtype).T).backward(gradient)
        exact += gradient.flatten(0, 1).double().T @ x.flatten(0, 1).double()
        assert weight.grad is not None
        places.add(weight.grad.data_ptr())
    assert weight.grad is not None and plain.grad is not None

    def error(value: Tensor) -> float:
        return ((value.double() - exact).norm() / exact.norm()).item()

    assert weight.grad.dtype == torch.float32 and len(places) == 1
    assert error(weight.grad) < (1e-3 if dtype == torch.float32 else 1e-4)  # TF32 is allowed there
    if dtype != torch.float32:
        assert error(weight.grad) < error(plain.grad)
