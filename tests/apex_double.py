"""Stands in for NVIDIA's apex on CPUs: the same functions with the same arguments, their arithmetic in torch.

What the kernels would read as raw memory is checked: dtypes, contiguity, shapes.
"""

import importlib.util
import sys
from types import ModuleType

import torch

from megatron.core.extensions import apex


def multi_tensor_adam_capturable(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay, inv_scale
):
    assert chunk_size == 65536 and mode == 1 and bias_correction == 1
    assert [noop_flag.dtype, step.dtype, lr.dtype, inv_scale.dtype] == [torch.int32] * 2 + [torch.float32] * 2
    assert noop_flag.numel() == step.numel() == lr.numel() == inv_scale.numel() == 1
    assert len(tensor_lists) == 4 and len({len(each) for each in tensor_lists}) == 1 and tensor_lists[0]
    if noop_flag.item() == 1:
        return
    beta1, beta2 = (torch.tensor(beta, dtype=torch.float32).item() for beta in (beta1, beta2))
    for g, p, m, v in zip(*tensor_lists, strict=True):
        for tensor in (g, p, m, v):
            assert tensor.is_contiguous() and tensor.dtype == torch.float32 and tensor.numel() == g.numel()
        g.mul_(inv_scale)
        flat = g.view(-1)
        m.view(-1).mul_(beta1).add_(flat, alpha=1 - beta1)
        v.view(-1).mul_(beta2).addcmul_(flat, flat, value=1 - beta2)
        corrected, square = m.view(-1) / (1 - beta1 ** step.item()), v.view(-1) / (1 - beta2 ** step.item())
        update = corrected / (square.sqrt() + epsilon) + weight_decay * p.view(-1)
        p.view(-1).sub_(lr * update)


def rms_forward_affine(input, normalized_shape, gamma, epsilon):
    assert input.is_contiguous() and gamma.is_contiguous() and input.dtype == gamma.dtype
    assert list(normalized_shape) == list(gamma.shape) == [input.shape[-1]]
    x = input.float()
    invvar = (x.square().mean(-1) + epsilon).rsqrt()
    return (x * invvar[..., None]).to(gamma.dtype) * gamma, invvar.flatten()


def rms_backward_affine(dout, invvar, input_or_output, normalized_shape, gamma, epsilon, memory_efficient):
    assert dout.is_contiguous() and not memory_efficient
    x, scaled = input_or_output.float(), dout.float() * gamma.float()
    inverse = invvar.view(*x.shape[:-1], 1)
    normal = x * inverse
    grad_input = inverse * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    grad_gamma = (dout.float() * normal).flatten(0, -2).sum(0)
    return grad_input.to(input_or_output.dtype), grad_gamma.to(gamma.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, normalized_shape, eps):
        output, invvar = rms_forward_affine(x.contiguous(), normalized_shape, weight.contiguous(), eps)
        ctx.save_for_backward(x.contiguous(), weight.contiguous(), invvar)
        ctx.arguments = normalized_shape, eps
        return output

    @staticmethod
    def backward(ctx, gradient):
        x, weight, invvar = ctx.saved_tensors
        shape, eps = ctx.arguments
        return *rms_backward_affine(gradient.contiguous(), invvar, x, shape, weight, eps, False), None, None


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert not memory_efficient
    return _RMSNorm.apply(input, weight, normalized_shape, eps)


def wgrad_gemm_accum_fp32(input_2d, d_output_2d, d_weight):
    assert input_2d.is_contiguous() and d_output_2d.is_contiguous() and d_weight.is_contiguous()
    assert input_2d.dtype == d_output_2d.dtype and d_weight.dtype == torch.float32
    d_weight.addmm_(d_output_2d.float().T, input_2d.float())


def modules():
    """The modules by name; `apex` itself only where the real one is not installed."""
    doubles = {
        "amp_C": [multi_tensor_adam_capturable],
        "fused_layer_norm_cuda": [rms_forward_affine, rms_backward_affine],
        "fused_weight_gradient_mlp_cuda": [wgrad_gemm_accum_fp32],
    }
    if importlib.util.find_spec("apex") is None:
        doubles |= {
            "apex": [],
            "apex.normalization": [],
            "apex.normalization.fused_layer_norm": [fused_rms_norm_affine],
        }
    found = {}
    for name, functions in doubles.items():
        found[name] = ModuleType(name)
        for function in functions:
            setattr(found[name], function.__name__, function)
    if "apex" in found:
        found["apex"].normalization = found["apex.normalization"]
        found["apex.normalization"].fused_layer_norm = found["apex.normalization.fused_layer_norm"]
    return found


def install(set_item=dict.__setitem__, set_attribute=setattr):
    """Let `import amp_C` and the others find these, and the adapter run on the CPU; a test gives its monkeypatch's."""
    for name, module in modules().items():
        set_item(sys.modules, name, module)
    set_attribute(apex, "DEVICES", {"cpu", "cuda"})
    set_attribute(apex, "installed", lambda package: True)
