"""Self-attention of the encoder, self-attention of the decoder, cross-attention.

Shapes: b batch, s sequence (q queries, k keys where they differ), h hidden, n heads, d channels of a head; of several
tensor-parallel ranks, n is a rank's share of the heads. Blocks take and return s' (or t' of the decoder), a rank's part
of the sequence under sequence parallelism.

Fused projections keep the heads outermost in their rows, `(head, q|k|v, d)`, so that consecutive rows are whole heads
and a split of dimension 0 gives each rank its heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.extensions import sdpa_attention
from megatron.core.extensions.attention import (
    AttentionBackend,
    AttentionOptions,
    AttentionRequest,
    choose_attention,
)
from megatron.core.extensions.score_bias import ScoreBias
from megatron.core.tensor_parallel import ColumnParallelLinear, Linear, RowParallelLinear, TensorParallel
from megatron.core.transformer.initialization import matrix_init, residual_output_init
from megatron.core.transformer.precision import residual_dtype
from megatron.core.transformer.rotary import RotaryAngles, apply_rotary

# Below, arranging all keys and values for the operator takes longer than attending to them: positions in generation.
FEW_QUERIES = 16


class Attention(nn.Module):
    """What the three kinds of attention share: the attention itself and the output projection.

    Args:
        config: Sizes and options.
        compute: Backend and recomputation.
        num_layers: Layers of the stack this belongs to, for the initialisation of the output projection.
        tensor_parallel: The ranks, which divide the heads.
    """

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, num_layers: int, tensor_parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.num_heads = config.num_attention_heads // tensor_parallel.size
        self.head_dim = config.kv_channels
        self.scale = self.head_dim**-0.5 if config.scale_attention_scores else 1.0
        self.dropout = config.attention_dropout
        self.backend = compute.attention_backend
        self.recompute = compute.recompute_granularity == "selective"
        self.o = RowParallelLinear(
            config.inner_size,
            config.hidden_size,
            axes=("embed", "heads"),
            init=residual_output_init(config, config.inner_size**-0.5, num_layers),
            bias=config.add_bias_linear,
            tensor_parallel=tensor_parallel,
            output_dtype=residual_dtype(compute),
        )

    def attend(self, query: Tensor, key: Tensor | None, value: Tensor | None, bias: ScoreBias) -> Tensor:
        """`query` `[b, q, n, d]`, `key`, `value` `[b, k, n, d]`, `bias` of scores `[b, n, q, k]`: `[b, q', h]`.

        Of a fused projection, `query` is `[b, s, n, 3, d]` or `key` `[b, k, n, 2, d]` and what they hold is None.
        """
        parallel = self.tensor_parallel
        options = AttentionOptions(
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            recompute=self.recompute,
            stream=parallel.dropout_stream,
            drop=parallel.dropout,
            draws=parallel.split_dropout,
        )
        context = self._backend(query, bias).attend(query, key, value, bias, options)
        return self.o(context.flatten(2))  # [b, q, n, d] -> [b, q, n d] -> [b, q', h]

    def _backend(self, query: Tensor, bias: ScoreBias) -> AttentionBackend:
        """That for which the stack has prepared the bias, or for a bias of other origin the one that suits."""
        if self.backend == "auto" and query.shape[1] < FEW_QUERIES and not torch.is_grad_enabled():
            return sdpa_attention.BACKEND
        if bias.backend is not None:
            return bias.backend
        request = AttentionRequest(
            query.device,
            query.dtype,
            self.head_dim,
            has_diagonals=bias.diagonals is not None,
            has_segments=bias.segments is not None,
            has_mask=bias.mask is not None,
            causal=bias.causal,
            dropout=self.dropout if self.training else 0.0,
            training=torch.is_grad_enabled(),
        )
        return choose_attention(self.backend, request)


def _projection(
    config: ModelConfig, names: tuple[str, ...], tensor_parallel: TensorParallel, linear: type[Linear]
) -> Linear:
    """Fused projection to the logical matrices `names`, rows `(head, name, d)`.

    T5X folds the 1 / sqrt(d) of scaled attention into the initial query projection; when the scores are scaled
    explicitly, the query starts like the others and the first scores are the same.
    """
    hidden, head_dim = config.hidden_size, config.kv_channels
    query_std = hidden**-0.5 if config.scale_attention_scores else (hidden * head_dim) ** -0.5
    stds = {"q": query_std, "k": hidden**-0.5, "v": hidden**-0.5}
    return linear(
        hidden,
        len(names) * config.inner_size,
        axes=("heads", "embed"),
        init=matrix_init(config, *(stds[name] for name in names)),
        matrices=names,
        block=head_dim,
        bias=config.add_bias_linear,
        tensor_parallel=tensor_parallel,
    )


class _SelfAttention(Attention):
    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, num_layers: int, tensor_parallel: TensorParallel
    ) -> None:
        super().__init__(config, compute, num_layers, tensor_parallel)
        self.qkv = _projection(config, ("q", "k", "v"), tensor_parallel, ColumnParallelLinear)

    def forward(self, hidden: Tensor, bias: ScoreBias, rotary: RotaryAngles | None) -> Tensor:
        """`hidden` `[b, s', h]` to `[b, s', h]`; `bias` carries every mask."""
        fused = self.qkv(hidden).unflatten(-1, (self.num_heads, 3, self.head_dim))  # [b, s, n, 3, d]
        if rotary is None:
            return self.attend(fused, None, None, bias)
        query, key, value = fused.unbind(-2)
        return self.attend(apply_rotary(query, rotary), apply_rotary(key, rotary), value, bias)


class EncoderSelfAttention(_SelfAttention):
    """Bidirectional self-attention; every token sees every token that the bias leaves visible."""


class DecoderSelfAttention(_SelfAttention):
    """Causal self-attention; the causal mask is part of the bias."""

    def step(
        self, hidden: Tensor, cache: Tensor, position: int, bias: ScoreBias, rotary: RotaryAngles | None
    ) -> Tensor:
        """Attention of one position to itself and those before: `hidden` `[b, m, h]`, m beams of a row, to the same.

        Args:
            hidden: Beams of a row in place of positions.
            cache: Keys and values `[2, b, n, slots, d]`, slot `position * m + beam`; this position's are written.
            position: Number of positions before.
            bias: Of scores `[b, n, m, slots so far]`; hides what belongs to other beams.
            rotary: Angles of this position alone.
        """
        batch, beams, _ = hidden.shape
        fused = self.qkv(hidden).view(batch, beams, self.num_heads, 3, self.head_dim)
        if rotary is not None:
            query_key = fused[..., :2, :]
            query_key.copy_(apply_rotary(query_key.flatten(2, 3), rotary).view_as(query_key))
        cache.narrow(3, position * beams, beams).copy_(fused.narrow(3, 1, 2).permute(3, 0, 2, 1, 4))
        key, value = cache.narrow(3, 0, (position + 1) * beams).transpose(2, 3).unbind()
        return self.attend(fused.select(3, 0), key, value, bias)


class CrossAttention(Attention):
    """Attention of decoder positions to the encoder output; T5 gives it no position information."""

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, num_layers: int, tensor_parallel: TensorParallel
    ) -> None:
        super().__init__(config, compute, num_layers, tensor_parallel)
        self.q = _projection(config, ("q",), tensor_parallel, ColumnParallelLinear)
        # The stack has brought the encoder output to the ranks, once for all layers (`TensorParallel.enter`).
        self.kv = _projection(config, ("k", "v"), tensor_parallel, Linear)

    def forward(self, hidden: Tensor, encoder_output: Tensor, bias: ScoreBias) -> Tensor:
        """`hidden` `[b, t', h]` and `encoder_output` `[b, s, h]`, whole on every rank, to `[b, t', h]`."""
        return self.attend_to(hidden, self._fused_keys_values(encoder_output), None, bias)

    def _fused_keys_values(self, encoder_output: Tensor) -> Tensor:
        fused: Tensor = self.kv(encoder_output).unflatten(-1, (self.num_heads, 2, self.head_dim))
        return fused  # [b, s, n, 2, d]

    def keys_values(self, encoder_output: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[b, s, n, d]` of the encoder output `[b, s, h]`."""
        key, value = self._fused_keys_values(encoder_output).unbind(-2)
        return key, value

    def attend_to(self, hidden: Tensor, key: Tensor, value: Tensor | None, bias: ScoreBias) -> Tensor:
        """`hidden` `[b, t', h]` to `[b, t', h]` with the results of `keys_values`; fused, `value` is None."""
        query = self.q(hidden).unflatten(-1, (self.num_heads, self.head_dim))  # [b, t, n, d]
        return self.attend(query, key, value, bias)
