"""Self-attention of the encoder, self-attention of the decoder, cross-attention.

Shapes: b batch, s sequence (q queries, k keys where they differ), h hidden, n heads, d channels of a head; of several
tensor-parallel ranks, n is a rank's share of the heads. Blocks take and return s' (or t' of the decoder), a rank's part
of the sequence under sequence parallelism.

Fused projections keep the heads outermost in their rows, `(head, q|k|v, d)`, so that consecutive rows are whole heads
and a split of dimension 0 gives each rank its heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.extensions import cpu_attention
from megatron.core.tensor_parallel import ColumnParallelLinear, Linear, RowParallelLinear, TensorParallel
from megatron.core.transformer.attention_bias import ScoreBias
from megatron.core.transformer.initialization import matrix_init, residual_output_init
from megatron.core.transformer.precision import residual_dtype
from megatron.core.transformer.rotary import RotaryAngles, apply_rotary

# cuDNN's backward gives NaN gradients for unscaled scores with a bias at some lengths (pytorch issue 196678).
CUDA_SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


Backend: TypeAlias = Literal["cpu", "sdpa", "unfused"]

# Below, arranging all keys and values for the operator takes longer than attending to them: positions in generation.
FEW_QUERIES = 16


def choose_backend(given: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that `--attention-backend` means for activations of this device and dtype.

    Raises:
        UserError: `cpu` was given for something else than fp32 or bf16 on a CPU.
    """
    supported = cpu_attention.supports(device, dtype)
    if given == "auto":
        if supported:
            return "cpu"
        # On CPUs, torch's kernel gains less than its backward pass loses.
        return "unfused" if device.type == "cpu" and torch.is_grad_enabled() else "sdpa"
    if given == "cpu" and not supported:
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"--attention-backend cpu computes in fp32 and bf16 on CPUs, not {name} on {device}; use auto")
    return cast(Backend, given)


def unfused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    drop: Callable[[Tensor, float, bool], Tensor] = F.dropout,
) -> Tensor:
    """Attention as matrix products: `query` `[b, n, q, d]`, `key`, `value` `[b, n, k, d]` to `[b, n, q, d]`.

    `drop` is the function for dropout, `torch.nn.functional.dropout` or that of divided heads.
    torch's softmax accumulates in fp32 for bf16 scores, so no explicit cast is needed.
    """
    if scale != 1.0:
        query = query * scale
    scores = query @ key.transpose(-1, -2)  # [b, n, q, k]
    if bias is not None:
        scores += bias
    probabilities = drop(scores.softmax(dim=-1), dropout, dropout > 0.0)
    return probabilities @ value


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """The same by torch's scaled_dot_product_attention."""
    if query.is_cuda:
        with sdpa_kernel(CUDA_SDPA_BACKENDS):
            return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale)
    return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale)


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
        dropout = self.dropout if self.training else 0.0
        backend = choose_backend(self.backend, query.device, query.dtype)
        if self.backend == "auto" and query.shape[1] < FEW_QUERIES and not torch.is_grad_enabled():
            backend = "sdpa"
        if backend == "cpu":
            context = self._attend_on_cpu(query, key, value, bias, dropout)
        else:
            context = self._attend(backend, *cpu_attention.separate(query, key, value), bias, dropout)
        return self.o(context.flatten(2))  # [b, q, n, d] -> [b, q, n d] -> [b, q', h]

    def _attend_on_cpu(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, bias: ScoreBias, dropout: float
    ) -> Tensor:
        diagonals = None if bias.diagonals is None else bias.diagonals.float()
        return cpu_attention.attention(
            query, key, value, diagonals, bias.mask,
            causal=bias.causal, scale=self.scale, dropout=dropout, recompute=self.recompute,
            stream=self.tensor_parallel.dropout_stream,
        )  # fmt: skip

    def _attend(
        self, backend: Backend, query: Tensor, key: Tensor, value: Tensor, bias: ScoreBias, dropout: float
    ) -> Tensor:
        matrix = bias.dense(query.dtype, query.device)
        inputs = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), matrix, self.scale, dropout)
        if backend == "unfused":
            return self._run(unfused_attention, *inputs, self.tensor_parallel.dropout).transpose(1, 2)
        with self.tensor_parallel.split_dropout() if dropout else nullcontext():  # torch draws the mask
            return self._run(sdpa_attention, *inputs).transpose(1, 2)

    def _run(self, attention: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`attention(*inputs)`, computed again in the backward pass if asked for."""
        if not (self.recompute and torch.is_grad_enabled()):
            return attention(*inputs)
        has_dropout = self.training and self.dropout > 0.0
        result: Tensor = checkpoint(attention, *inputs, use_reentrant=False, preserve_rng_state=has_dropout)
        return result


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
