"""Encoder and decoder layer: pre-norm sub-layers, each added to the residual stream after dropout.

Shapes: b batch, s encoder length, t decoder length, h hidden, n heads of this rank; s' and t' this rank's parts of the
sequences under sequence parallelism, else s and t.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.extensions.score_bias import ScoreBias
from megatron.core.tensor_parallel import TensorParallel
from megatron.core.transformer.attention import CrossAttention, DecoderSelfAttention, EncoderSelfAttention
from megatron.core.transformer.elementwise import add_dropout
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.norm import build_norm
from megatron.core.transformer.relative_position_bias import RelativePositionBias
from megatron.core.transformer.rotary import RotaryAngles


class _Layer(nn.Module):
    """What both layers share: the dropout rate, and in UMT5 (Chung et al. 2023) a bias table of their own."""

    def __init__(self, config: ModelConfig, *, bidirectional: bool) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.relative_attention_bias: RelativePositionBias | None = None
        if config.relative_attention_bias_per_layer:
            self.relative_attention_bias = RelativePositionBias(config, bidirectional=bidirectional)

    def own_bias(self, bias: ScoreBias) -> ScoreBias:
        """The stack's `bias`, with the bias of this layer's own table if it has one."""
        own = self.relative_attention_bias
        if own is None:
            return bias
        diagonals = own(bias.query_length, bias.key_length)
        return bias._replace(diagonals=diagonals, constant_beyond=own.constant_beyond)


class EncoderLayer(_Layer):
    """Self-attention and feed-forward."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__(config, bidirectional=True)
        self.self_attention_norm = build_norm(config, compute)
        self.self_attention = EncoderSelfAttention(config, compute, config.encoder_num_layers, tensor_parallel)
        self.mlp_norm = build_norm(config, compute)
        self.mlp = MLP(config, compute, config.encoder_num_layers, tensor_parallel)

    def forward(self, hidden: Tensor, bias: ScoreBias, rotary: RotaryAngles | None) -> Tensor:
        """`hidden` `[b, s', h]` to `[b, s', h]`; `bias` is that of its scores `[b, n, s, s]`."""
        p = self.dropout if self.training else 0.0
        hidden, normed = self.self_attention_norm.beside(hidden)
        attended = self.self_attention(normed, self.own_bias(bias), rotary)
        hidden, normed = self.mlp_norm.add(hidden, attended, p)
        return add_dropout(hidden, self.mlp(normed), p)


class DecoderLayer(_Layer):
    """Causal self-attention, cross-attention to the encoder output, feed-forward."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__(config, bidirectional=False)
        self.self_attention_norm = build_norm(config, compute)
        self.self_attention = DecoderSelfAttention(config, compute, config.decoder_num_layers, tensor_parallel)
        self.cross_attention_norm = build_norm(config, compute)
        self.cross_attention = CrossAttention(config, compute, config.decoder_num_layers, tensor_parallel)
        self.mlp_norm = build_norm(config, compute)
        self.mlp = MLP(config, compute, config.decoder_num_layers, tensor_parallel)

    def forward(
        self,
        hidden: Tensor,
        encoder_output: Tensor,
        bias: ScoreBias,
        cross_bias: ScoreBias,
        rotary: RotaryAngles | None,
    ) -> Tensor:
        """`hidden` `[b, t', h]` and `encoder_output` `[b, s, h]`, whole on every rank, to `[b, t', h]`.

        `bias` is that of the scores `[b, n, t, t]` and hides future keys, `cross_bias` that of `[b, n, t, s]`.
        """
        p = self.dropout if self.training else 0.0
        hidden, normed = self.self_attention_norm.beside(hidden)
        attended = self.self_attention(normed, self.own_bias(bias), rotary)
        hidden, normed = self.cross_attention_norm.add(hidden, attended, p)
        attended = self.cross_attention(normed, encoder_output, cross_bias)
        hidden, normed = self.mlp_norm.add(hidden, attended, p)
        return add_dropout(hidden, self.mlp(normed), p)

    def step(
        self,
        hidden: Tensor,
        cache: Tensor,
        position: int,
        bias: ScoreBias,
        rotary: RotaryAngles | None,
        cross_keys_values: tuple[Tensor, Tensor],
        cross_bias: ScoreBias,
    ) -> Tensor:
        """One position of generation, without dropout: `hidden` `[b, m, h]`, m beams of a row, to the same.

        `cache`, `position`, `bias` and `rotary` are those of `DecoderSelfAttention.step`; `bias` has the bias of this
        layer's own table. `cross_keys_values` are of `CrossAttention.keys_values`.
        """
        hidden = hidden + self.self_attention.step(self.self_attention_norm(hidden), cache, position, bias, rotary)
        normed = self.cross_attention_norm(hidden)
        hidden = hidden + self.cross_attention.attend_to(normed, *cross_keys_values, cross_bias)
        return hidden + self.mlp(self.mlp_norm(hidden))
