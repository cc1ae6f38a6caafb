"""The matrix products of a training step of T5 alone, the floor under its time.

The list follows from the model's formulas and from nothing that an implementation does: each product of the forward
pass, and in the backward pass one for each of its factors. Projections that read the same input are one product. What
they work on lies as is natural, and so as the libraries like it: activations row by row, weights [out, in], heads one
after the other; a transposed factor is a view. Layers share their buffers, which flatters the floor a little.

Shapes: b rows, s encoder tokens, t decoder tokens, n heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.config import ModelConfig


@dataclass(frozen=True)
class Product:
    """`[batch, m, k]` times `[batch, k, n]`; a batch of 1 is a plain product.

    Attributes:
        batch: Independent products.
        m: Rows of the result.
        k: Numbers that are summed for each of its entries.
        n: Columns of the result.
        left_transposed: Whether the left factor lies as `[k, m]`.
        right_transposed: Whether the right factor lies as `[n, k]`.
    """

    batch: int
    m: int
    k: int
    n: int
    left_transposed: bool = False
    right_transposed: bool = False

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.m * self.k * self.n


def linear(tokens: int, width_in: int, width_out: int) -> list[Product]:
    """A linear layer: result, gradient of the input, gradient of the weight `[out, in]`."""
    return [
        Product(1, tokens, width_in, width_out, right_transposed=True),
        Product(1, tokens, width_out, width_in),
        Product(1, width_out, tokens, width_in, left_transposed=True),
    ]


def attention(heads: int, queries: int, keys: int, width: int) -> list[Product]:
    """Scores and sums of values, then the gradients of probabilities, values, queries and keys."""
    return [
        Product(heads, queries, width, keys, right_transposed=True),
        Product(heads, queries, keys, width),
        Product(heads, queries, width, keys, right_transposed=True),
        Product(heads, keys, queries, width, left_transposed=True),
        Product(heads, queries, keys, width),
        Product(heads, keys, queries, width, left_transposed=True),
    ]


def step_products(config: ModelConfig, rows: int, encoder_length: int, decoder_length: int) -> list[Product]:
    """All products of a forward and backward pass over `rows` rows."""
    hidden, inner, width = config.hidden_size, config.inner_size, config.kv_channels
    heads, s, t = rows * config.num_attention_heads, encoder_length, decoder_length
    inner_units = (2 if config.gated else 1) * config.ffn_hidden_size

    def self_attention(length: int) -> list[Product]:
        tokens = rows * length
        return [
            *linear(tokens, hidden, 3 * inner),
            *attention(heads, length, length, width),
            *linear(tokens, inner, hidden),
        ]

    def feed_forward(length: int) -> list[Product]:
        tokens = rows * length
        return linear(tokens, hidden, inner_units) + linear(tokens, config.ffn_hidden_size, hidden)

    cross_attention = [
        *linear(rows * t, hidden, inner),
        *linear(rows * s, hidden, 2 * inner),
        *attention(heads, t, s, width),
        *linear(rows * t, inner, hidden),
    ]
    return [
        *(self_attention(s) + feed_forward(s)) * config.encoder_num_layers,
        *(self_attention(t) + cross_attention + feed_forward(t)) * config.decoder_num_layers,
        *linear(rows * t, hidden, config.padded_vocab_size),
    ]


class Floor:
    """Makes the products of a step one after the other, into buffers that are there already."""

    def __init__(self, products: list[Product], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.calls = [self._call(product) for product in products]

    def _factor(self, place: str, batch: int, rows: int, columns: int, transposed: bool = False) -> Tensor:
        """A matrix, or one of each of `batch`."""
        lying = (columns, rows) if transposed else (rows, columns)
        shape = lying if batch == 1 else (batch, *lying)
        if (place, shape) not in self.buffers:
            self.buffers[place, shape] = torch.randn(shape, device=self.device).to(self.dtype)
        buffer = self.buffers[place, shape]
        return buffer.mT if transposed else buffer

    def _call(self, p: Product) -> tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]:
        left = self._factor("left", p.batch, p.m, p.k, p.left_transposed)
        right = self._factor("right", p.batch, p.k, p.n, p.right_transposed)
        return torch.mm if p.batch == 1 else torch.bmm, left, right, self._factor("result", p.batch, p.m, p.n)

    def step(self) -> None:
        """All products once."""
        for multiply, left, right, result in self.calls:
            multiply(left, right, out=result)
