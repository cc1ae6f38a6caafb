"""torch's FlexAttention: the position bias stays a vector, and masks skip blocks of keys.

Its compiled kernel reads the bias where it is needed and adds up the vector's gradient by atomics, in another order
each time: two runs differ in the last bits. It drops no probabilities.

Shapes: b batch, n heads, q queries, k keys, s either, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron.core.extensions.attention import AttentionBackend, AttentionOptions, separate
from megatron.core.extensions.score_bias import ScoreBias

# Lengths are padded to multiples of its blocks: at others, its backward pass with a mask and a bias gave NaN (pytorch
# issue 153799).
BLOCK = 128
# For how many shapes a process compiles its kernel at most.
SHAPES = 256


class _Prepared(NamedTuple):
    """What a stack's layers share.

    Attributes:
        block_mask: Which keys are visible, or None for all.
        query_length: q, padded.
        key_length: k, padded.
    """

    block_mask: BlockMask | None
    query_length: int
    key_length: int


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _visible(bias: ScoreBias, query_padding: int, key_padding: int) -> Callable[..., Tensor] | None:
    """Which keys are visible as FlexAttention asks: by indices of batch, head, query and key. None: all of them."""
    rules: list[Callable[..., Tensor]] = []
    if bias.causal:
        rules.append(lambda row, head, i, j: j <= i)
    if bias.segments is not None:
        # The index of the row is always one of the batch, also where all rows share these ids.
        key_ids = F.pad(bias.segments.key, (0, key_padding))
        key_rows = int(key_ids.shape[0] > 1)
        if bias.segments.query is None:
            rules.append(lambda row, head, i, j: key_ids[row * key_rows, j] != 0)
        else:
            query_ids = F.pad(bias.segments.query, (0, query_padding))
            query_rows = int(query_ids.shape[0] > 1)
            rules.append(
                lambda row, head, i, j: (
                    (query_ids[row * query_rows, i] == key_ids[row * key_rows, j]) & (key_ids[row * key_rows, j] != 0)
                )
            )
    elif key_padding:
        keys = bias.key_length
        rules.append(lambda row, head, i, j: j < keys)
    if len(rules) < 2:
        return rules[0] if rules else None
    first, second = rules
    return lambda row, head, i, j: first(row, head, i, j) & second(row, head, i, j)


def _prepare(bias: ScoreBias, dtype: torch.dtype, device: torch.device) -> ScoreBias:
    """Finds the blocks of keys that a block of queries sees."""
    assert bias.mask is None, "masks are segments here"
    queries, keys = _padded(bias.query_length), _padded(bias.key_length)
    visible = _visible(bias, queries - bias.query_length, keys - bias.key_length)
    block_mask = None
    if visible is not None:
        tensors = () if bias.segments is None else bias.segments
        rows = max((tensor.shape[0] for tensor in tensors if tensor is not None), default=1)
        block_mask = create_block_mask(visible, rows, None, queries, keys, device=device, BLOCK_SIZE=BLOCK)
    return bias._replace(prepared=_Prepared(block_mask, queries, keys))


@cache
def _compiled() -> Callable[..., Any]:
    """Its fused kernel. Exceeding torch's limit of shapes is an error: uncompiled, it writes matrices of all scores.

    torch's own limit is 8 for the whole process; training and evaluation have three shapes each, and other sizes of
    batches as many more. The keyword of torch.compile for it is not in all releases.
    """
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    with_limit: Callable[..., Any] = torch._dynamo.config.patch(recompile_limit=SHAPES)(compiled)
    return with_limit


def _attend(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: ScoreBias, options: AttentionOptions
) -> Tensor:
    assert options.dropout == 0.0, "refused by the registry"
    query, key, value = separate(query, key, value)
    prepared = bias.prepared or _prepare(bias, query.dtype, query.device).prepared
    block_mask, queries, keys = prepared
    inputs = [
        F.pad(tensor, (0, 0, 0, 0, 0, length - tensor.shape[1])).transpose(1, 2)  # [b, n, s, d]
        for tensor, length in ((query, queries), (key, keys), (value, keys))
    ]
    add_bias = None
    if bias.diagonals is not None:  # put in after `_prepare` where each layer has a table of its own
        padding = (queries - bias.query_length, keys - bias.key_length)
        diagonals = F.pad(bias.diagonals.float(), padding).contiguous()

        def add_bias(score: Tensor, row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + diagonals[head, j - i + (queries - 1)]

    # On CPUs it is for tests, and computes with matrices of all scores.
    attention: Any = _compiled() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    context: Tensor = attention(*inputs, score_mod=add_bias, block_mask=block_mask, scale=options.scale)
    return context.transpose(1, 2)[:, : query.shape[1]]  # [b, q, n, d]


BACKEND = AttentionBackend(
    name="flex",
    attend=_attend,
    devices=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    bias="vector",
    bias_gradient=True,
    segments="ids",
    masks=False,
    dropout=False,
    deterministic=False,
    compiles=True,
    head_dims=(16, 256),
    prepare=_prepare,
)
