"""Attention as matrix products with the scores in memory: runs everywhere, and is what the others are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.extensions.attention import AttentionBackend, AttentionOptions, separate
from megatron.core.extensions.score_bias import ScoreBias


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


def _attend(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: ScoreBias, options: AttentionOptions
) -> Tensor:
    query, key, value = separate(query, key, value)
    matrix = bias.dense(query.dtype, query.device)
    inputs = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), matrix)
    return options.run(unfused_attention, *inputs, options.scale, options.dropout, options.drop).transpose(1, 2)


BACKEND = AttentionBackend(
    name="unfused",
    attend=_attend,
    devices=("cpu", "cuda", "meta"),
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    bias="matrix",
    bias_gradient=True,
    segments="matrix",
    masks=True,
    dropout=True,
    deterministic=True,
    compiles=True,
    prepare=ScoreBias.as_matrix,
)
