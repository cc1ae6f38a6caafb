"""Norms and gated activations over kernels, whichever they are: operators, their gradients, and the public functions.

`cpu_elementwise` and `triton_elementwise` have the kernels. Each defines the same operators by `define_operators`,
`torch.ops.megatron_t5.*` with a prefix of its own, and takes its functions from an `ElementwiseFunctions`.

Functions with a gradient are autograd functions over those operators, which torch.compile takes as they are. (An
operator with registered autograd does the same; a call of it takes about twice as long.) What a backward pass needs is
computed again from the inputs: no activation is kept but these, dropout keeps eight bytes.

In a backward pass an operator is found by its name, as a string is what torch.compile takes through an autograd
function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("megatron_t5", "FRAGMENT")


# Operators


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], keys: Sequence[str]) -> None:
    """Defines an operator of `torch.ops.megatron_t5`.

    Args:
        schema: Its name and what it takes and gives, in torch's language.
        kernel: Computes it.
        fake: Gives the shapes and dtypes of its results.
        keys: Of torch's dispatcher: the kinds of devices that it computes on.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    for key in keys:
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"megatron_t5::{name}", fake, lib=LIBRARY)


def rows_and_width(x: Tensor) -> tuple[int, int]:
    """Those of a tensor seen as a matrix."""
    return (x.numel() // x.shape[-1] if x.shape[-1] else 0), x.shape[-1]


def fake_gated(x: Tensor, activation: str) -> Tensor:
    """An empty result of `gated`."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _fake_rms_norm_gradient(
    more: Tensor | None, gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    branch_gradient = x.new_empty(0 if seed is None else x.shape)
    return x.new_empty(x.shape), branch_gradient, weight.new_empty(weight.shape, dtype=torch.float32)


def define_operators(
    prefix: str,
    keys: Sequence[str],
    *,
    gated: Callable[[Tensor, str], Tensor],
    gated_gradient: Callable[[Tensor, Tensor, str], Tensor],
    rms_norm: Callable[[Tensor, Tensor, float, torch.dtype], Tensor],
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]],
    rms_norm_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Defines the operators `torch.ops.megatron_t5.<prefix>gated` and so on, which take tensors of any strides.

    Args:
        prefix: Of their names.
        keys: As of `define`.
        gated: `[..., 2 f]` and `gelu` or `silu` to `[..., f]`.
        gated_gradient: That of its input, by the gradient of its result.
        rms_norm: Input, weight, epsilon and dtype of the result.
        add_rms_norm: The sum and its norm; the branch is dropped with probability p if there is a seed.
        rms_norm_gradient: Gradients of the norm's input, with `more` added; of the branch, which has no elements
            without a seed, as it is that of the input; and of the weight, in fp32.
    """
    define(f"{prefix}gated(Tensor x, str activation) -> Tensor", gated, fake_gated, keys)
    define(
        f"{prefix}gated_gradient(Tensor gradient, Tensor x, str activation) -> Tensor",
        gated_gradient,
        lambda gradient, x, activation: x.new_empty(x.shape),
        keys,
    )
    define(
        f"{prefix}rms_norm(Tensor x, Tensor weight, float epsilon, ScalarType dtype) -> Tensor",
        rms_norm,
        lambda x, weight, epsilon, dtype: x.new_empty(x.shape, dtype=dtype),
        keys,
    )
    define(
        f"{prefix}add_rms_norm(Tensor residual, Tensor branch, Tensor weight, float epsilon, ScalarType dtype, float p,"
        " Tensor? seed) -> (Tensor, Tensor)",
        add_rms_norm,
        lambda residual, branch, weight, epsilon, dtype, p, seed: (
            residual.new_empty(residual.shape),
            residual.new_empty(residual.shape, dtype=dtype),
        ),
        keys,
    )
    define(
        f"{prefix}rms_norm_gradient(Tensor? more, Tensor gradient, Tensor x, Tensor weight, float epsilon, float p,"
        " Tensor? seed) -> (Tensor, Tensor, Tensor)",
        rms_norm_gradient,
        _fake_rms_norm_gradient,
        keys,
    )


def _operator(prefix: str, name: str) -> Any:
    return getattr(torch.ops.megatron_t5, prefix + name)


# Autograd functions


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, prefix: str, x: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.prefix, ctx.activation = prefix, activation
        y: Tensor = _operator(prefix, "gated")(x, activation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, _operator(ctx.prefix, "gated_gradient")(gradient, *ctx.saved_tensors, ctx.activation), None


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, prefix: str, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.prefix, ctx.epsilon = prefix, epsilon
        y: Tensor = _operator(prefix, "rms_norm")(x, weight, epsilon, dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        operator = _operator(ctx.prefix, "rms_norm_gradient")
        x_gradient, _, weight_gradient = operator(None, gradient, x, weight, ctx.epsilon, 0.0, None)
        return None, x_gradient, weight_gradient.to(weight.dtype), None, None


class _RMSNormBeside(Function):
    """The norm and its input, whose two gradients are then one pass instead of two and a sum."""

    @staticmethod
    def forward(
        ctx: Any, prefix: str, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.prefix, ctx.epsilon = prefix, epsilon
        return x.view_as(x), _operator(prefix, "rms_norm")(x, weight, epsilon, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, also: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        operator = _operator(ctx.prefix, "rms_norm_gradient")
        x_gradient, _, weight_gradient = operator(also, gradient, x, weight, ctx.epsilon, 0.0, None)
        return None, x_gradient, weight_gradient.to(weight.dtype), None, None


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        prefix: str,
        residual: Tensor,
        branch: Tensor,
        weight: Tensor,
        epsilon: float,
        dtype: torch.dtype,
        p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        total, y = _operator(prefix, "add_rms_norm")(residual, branch, weight, epsilon, dtype, p, seed)
        ctx.save_for_backward(total, weight, seed)
        ctx.prefix, ctx.epsilon, ctx.p = prefix, epsilon, p
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_gradient: Tensor, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, seed = ctx.saved_tensors
        operator = _operator(ctx.prefix, "rms_norm_gradient")
        arguments = (total_gradient, y_gradient, total, weight, ctx.epsilon, ctx.p, seed)
        gradient, branch_gradient, weight_gradient = operator(*arguments)
        branch_gradient = gradient if seed is None else branch_gradient
        return None, gradient, branch_gradient, weight_gradient.to(weight.dtype), None, None, None, None


# Functions


def check_rows(logits: Tensor, labels: Tensor, *per_row: Tensor) -> None:
    """Asserts what kernels of the loss need: one number of each other tensor for every row of logits."""
    assert logits.ndim == 2 and logits.is_contiguous(), logits.shape
    assert labels.dtype == torch.int64
    for tensor in (labels, *per_row):
        assert tensor.shape == logits.shape[:1] and tensor.is_contiguous(), (tensor.shape, logits.shape)
    assert all(tensor.dtype == torch.float32 for tensor in per_row)


class ElementwiseFunctions:
    """Functions over the operators of a prefix.

    Args:
        prefix: As of `define_operators`.
        supports: Whether the operators take a tensor of its device and dtype.
        dtypes: What results of norms may be.
        draw_seed: Gives a new seed of dropout, int64 `[]`, to kernels on a device.
    """

    def __init__(
        self,
        prefix: str,
        supports: Callable[[Tensor], bool],
        dtypes: Collection[torch.dtype],
        draw_seed: Callable[[torch.device], Tensor],
    ) -> None:
        self.prefix = prefix
        self.supports = supports
        self.dtypes = dtypes
        self.draw_seed = draw_seed

    def gated_activation(self, x: Tensor, kind: str) -> Tensor:
        """`activation(gate) * up` where gate and up lie side by side.

        Args:
            x: `[..., 2 f]`, `(unit, gate|up)` along the last dimension.
            kind: `gated-gelu` (its tanh form) or `gated-silu`.

        Returns:
            `[..., f]`.
        """
        assert self.supports(x) and x.shape[-1] % 2 == 0, (x.device, x.dtype, x.shape)
        assert kind in ("gated-gelu", "gated-silu"), kind
        y: Tensor = _Gated.apply(self.prefix, x, kind.removeprefix("gated-"))
        return y

    def _check_norm(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        assert self.supports(x) and self.supports(weight) and dtype in self.dtypes, (x.dtype, weight.dtype, dtype)
        assert weight.shape == x.shape[-1:], (weight.shape, x.shape)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, output_dtype: torch.dtype | None = None) -> Tensor:
        """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension.

        Args:
            x: `[..., h]`.
            weight: `[h]`; its gradient is summed in fp32.
            epsilon: Added to the mean square.
            output_dtype: One that the kernels support; that of `x` if not given.
        """
        dtype = output_dtype or x.dtype
        self._check_norm(x, weight, dtype)
        y: Tensor = _RMSNorm.apply(self.prefix, x, weight, epsilon, dtype)
        return y

    def rms_norm_beside(
        self, x: Tensor, weight: Tensor, epsilon: float, output_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """`x` itself and `rms_norm(x, ...)`, for where both are used."""
        dtype = output_dtype or x.dtype
        self._check_norm(x, weight, dtype)
        both: tuple[Tensor, Tensor] = _RMSNormBeside.apply(self.prefix, x, weight, epsilon, dtype)
        return both

    def add_rms_norm(
        self,
        residual: Tensor,
        branch: Tensor,
        weight: Tensor,
        epsilon: float,
        output_dtype: torch.dtype | None = None,
        p: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """`total = residual + dropout(branch, p)` and `rms_norm(total, weight, epsilon, output_dtype)`.

        Args:
            residual: `[..., h]`.
            branch: Of the same shape and dtype.
            weight: As of `rms_norm`.
            epsilon: As of `rms_norm`.
            output_dtype: Dtype of the norm; that of `residual` if not given.
            p: Probability of dropout, in `[0, 1)`. Its seed is drawn from torch's default generator of the device, so
                that what restores its state for a recomputation drops the same; with 0 nothing is drawn.

        Returns:
            The sum, in the dtype of `residual`, and its norm; both `[..., h]`.
        """
        dtype = output_dtype or residual.dtype
        self._check_norm(residual, weight, dtype)
        assert branch.shape == residual.shape and branch.dtype == residual.dtype, (branch.shape, residual.shape)
        assert 0.0 <= p < 1.0, p
        seed = self.draw_seed(residual.device) if p > 0.0 else None
        both: tuple[Tensor, Tensor] = _AddRMSNorm.apply(self.prefix, residual, branch, weight, epsilon, dtype, p, seed)
        return both
