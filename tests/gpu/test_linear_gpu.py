"""Linear layers of fp32 weights in 16 bits on a GPU: weight gradients that are written in fp32, copies once a step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from megatron.core.datasets.loader import TensorBatch
from megatron.core.extensions import gpu_linear
from megatron.core.parallel_state import ParallelContext
from megatron.core.tensor_parallel import Linear, products
from megatron.training import linear_products, model_setup
from megatron.training.arguments import parse_args

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODEL = (
    "--encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 128 --num-attention-heads 4 --kv-channels 32 "
    "--ffn-hidden-size 256 --vocab-size 512 --micro-batch-size 2 --bf16"
)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(74, 160, 96), (513, 72, 40), (4096, 1024, 512)])
def test_gradients(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """The weight's is nearer to float64 than 16 bits can be, also from a gradient that is not contiguous."""
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    weight, x = nn.Parameter(torch.randn(outputs, inputs, device="cuda")), torch.randn(rows, inputs, device="cuda")
    x = x.to(dtype).requires_grad_()
    bias = torch.randn(outputs, device="cuda", dtype=dtype).requires_grad_()
    for gradient in (torch.randn(rows, outputs, device="cuda"), torch.randn(outputs, rows, device="cuda").T):
        gradient = gradient.to(dtype)
        y = gpu_linear.linear(x, weight, bias, weight.detach().to(dtype))
        torch.testing.assert_close(y, nn.functional.linear(x, weight.to(dtype), bias))
        x_gradient, weight_gradient, bias_gradient = torch.autograd.grad(y, (x, weight, bias), gradient)
        wide = gradient.double()
        assert weight_gradient.dtype == torch.float32
        assert relative_error(weight_gradient, wide.T @ x.detach().double()) < 1e-5
        assert relative_error(x_gradient, wide @ weight.detach().to(dtype).double()) < 1e-2
        assert relative_error(bias_gradient, wide.sum(0)) < 1e-2


def test_the_weight_gradient_compiles() -> None:
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(96, 160, device="cuda")), torch.randn(74, 160, device="cuda").bfloat16()
    cast = weight.detach().bfloat16()
    compiled = torch.compile(products.linear, fullgraph=True, dynamic=False)
    found, expected = (
        torch.autograd.grad(function(x, weight, None, cast).square().sum(), weight)[0]
        for function in (compiled, products.linear)
    )
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01 * expected.abs().max().item())


def step(model: model_setup.DistributedModel) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of three microbatches."""
    generator = torch.Generator().manual_seed(0)
    batch = TensorBatch(*(torch.randint(3, 512, (6, n), generator=generator).cuda() for n in (96, 40, 40)))
    sums = model.forward_backward(batch, torch.tensor(1.0 / batch.labels.numel(), device="cuda"))
    model.finish_gradients()
    gradients = {p.name: p.parameter.grad.clone() for p in model.parameters}
    for p in model.parameters:
        p.parameter.grad = None
    return sums.sum().item(), gradients


@pytest.mark.parametrize("flags", ["", "--recompute-granularity full", "--compile"])
def test_steps_are_those_of_autograd_alone(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    """Between them weights change, and the copies with them."""
    config, context = parse_args(f"{MODEL} {flags}".split()).config, ParallelContext(torch.device("cuda", 0))
    build = partial(model_setup.DistributedModel, config, context, None, num_microbatches=3)
    ours = build()
    layers = [each for block in ours.stages[0].blocks for each in block.modules() if isinstance(each, Linear)]
    assert layers and all(each.cast is not None and each.cast.dtype == torch.bfloat16 for each in layers)
    monkeypatch.setattr(linear_products.gpu_linear, "DEVICES", ())
    plain = build()
    assert all(each.cast is None for each in plain.stages[0].modules() if isinstance(each, Linear))
    for _ in range(2):
        (loss, expected), (other_loss, found) = step(plain), step(ours)
        assert other_loss == pytest.approx(loss, rel=2e-3)
        for name, gradient in expected.items():
            assert relative_error(found[name], gradient.double()) < 0.03, name
        with torch.no_grad():
            for model in (plain, ours):
                for p in model.parameters:
                    p.parameter.sub_(0.1 * expected[p.name])
