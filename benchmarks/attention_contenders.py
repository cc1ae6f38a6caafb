"""What `attention.py` compares: ways to compute attention with a T5 position bias, and without one.

Shapes: b batch, n heads, s sequence, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.core.extensions.attention import AttentionOptions
from megatron.core.extensions.score_bias import ScoreBias
from megatron.core.transformer.relative_position_bias import relative_position_bucket

BUCKETS, MAX_DISTANCE = 32, 128
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Shape:
    """Self-attention of `batch` rows; scores are not scaled, as in T5."""

    batch: int
    heads: int
    length: int
    channels: int
    causal: bool
    dtype: torch.dtype = torch.bfloat16

    def flops(self, backward: bool) -> float:
        """Of the two products of the forward pass, and with it the five of the backward pass; half of them if causal.

        Products that a kernel repeats do not count.
        """
        product = 2 * self.batch * self.heads * self.length**2 * self.channels
        return (7 if backward else 2) * product * (0.5 if self.causal else 1.0)

    def described(self) -> dict[str, Any]:
        """For rows."""
        names = ("batch", "heads", "length", "channels", "causal")
        return {name: getattr(self, name) for name in names} | {"dtype": str(self.dtype).removeprefix("torch.")}


class Inputs(NamedTuple):
    """Arguments and incoming gradient of one call.

    Attributes:
        projections: Query, key and value, each `[b, s, n, d]`, and leaves of the graph.
        gradient: Of the output, `[b, s, n, d]`.
    """

    projections: tuple[Tensor, Tensor, Tensor]
    gradient: Tensor


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Normal numbers whose scores have a standard deviation of about 1."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.length, shape.heads, shape.channels)
    tensors = [torch.randn(size, device=device, generator=generator) for _ in range(4)]
    tensors[0] *= shape.channels**-0.5
    query, key, value, gradient = (tensor.to(shape.dtype) for tensor in tensors)
    return Inputs((query.requires_grad_(), key.requires_grad_(), value.requires_grad_()), gradient)


def buckets(shape: Shape, device: torch.device) -> Tensor:
    """Bucket of each diagonal of the scores, `[2 s - 1]`."""
    distances = torch.arange(1 - shape.length, shape.length, device=device)
    return relative_position_bucket(
        distances, bidirectional=not shape.causal, num_buckets=BUCKETS, max_distance=MAX_DISTANCE
    )


def make_diagonals(shape: Shape, device: torch.device) -> Tensor:
    """A bias of each head and distance, fp32 `[n, 2 s - 1]`, a leaf of the graph."""
    generator = torch.Generator(device).manual_seed(1)
    table = torch.randn(shape.heads, BUCKETS, device=device, generator=generator)
    return table[:, buckets(shape, device)].contiguous().requires_grad_()


def _as_matrix(shape: Shape, diagonals: Tensor) -> Tensor:
    """The bias of each score `[1, n, s, s]`, keys after a query hidden if asked for; a leaf of the graph."""
    bias = ScoreBias(shape.length, shape.length, diagonals.detach(), causal=shape.causal)
    matrix = bias.dense(shape.dtype, diagonals.device)
    assert matrix is not None
    return matrix.contiguous().requires_grad_()


class Contender(NamedTuple):
    """A way to compute attention.

    Attributes:
        title: For tables.
        has_bias: Whether it adds the position bias and gives it a gradient.
        make_bias: Diagonals to what it takes as the bias, a leaf of the graph.
        build: What computes a shape.
    """

    title: str
    has_bias: bool
    make_bias: Callable[[Shape, Tensor], Tensor]
    build: Callable[[Shape, torch.device], Attend]


def _keep(shape: Shape, diagonals: Tensor) -> Tensor:
    return diagonals


def _triton(shape: Shape, device: torch.device) -> Attend:
    from megatron.core.extensions.triton_attention import attention

    def attend(query: Tensor, key: Tensor, value: Tensor, diagonals: Tensor | None) -> Tensor:
        beyond = None if diagonals is None else MAX_DISTANCE
        result: Tensor = attention(
            query, key, value, diagonals, None, None, causal=shape.causal, constant_beyond=beyond
        )
        return result

    return attend


def _sdpa(backend: SDPBackend) -> Callable[[Shape, torch.device], Attend]:
    """torch's scaled_dot_product_attention by one of its kernels; on CPUs by the one that there is."""

    def build(shape: Shape, device: torch.device) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor, matrix: Tensor | None) -> Tensor:
            only: AbstractContextManager[Any] = sdpa_kernel(backend) if query.is_cuda else nullcontext()
            query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
            causal = shape.causal and matrix is None
            with only:
                context = F.scaled_dot_product_attention(query, key, value, matrix, is_causal=causal, scale=1.0)
            return context.transpose(1, 2)

        return attend

    return build


def _flex(shape: Shape, device: torch.device) -> Attend:
    from megatron.core.extensions.flex_attention import BACKEND

    options = AttentionOptions(1.0, 0.0, False, 0, F.dropout, nullcontext)
    bias = BACKEND.prepare(ScoreBias(shape.length, shape.length, causal=shape.causal), shape.dtype, device)

    def attend(query: Tensor, key: Tensor, value: Tensor, diagonals: Tensor | None) -> Tensor:
        return BACKEND.attend(query, key, value, bias._replace(diagonals=diagonals), options)  # layers share the mask

    return attend


CONTENDERS = {
    "triton": Contender("ours", True, _keep, _triton),
    "sdpa": Contender("SDPA, dense bias", True, _as_matrix, _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    "flex": Contender("FlexAttention", True, _keep, _flex),
    "triton_without_bias": Contender("ours, no bias", False, _keep, _triton),
    "flash": Contender("flash SDPA, no bias", False, _keep, _sdpa(SDPBackend.FLASH_ATTENTION)),
}


class Problem:
    """A contender's shape with everything that its calls need.

    Args:
        name: Of the contender.
        shape: What it computes.
        inputs: Arguments of calls, which take turns so that no cache holds them.
        diagonals: The bias.
    """

    def __init__(self, name: str, shape: Shape, inputs: list[Inputs], diagonals: Tensor) -> None:
        self.name, self.shape, self.inputs = name, shape, inputs
        self.contender = CONTENDERS[name]
        self.bias = self.contender.make_bias(shape, diagonals) if self.contender.has_bias else None
        self.attend = self.contender.build(shape, diagonals.device)

    def forward(self, inputs: Inputs) -> Tensor:
        """The output `[b, s, n, d]`, with nothing kept for a backward pass."""
        with torch.no_grad():
            return self.attend(*inputs.projections, self.bias)

    def forward_backward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The output, and the gradients of query, key, value, and of the bias as the contender takes it."""
        wanted = inputs.projections if self.bias is None else (*inputs.projections, self.bias)
        output = self.attend(*inputs.projections, self.bias)
        return output.detach(), *torch.autograd.grad(output, wanted, inputs.gradient)

    def table_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of the bias as the contender takes it to that of the bucket table, float64 `[n, buckets]`."""
        gradient, length = gradient.double(), self.shape.length
        of_diagonal = buckets(self.shape, gradient.device)
        if gradient.dim() == 4:
            positions = torch.arange(length, device=gradient.device)
            of_score = of_diagonal[positions - positions[:, None] + length - 1]
            gradient, of_diagonal = gradient[0].flatten(1), of_score.flatten()
        table = gradient.new_zeros(self.shape.heads, BUCKETS)
        return table.index_add_(1, of_diagonal, gradient)


def reference(shape: Shape, inputs: Inputs, diagonals: Tensor | None) -> tuple[Tensor, ...]:
    """Output and gradients of query, key, value and bucket table in float64, of the first row of the batch."""
    query, key, value = (tensor[:1].detach().double().transpose(1, 2).requires_grad_() for tensor in inputs.projections)
    positions = torch.arange(shape.length, device=query.device)
    distances = positions - positions[:, None]
    scores = query @ key.transpose(-1, -2)  # [1, n, s, s]
    wanted = [query, key, value]
    if diagonals is not None:
        of_diagonal = buckets(shape, query.device)
        table = diagonals.new_zeros(shape.heads, BUCKETS, dtype=torch.float64)
        table[:, of_diagonal] = diagonals.detach().double()
        table.requires_grad_()
        scores = scores + table[:, of_diagonal][:, distances + shape.length - 1]
        wanted.append(table)
    if shape.causal:
        scores = scores.masked_fill(distances > 0, -torch.inf)
    output = scores.softmax(-1) @ value
    gradient = inputs.gradient[:1].double().transpose(1, 2)
    results = (output.detach(), *torch.autograd.grad(output, wanted, gradient))
    return (*(result.transpose(1, 2) for result in results[:4]), *results[4:])


def errors(problem: Problem, diagonals: Tensor) -> dict[str, float]:
    """Relative errors (2-norm) of output and gradients against float64.

    Only the first row of the batch gets an incoming gradient, so that the reference needs no other.
    """
    inputs = problem.inputs[0]
    gradient = inputs.gradient.clone()
    gradient[1:] = 0.0
    inputs = inputs._replace(gradient=gradient)
    results = list(problem.forward_backward(inputs))
    found = [result[:1] for result in results[:4]]
    if problem.bias is not None:
        found.append(problem.table_gradient(results[4]))
    expected = reference(problem.shape, inputs, None if problem.bias is None else diagonals)
    names = ("output", "query", "key", "value", "bias")
    return {
        name: float((one.double() - other).norm() / other.norm())
        for name, one, other in zip(names, found, expected, strict=False)
    }
