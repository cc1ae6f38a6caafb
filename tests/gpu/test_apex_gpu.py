"""apex's kernels on a GPU against torch's, where apex is installed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.core.extensions import apex, packages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(390, 144), (37,), (1, 5), (513, 257)]


@pytest.mark.skipif(not packages.installed("amp_C"), reason="apex is not installed")
def test_adam() -> None:
    """Six steps, with a divisor, one of them skipped although its gradients are not finite."""
    torch.manual_seed(0)
    start = [torch.randn(shape, device="cuda") for shape in SHAPES]
    ours = [[tensor.clone() for tensor in start], *([torch.zeros_like(t) for t in start] for _ in range(2))]
    theirs = [[tensor.clone() for tensor in tensors] for tensors in ours]
    count, divisor = torch.zeros((), device="cuda"), torch.tensor(3.0, device="cuda")
    for step in range(6):
        gradients = [torch.randn_like(tensor) for tensor in start]
        skip = torch.tensor(step == 3, device="cuda")
        if step == 3:
            gradients[0][0, 0] = torch.nan
        count += skip.logical_not()
        arguments = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.1}
        copies = [gradient.clone() for gradient in gradients]
        apex.adam(
            ours[0], copies, ours[1], ours[2], count, betas=(0.9, 0.999), divisor=divisor, skip=skip, **arguments
        )  # fmt: skip
        torch._fused_adamw_(
            theirs[0], gradients, theirs[1], theirs[2], [], [count] * len(start), beta1=0.9, beta2=0.999, amsgrad=False,
            maximize=False, grad_scale=divisor, found_inf=skip.float(), **arguments,
        )  # fmt: skip
    for own, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not packages.installed("fused_layer_norm_cuda"), reason="apex is not installed")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm(dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 50, 768, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn(768, device="cuda").requires_grad_()
    gradient = torch.randn(3, 50, 768, device="cuda", dtype=dtype)
    norm = torch.compile(apex.rms_norm, fullgraph=True) if compiled else apex.rms_norm
    result = norm(x, weight, 1e-6, dtype)
    found = (result, *torch.autograd.grad(result, (x, weight), gradient))
    exact = F.rms_norm(x.double(), (768,), eps=1e-6) * weight.double()
    expected = (exact, *torch.autograd.grad(exact, (x, weight), gradient.double()))
    bound = 1e-5 if dtype == torch.float32 else 0.01
    for value, other in zip(found, expected, strict=True):
        assert ((value.double() - other).norm() / other.norm()).item() < bound
