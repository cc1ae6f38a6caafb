"""Linear layers in bf16 on CPUs: the products are torch's, put to oneDNN in the form in which it is fast.

The weight's gradient, `gradient^T x`, has a transposed left factor, at which oneDNN's bf16 products run at half their
speed, and over thousands of rows they lose more. So the narrower of the two is transposed here, in pieces of at most
`PIECE_ROWS` rows whose products are summed in fp32, and the fp32 gradient of a master weight needs no cast of its own.
Each product is rounded to bf16 before that sum: where signs are random this is as exact as one bf16 product, where
pieces cancel it is less.

Shapes: r rows, i input features, o output features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The kernels resolve OpenMP's symbols in the runtime that torch has loaded by now: one pool of threads, not two.
from megatron.core.extensions import linear_kernels as kernels

PIECE_ROWS = 1024  # of the sum that a product is cut into
# Below, what is gained in a product does not pay for the calls.
LEAST_OPERATIONS = 1 << 26

LIBRARY = torch.library.Library("megatron_t5", "FRAGMENT")
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor cast) -> Tensor")
LIBRARY.define("linear_weight_gradient(Tensor gradient, Tensor x, bool to_float) -> Tensor")


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these, and is worth it."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and weight.dtype in (torch.bfloat16, torch.float32)
        and x.numel() * len(weight) >= LEAST_OPERATIONS
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` in bf16.

    Args:
        x: bf16 `[..., i]`.
        weight: `[o, i]`, bf16 or an fp32 master weight, whose gradient is then fp32.

    Returns:
        bf16 `[..., o]`.
    """
    product: Tensor = torch.ops.megatron_t5.linear(x, weight, weight.detach().to(x.dtype))
    return product


def weight_gradient(gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient^T x` of bf16 `[..., o]` and `[..., i]`: `[o, i]`, fp32 or bf16."""
    result: Tensor = torch.ops.megatron_t5.linear_weight_gradient(gradient, x, dtype == torch.float32)
    return result


def _pieces(rows: int) -> int:
    """Into how many equal pieces rows are cut: the fewest that are small enough, if there is such a divisor."""
    least = -(-rows // PIECE_ROWS)
    return next((count for count in range(least, 2 * least + 1) if rows % count == 0), 1)


def _weight_gradient(gradient: Tensor, x: Tensor, to_float: bool) -> Tensor:
    gradient, x = gradient.contiguous().flatten(0, -2), x.contiguous().flatten(0, -2)
    outputs, inputs, threads = gradient.shape[1], x.shape[1], torch.get_num_threads()
    # The narrower factor is the one to transpose. If that is x, the product is the transpose of the gradient.
    by_inputs = inputs < outputs
    product = _transposed_product(x, gradient) if by_inputs else _transposed_product(gradient, x)  # [pieces, _, _]
    total = gradient.new_empty(outputs, inputs, dtype=torch.float32 if to_float else gradient.dtype)
    parts, target, count = product.data_ptr(), total.data_ptr(), len(product)
    if by_inputs:
        kernels.sum_parts_transposed(parts, count, inputs, outputs, target, to_float, threads)
    else:
        kernels.sum_parts(parts, count, total.numel(), target, to_float, threads)
    return total


def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """Parts of `left^T right` that are to be summed, `[pieces, m, n]`, of `[r, m]` and `[r, n]`."""
    (rows, width), count = left.shape, _pieces(len(left))
    transposed = left.new_empty(count, width, rows // count)
    kernels.transpose(
        left.data_ptr(), transposed.data_ptr(), count, rows // count, width, torch.get_num_threads()
    )  # fmt: skip
    return torch.bmm(transposed, right.view(count, -1, right.shape[1]))


def _fake_weight_gradient(gradient: Tensor, x: Tensor, to_float: bool) -> Tensor:
    dtype = torch.float32 if to_float else gradient.dtype
    return gradient.new_empty(gradient.shape[-1], x.shape[-1], dtype=dtype)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, weight, cast = inputs
    ctx.save_for_backward(x, cast)
    ctx.to_float = weight.dtype == torch.float32


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, cast = ctx.saved_tensors
    x_gradient = gradient @ cast if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return x_gradient, None, None
    return x_gradient, torch.ops.megatron_t5.linear_weight_gradient(gradient, x, ctx.to_float), None


LIBRARY.impl("linear", lambda x, weight, cast: F.linear(x, cast), "CPU")
LIBRARY.impl("linear_weight_gradient", _weight_gradient, "CPU")
torch.library.register_fake(
    "megatron_t5::linear", lambda x, weight, cast: x.new_empty(*x.shape[:-1], len(weight)), lib=LIBRARY
)
torch.library.register_fake("megatron_t5::linear_weight_gradient", _fake_weight_gradient, lib=LIBRARY)
torch.library.register_autograd("megatron_t5::linear", _differentiate, setup_context=_keep_for_backward, lib=LIBRARY)
