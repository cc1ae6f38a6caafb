"""Attention on CPUs as one operator with a backward pass of its own.

Attention is one kernel that keeps scores in the cache, in fp32 (tiled_attention.cpp) and, on processors with matrix
tiles, in bf16 (amx_attention.cpp). Elsewhere, and with dropout, the products are torch's, and what lies between them is
one pass over the scores, in place (attention_kernels.cpp). A bias that depends on the distance of key and query stays a
vector throughout. Dropout keeps no mask: its random bits are a function of a seed and the place, and the backward pass
computes them again.

Shapes: b batch, n heads, q queries, k keys, s either, d channels of a head.
"""

from __future__ import annotations

import os
import re
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The kernels resolve OpenMP's symbols in the runtime that torch has loaded by now: one pool of threads, not two.
from megatron.core.extensions import amx_attention as amx
from megatron.core.extensions import attention_kernels as kernels
from megatron.core.extensions import tiled_attention
from megatron.core.extensions.attention import AttentionBackend, AttentionOptions, separate
from megatron.core.extensions.projections import (
    empty_gradients,
    fused_count,
    of_inputs,
    separate_gradients,
    with_equal_batches,
)
from megatron.core.extensions.score_bias import ScoreBias
from megatron.core.extensions.seeds import seed

# Whether kernels that work tile by tile are used where they can be.
USE_TILES = True
HAS_VECTORS = tiled_attention.available()
# What oneDNN is told to leave unused is left unused here, too; the default is everything.
HAS_AMX = amx.available() and re.search("AMX|DEFAULT", os.getenv("ONEDNN_MAX_CPU_ISA") or "DEFAULT", re.I) is not None
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LIBRARY = torch.library.Library("megatron_t5", "FRAGMENT")
LIBRARY.define(
    "attention(Tensor query, Tensor? key, Tensor? value, Tensor? diagonals, Tensor? mask, Tensor? seed, bool causal, "
    "float scale, float dropout, bool recompute) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor probabilities, "
    "Tensor statistics, Tensor? diagonals, Tensor? mask, Tensor? seed, bool causal, float scale, float dropout, "
    "int fused, bool diagonals_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "tiled_attention(Tensor query, Tensor? key, Tensor? value, Tensor? diagonals, Tensor? mask, bool causal, "
    "float scale) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "tiled_attention_backward(Tensor gradient, Tensor context, Tensor statistics, Tensor query, Tensor? key, "
    "Tensor? value, Tensor? diagonals, Tensor? mask, bool causal, float scale, bool diagonals_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attention` computes with tensors of this device and dtype."""
    return device.type == "cpu" and dtype in DTYPES


def _tile_kernels(dtype: torch.dtype, channels: int, dropout: float) -> ModuleType | None:
    """The kernels that take scores through softmax without writing them to memory, or None."""
    if not USE_TILES or dropout > 0.0:
        return None
    if dtype == torch.bfloat16 and channels % 32 == 0 and channels <= 256 and HAS_AMX:
        return amx
    if dtype == torch.float32 and channels % 16 == 0 and channels <= 256 and HAS_VECTORS:
        return tiled_attention
    return None


def keeps_probabilities(dtype: torch.dtype, channels: int, dropout: float) -> bool:
    """Whether `attention` keeps probabilities for the backward pass unless it is asked to recompute them."""
    return _tile_kernels(dtype, channels, dropout) is None


def _check_projections(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Kernels read memory by these shapes and the dtype of the query."""
    batch, _, heads, channels = query.shape
    assert key.shape == value.shape == (batch, key.shape[1], heads, channels), (query.shape, key.shape, value.shape)
    assert query.dtype == key.dtype == value.dtype, (query.dtype, key.dtype, value.dtype)
    assert query.device == key.device == value.device, (query.device, key.device, value.device)


def attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    diagonals: Tensor | None,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float = 1.0,
    dropout: float = 0.0,
    recompute: bool = False,
    stream: int = 0,
) -> Tensor:
    """Softmax attention with an additive bias.

    Args:
        query: `[b, q, n, d]`, fp32 or bf16, any strides; or of query, key and value, `[b, s, n, 3, d]`. What comes
            as one tensor has one gradient, which nobody has to put together. A batch of 1 beside a larger one is
            expanded, here and below.
        key: `[b, k, n, d]`; of key and value, `[b, k, n, 2, d]`; None if `query` holds it.
        value: `[b, k, n, d]`; None if `query` or `key` holds it.
        diagonals: fp32 `[n, q + k - 1]`, added to the scores by ascending key - query, or None.
        mask: Added to the scores, `[b or 1, n or 1, q or 1, k]`, or None; gets no gradient.
        causal: Keys after the query get no probability, and their scores are never looked at.
        scale: Multiplies the scores.
        dropout: Share of the probabilities that is dropped, in steps of 2^-16.
        recompute: The backward pass computes the probabilities again: one product and one exponential of the scores.
            It always does where `keeps_probabilities` says no.
        stream: Tells ranks apart that draw the same seed and are to drop different places.

    Returns:
        `[b, q, n, d]`, contiguous.
    """
    assert value is None or key is not None
    assert supports(query.device, query.dtype), (query.device, query.dtype)
    assert mask is None or not mask.requires_grad, "a mask gets no gradient"
    query, key, value = with_equal_batches(query, key, value)
    _check_projections(*separate(query, key, value))
    context: Tensor
    if not keeps_probabilities(query.dtype, query.shape[-1], dropout):
        context = torch.ops.megatron_t5.tiled_attention(query, key, value, diagonals, mask, causal, scale)[0]
        return context
    drawn = seed(stream) if dropout > 0.0 else None
    inputs = (query, key, value, diagonals, mask, drawn, causal, scale, dropout, recompute)
    context = torch.ops.megatron_t5.attention(*inputs)[0]
    return context


class _Scores(NamedTuple):
    """Sizes of the scores `[b n, q, k]` and the kernels over them; tensors stay alive as long as their addresses."""

    rule: kernels.ScoreRule
    tensors: tuple[Tensor | None, ...]
    dtype: str
    dropped: bool

    @staticmethod
    def of(
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        diagonals: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        causal: bool,
        scale: float,
        dropout: float,
    ) -> _Scores:
        batch, heads, queries, keys = shape
        diagonals_address, mask_address, strides = 0, 0, (0, 0, 0)
        if diagonals is not None:
            assert diagonals.dtype == torch.float32 and diagonals.shape == (heads, queries + keys - 1), diagonals.shape
            diagonals = diagonals.contiguous()
            diagonals_address = diagonals.data_ptr()
        if mask is not None:
            assert mask.ndim == 4 and mask.shape[3] == keys, mask.shape
            assert all(size in (1, whole) for size, whole in zip(mask.shape, shape, strict=True)), (mask.shape, shape)
            mask = mask.float().contiguous()
            mask_address = mask.data_ptr()
            by_row, by_head, by_query, _ = (0 if mask.shape[axis] == 1 else mask.stride(axis) for axis in range(4))
            strides = (by_row, by_head, by_query)
        assert (seed is not None) == (dropout > 0.0)
        drawn = 0 if seed is None else int(seed)
        rule = kernels.ScoreRule(
            batch, heads, queries, keys, causal, scale, diagonals_address, mask_address, *strides, drawn, dropout
        )
        return _Scores(rule, (diagonals, mask), DTYPES[dtype], dropout > 0.0)

    def softmax_(self, scores: Tensor, statistics: Tensor, known: bool, dropped: Tensor | None = None) -> None:
        """Scores to probabilities, in place; see attention_kernels.pyi."""
        address = 0 if dropped is None else dropped.data_ptr()
        threads = torch.get_num_threads()
        kernels.softmax(self.rule, self.dtype, scores.data_ptr(), address, statistics.data_ptr(), known, threads)

    def after_dropout(self, probabilities: Tensor) -> Tensor:
        """The probabilities that multiply the values."""
        if not self.dropped:
            return probabilities
        dropped = torch.empty_like(probabilities)
        threads = torch.get_num_threads()
        kernels.dropout(self.rule, self.dtype, probabilities.data_ptr(), dropped.data_ptr(), threads)
        return dropped

    def softmax_backward_(self, probabilities: Tensor, gradients: Tensor, diagonals: Tensor | None) -> None:
        """Gradients of probabilities to those of scores, in place."""
        address = 0 if diagonals is None else diagonals.data_ptr()
        threads = torch.get_num_threads()
        kernels.softmax_backward(
            self.rule, self.dtype, probabilities.data_ptr(), gradients.data_ptr(), address, threads
        )


def _copy_heads(source: Tensor, target: Tensor) -> None:
    """Copies between two layouts of `[b, s, n, d]`."""
    batch, positions, heads, channels = source.shape
    kernels.copy_heads(
        source.element_size(), source.data_ptr(), source.stride(), target.data_ptr(), target.stride(),
        batch, positions, heads, channels, torch.get_num_threads(),
    )  # fmt: skip


def _to_heads(tensor: Tensor) -> Tensor:
    """`[b, s, n, d]` to a contiguous `[b n, s, d]`: products of such are faster than of strided ones, copy included."""
    batch, positions, heads, channels = tensor.shape
    result = tensor.new_empty(batch, heads, positions, channels)
    _copy_heads(tensor, result.transpose(1, 2))
    return result.flatten(0, 1)


def _from_heads(tensor: Tensor, target: Tensor) -> None:
    """`[b n, s, d]` to `[b, s, n, d]`, any strides."""
    _copy_heads(tensor.unflatten(0, (target.shape[0], target.shape[2])).transpose(1, 2), target)


def _forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    diagonals: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    recompute: bool,
) -> tuple[Tensor, ...]:
    query, key, value = separate(query, key, value)
    _check_projections(query, key, value)
    batch, queries, heads, _ = query.shape
    context = query.new_empty(query.shape)
    shape = (batch, heads, queries, key.shape[1])
    rules = _Scores.of(shape, query.dtype, diagonals, mask, seed, causal, scale, dropout)
    query, key, value = _to_heads(query), _to_heads(key), _to_heads(value)
    scores = torch.bmm(query, key.transpose(1, 2))  # [b n, q, k]
    statistics = torch.empty(*scores.shape[:2], 2, dtype=torch.float32)
    dropped = torch.empty_like(scores) if dropout else None
    rules.softmax_(scores, statistics, known=False, dropped=dropped)
    _from_heads(torch.bmm(scores if dropped is None else dropped, value), context)
    return context, query, key, value, scores.new_empty(0) if recompute else scores, statistics


def _check_saved(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor, statistics: Tensor
) -> None:
    """Kernels read memory by the shape and dtype of the gradient and the number of keys."""
    (batch, queries, heads, channels), keys = gradient.shape, key.shape[1]
    items = batch * heads
    assert query.shape == (items, queries, channels) and statistics.shape == (items, queries, 2)
    assert key.shape == value.shape == (items, keys, channels)
    assert not probabilities.numel() or probabilities.shape == (items, queries, keys)
    assert all(tensor.dtype == gradient.dtype for tensor in (query, key, value, probabilities))
    assert statistics.dtype == torch.float32 and statistics.is_contiguous() and probabilities.is_contiguous()


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probabilities: Tensor,
    statistics: Tensor,
    diagonals: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    fused: int,
    diagonals_gradient: bool,
) -> tuple[Tensor, ...]:
    batch, queries, heads, _ = gradient.shape
    _check_saved(gradient, query, key, value, probabilities, statistics)
    gradients = empty_gradients(gradient, key.shape[1], fused)
    shape = (batch, heads, queries, key.shape[1])
    rules = _Scores.of(shape, gradient.dtype, diagonals, mask, seed, causal, scale, dropout)
    if not probabilities.numel():
        probabilities = torch.bmm(query, key.transpose(1, 2))
        rules.softmax_(probabilities, statistics, known=True)
    gradient = _to_heads(gradient)  # [b n, q, d]
    # The products that end in few columns, d, are slow if their first factor is transposed; these end in many, k.
    value_gradient = torch.bmm(gradient.transpose(1, 2), rules.after_dropout(probabilities))  # [b n, d, k]
    scores_gradient = torch.bmm(gradient, value.transpose(1, 2))  # [b n, q, k], of the probabilities at first
    sums = torch.empty(heads, queries + key.shape[1] - 1, dtype=torch.float32) if diagonals_gradient else None
    rules.softmax_backward_(probabilities, scores_gradient, sums)
    query_gradient = torch.bmm(scores_gradient, key)  # [b n, q, d]
    key_gradient = torch.bmm(query.transpose(1, 2), scores_gradient)  # [b n, d, k]
    by_head = (query_gradient, key_gradient.transpose(1, 2), value_gradient.transpose(1, 2))
    for tensor, target in zip(by_head, separate_gradients(gradients, fused), strict=True):
        _from_heads(tensor, target)
    return (*gradients, statistics.new_empty(0) if sums is None else sums)


def _fake_forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    diagonals: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    recompute: bool,
) -> tuple[Tensor, ...]:
    query, key, value = separate(query, key, value)
    batch, queries, heads, channels = query.shape
    keys = key.shape[1]
    by_head = (
        query.new_empty(batch * heads, queries, channels),
        query.new_empty(batch * heads, keys, channels),
        query.new_empty(batch * heads, keys, channels),
    )
    probabilities = query.new_empty(0) if recompute else query.new_empty(batch * heads, queries, keys)
    statistics = query.new_empty(batch * heads, queries, 2, dtype=torch.float32)
    return query.new_empty(query.shape), *by_head, probabilities, statistics


def _fake_backward(gradient: Tensor, query: Tensor, key: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    keys, (fused, diagonals_gradient) = key.shape[1], arguments[-2:]
    diagonals = (gradient.shape[2], gradient.shape[1] + keys - 1) if diagonals_gradient else (0,)
    return (*empty_gradients(gradient, keys, fused), gradient.new_empty(diagonals, dtype=torch.float32))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, key, value, diagonals, mask, seed, *options, _ = inputs
    ctx.save_for_backward(*output[1:], diagonals, mask, seed)
    ctx.options = (*options, fused_count(key, value))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 10
    wanted = ctx.needs_input_grad[3]
    result = torch.ops.megatron_t5.attention_backward(gradient, *ctx.saved_tensors, *ctx.options, wanted)
    return *of_inputs(result, ctx.options[-1]), result[3] if wanted else None, *(None,) * 6


LIBRARY.impl("attention", _forward, "CPU")
LIBRARY.impl("attention_backward", _backward, "CPU")
torch.library.register_fake("megatron_t5::attention", _fake_forward, lib=LIBRARY)
torch.library.register_fake("megatron_t5::attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("megatron_t5::attention", _differentiate, setup_context=_keep_for_backward, lib=LIBRARY)


def _adjacent_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _addresses(tensors: tuple[Tensor, ...]) -> tuple[list[int], list[tuple[int, ...]]]:
    return [tensor.data_ptr() for tensor in tensors], [tensor.stride() for tensor in tensors]


def _tiled_forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    diagonals: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    query, key, value = (_adjacent_channels(tensor) for tensor in separate(query, key, value))
    _check_projections(query, key, value)
    batch, queries, heads, channels = query.shape
    context = query.new_empty(query.shape)
    statistics = query.new_empty(batch * heads, queries, 2, dtype=torch.float32)
    shape = (batch, heads, queries, key.shape[1])
    rules = _Scores.of(shape, query.dtype, diagonals, mask, None, causal, scale, 0.0)
    addresses, strides = _addresses((query, key, value, context))
    tiles = _tile_kernels(query.dtype, channels, 0.0)
    assert tiles is not None
    tiles.forward(rules.rule, channels, addresses, strides, statistics.data_ptr(), torch.get_num_threads())
    return context, statistics


def _tiled_backward(
    gradient: Tensor,
    context: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    diagonals: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    diagonals_gradient: bool,
) -> tuple[Tensor, ...]:
    fused = fused_count(key, value)
    query, key, value = (_adjacent_channels(tensor) for tensor in separate(query, key, value))
    _check_projections(query, key, value)
    batch, queries, heads, channels = query.shape
    assert gradient.shape == context.shape == query.shape and gradient.dtype == context.dtype == query.dtype
    assert statistics.shape == (batch * heads, queries, 2) and statistics.dtype == torch.float32
    assert statistics.is_contiguous()
    gradients = empty_gradients(gradient, key.shape[1], fused)
    sums = statistics.new_empty((heads, queries + key.shape[1] - 1) if diagonals_gradient else 0)
    shape = (batch, heads, queries, key.shape[1])
    rules = _Scores.of(shape, query.dtype, diagonals, mask, None, causal, scale, 0.0)
    inputs = (_adjacent_channels(gradient), context, query, key, value)
    addresses, strides = _addresses((*inputs, *separate_gradients(gradients, fused)))
    statistics_address, sums_address = statistics.data_ptr(), sums.data_ptr() if diagonals_gradient else 0
    tiles = _tile_kernels(query.dtype, channels, 0.0)
    assert tiles is not None
    threads = torch.get_num_threads()
    tiles.backward(rules.rule, channels, addresses, strides, statistics_address, sums_address, threads)
    return *gradients, sums


def _fake_tiled_forward(query: Tensor, key: Tensor | None, value: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    query = separate(query, key, value)[0]
    batch, queries, heads = query.shape[:3]
    return query.new_empty(query.shape), query.new_empty(batch * heads, queries, 2, dtype=torch.float32)


def _fake_tiled_backward(
    gradient: Tensor,
    context: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    keys = separate(query, key, value)[1].shape[1]
    diagonals = (gradient.shape[2], gradient.shape[1] + keys - 1) if arguments[-1] else (0,)
    return *empty_gradients(gradient, keys, fused_count(key, value)), statistics.new_empty(diagonals)


def _keep_for_tiled_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, causal, scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.options = (causal, scale)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_tiled(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 7
    wanted, saved = ctx.needs_input_grad[3], ctx.saved_tensors  # which recomputation unpacks once
    result = torch.ops.megatron_t5.tiled_attention_backward(gradient, *saved, *ctx.options, wanted)
    key, value = saved[3:5]
    return *of_inputs(result, fused_count(key, value)), result[3] if wanted else None, *(None,) * 3


LIBRARY.impl("tiled_attention", _tiled_forward, "CPU")
LIBRARY.impl("tiled_attention_backward", _tiled_backward, "CPU")
torch.library.register_fake("megatron_t5::tiled_attention", _fake_tiled_forward, lib=LIBRARY)
torch.library.register_fake("megatron_t5::tiled_attention_backward", _fake_tiled_backward, lib=LIBRARY)
torch.library.register_autograd(
    "megatron_t5::tiled_attention", _differentiate_tiled, setup_context=_keep_for_tiled_backward, lib=LIBRARY
)


def _attend(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: ScoreBias, options: AttentionOptions
) -> Tensor:
    bias = bias.with_mask(torch.float32)
    diagonals = None if bias.diagonals is None else bias.diagonals.float()
    return attention(
        query, key, value, diagonals, bias.mask,
        causal=bias.causal, scale=options.scale, dropout=options.dropout, recompute=options.recompute,
        stream=options.stream,
    )  # fmt: skip


def _prepare(bias: ScoreBias, dtype: torch.dtype, device: torch.device) -> ScoreBias:
    return bias.with_mask(torch.float32)


BACKEND = AttentionBackend(
    name="cpu",
    attend=_attend,
    devices=("cpu",),
    dtypes=tuple(DTYPES),
    bias="vector",
    bias_gradient=True,
    segments="matrix",
    masks=True,
    dropout=True,
    deterministic=True,
    compiles=True,
    prepare=_prepare,
)
