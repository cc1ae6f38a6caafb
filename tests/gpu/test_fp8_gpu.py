"""FP8 products by torchao on a GPU that has them: near bf16, in a model too, compiled and not."""

from __future__ import annotations

import pytest
import torch

from megatron.core.compilation import compile_layers
from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.extensions import packages, torchao_fp8
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import initialize_parameters
from megatron.core.tensor_parallel.layers import Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no FP8"
    ),
    pytest.mark.skipif(not packages.installed("torchao"), reason="torchao is not installed"),
]
CONFIG = ModelConfig(
    encoder_num_layers=2, hidden_size=256, num_attention_heads=4, kv_channels=64, ffn_hidden_size=512, vocab_size=384
)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("wgrad", [True, False])
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("rows", [512, 114])  # 114 are padded
@pytest.mark.parametrize("compiled", [False, True])
def test_a_product_and_its_gradients(rows: int, fp8_format: str, wgrad: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    compute = ComputeConfig(bf16=True, fp8_format=fp8_format, fp8_wgrad=wgrad)  # type: ignore[arg-type]
    product = torchao_fp8.product(compute)
    if compiled:
        product = torch.compile(product, fullgraph=True, dynamic=False)
    x = torch.randn(2, rows // 2, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(384, 256, device="cuda").requires_grad_()
    gradient = torch.randn(2, rows // 2, 384, device="cuda", dtype=torch.bfloat16)
    result = product(x, weight)
    result.backward(gradient)
    assert x.grad is not None and weight.grad is not None and weight.grad.dtype == torch.float32
    flat, flat_gradient = x.detach().flatten(0, 1).double(), gradient.flatten(0, 1).double()
    assert relative_error(result.detach(), x.detach().double() @ weight.detach().double().T) < 0.06
    assert relative_error(x.grad, gradient.double() @ weight.detach().double()) < 0.08
    assert relative_error(weight.grad, flat_gradient.T @ flat) < (0.08 if wgrad else 0.01)


def losses(compute: ComputeConfig, steps: int = 12) -> list[float]:
    """Of training on always the same rows."""
    with torch.device("meta"):
        model = T5Model(CONFIG, compute, z_loss_weight=1e-4)
    if compute.fp8_format is not None:
        product = torchao_fp8.product(compute)
        for module in (module for block in model.blocks for module in block.modules()):
            if isinstance(module, Linear):
                module.product = product
    if compute.compile:
        compile_layers(model.blocks)
    model.to_empty(device="cuda")
    initialize_parameters(model, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    ids = torch.randint(3, 384, (8, 178), generator=torch.Generator().manual_seed(2)).cuda()
    values = []
    for _ in range(steps):
        found = model(ids[:, :128], ids[:, 128:177], ids[:, 129:]).loss
        loss = found.total.sum() / (8 * 49)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
def test_a_model_learns_as_in_bf16(fp8_format: str, compiled: bool) -> None:
    plain = losses(ComputeConfig(bf16=True))
    found = losses(ComputeConfig(bf16=True, fp8_format=fp8_format, compile=compiled))  # type: ignore[arg-type]
    assert found != plain and found[-1] < 0.9 * found[0]
    assert found == pytest.approx(plain, rel=0.03)
