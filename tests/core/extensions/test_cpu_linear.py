"""Linear layers in bf16 on CPUs: products against float64, gradients in the dtype of the weight."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.extensions import cpu_linear
from megatron.core.extensions import linear_kernels as kernels
from megatron.core.tensor_parallel import products

SHAPES = [((1, 1), 1), ((7, 9), 5), ((2, 1024, 40), 24), ((3, 700, 64), 96), ((2049, 33), 17)]


def inputs(shape, outputs, weight_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(outputs, shape[-1], generator=generator).to(weight_dtype).requires_grad_()
    gradient = torch.randn(*shape[:-1], outputs, generator=generator).bfloat16()
    return x, weight, gradient


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 8, 8), (2, 64, 64), (3, 70, 133), (1, 7, 300), (2, 1000, 24)])
def test_transposition(size, threads):
    x = torch.arange(torch.Size(size).numel()).to(torch.int16).view(size)
    found = torch.empty(size[0], size[2], size[1], dtype=torch.int16)
    kernels.transpose(x.data_ptr(), found.data_ptr(), *size, threads)
    assert torch.equal(found, x.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sums_of_parts_are_rounded_once(count, dtype):
    parts = torch.randn(count, 40_001, generator=torch.Generator().manual_seed(count)).bfloat16()
    total = torch.empty(parts.shape[1], dtype=dtype)
    kernels.sum_parts(parts.data_ptr(), count, total.numel(), total.data_ptr(), dtype == torch.float32, 2)
    expected = parts[0].float()
    for part in parts[1:]:
        expected = expected + part
    assert torch.equal(total, expected.to(dtype))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_products_and_gradients(shape, outputs, weight_dtype):
    x, weight, gradient = inputs(shape, outputs, weight_dtype)
    product = cpu_linear.linear(x, weight)
    assert torch.equal(product, F.linear(x, weight.bfloat16()))
    product.backward(gradient)
    assert weight.grad.dtype == weight_dtype and x.grad.dtype == torch.bfloat16
    wide = gradient.flatten(0, -2).double(), x.detach().flatten(0, -2).double()
    assert relative_error(weight.grad, wide[0].T @ wide[1]) < 4e-3
    assert relative_error(x.grad.flatten(0, -2), wide[0] @ weight.detach().bfloat16().double()) < 4e-3


def test_what_needs_no_gradient_gets_none():
    x, weight, gradient = inputs((32, 48), 16)
    assert torch.autograd.grad(cpu_linear.linear(x.detach(), weight), weight, gradient)[0].shape == weight.shape
    assert torch.autograd.grad(cpu_linear.linear(x, weight.detach()), x, gradient)[0].shape == x.shape


@pytest.mark.parametrize("transposed", [False, True])
def test_any_strides_of_the_gradient(transposed):
    x, weight, gradient = inputs((64, 48), 16)
    strided = gradient.T.contiguous().T if transposed else gradient[:, :1].expand(64, 16)
    found = torch.autograd.grad(cpu_linear.linear(x, weight), weight, strided)[0]
    expected = torch.autograd.grad(cpu_linear.linear(x, weight), weight, strided.contiguous())[0]
    assert torch.equal(found, expected)


def test_operators_are_registered_as_torch_wants_them():
    x, weight, gradient = inputs((2, 24, 16), 40)
    torch.library.opcheck(torch.ops.megatron_t5.linear.default, (x, weight, weight.detach().bfloat16()))
    torch.library.opcheck(torch.ops.megatron_t5.linear_weight_gradient.default, (gradient, x.detach(), True))


def test_only_large_products_in_bf16_on_cpus(monkeypatch):
    x, weight, _ = inputs((1024, 256), 256)
    assert cpu_linear.supports(x, weight) and cpu_linear.supports(x, weight.bfloat16())
    assert not cpu_linear.supports(x.float(), weight) and not cpu_linear.supports(x[:8], weight)
    assert not cpu_linear.supports(x.to("meta"), weight)
    monkeypatch.setattr(cpu_linear, "linear", None)  # none of these calls it
    for each in (x.detach()[:8], x.float()):
        torch.testing.assert_close(products.linear(each, weight), F.linear(each, weight.to(each.dtype)))
    with torch.no_grad():
        products.linear(x, weight)


def test_a_gradient_put_off_equals_that_of_the_backward_pass():
    x, weight, gradient = inputs((1024, 256), 256, torch.bfloat16)
    expected = torch.autograd.grad(products.linear(x, weight), weight, gradient)[0]
    assert torch.equal(products.weight_gradient(gradient, x.detach()), expected)
