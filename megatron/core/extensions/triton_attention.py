"""Attention on GPUs, in Triton: a bias that depends on the distance of key and query stays a vector throughout.

The forward pass gathers the bias from the vector; the backward pass sums its gradient along diagonals, always in the
same order, with nothing as large as the scores in between. Beyond a distance from which the bias is constant, tiles
need one number. Tiles that segments or a causal mask hide are skipped.

Triton's interpreter runs the same kernels on CPUs, for tests: TRITON_INTERPRET=1 in the environment, before Triton is
imported.

Shapes: b batch, n heads, q queries, k keys, s either, d channels of a head.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.core.extensions.attention import AttentionBackend, AttentionOptions, AttentionRequest, separate
from megatron.core.extensions.projections import (
    empty_gradients,
    fused_count,
    of_inputs,
    separate_gradients,
    with_equal_batches,
)
from megatron.core.extensions.score_bias import ScoreBias
from megatron.core.extensions.triton_attention_tiles import Tile, Tiles, choose_tiles, padded
from megatron.core.extensions.triton_interpreter import INTERPRETED, repair_interpreter

LOG2_E = math.log2(math.e)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (16, 256)
LIBRARY = torch.library.Library("megatron_t5", "FRAGMENT")
LIBRARY.define(
    "triton_attention(Tensor query, Tensor? key, Tensor? value, Tensor? diagonals, Tensor? query_segments, "
    "Tensor? key_segments, Tensor? seed, bool causal, float scale, int? constant_beyond, float dropout) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "triton_attention_backward(Tensor gradient, Tensor context, Tensor statistics, Tensor query, Tensor? key, "
    "Tensor? value, Tensor? diagonals, Tensor? query_segments, Tensor? key_segments, Tensor? seed, bool causal, "
    "float scale, int? constant_beyond, float dropout, bool diagonals_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)


# Programs that share the near tiles' sums, enough to fill any GPU of today.
BIAS_PROGRAMS = 2048
# Workspace of the sums a diagonal of tiles may take at any length, in splits.
FREE_SPLITS = 8
SUMMED_DIAGONALS = 128
SCANNED_SEGMENTS = 512


class Launch(NamedTuple):
    """A kernel, its grid, its arguments in order, and what Triton is told by name: constants, warps, stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    meta: dict[str, Any]

    def run(self) -> None:
        """Launches on the current stream of the current device."""
        if INTERPRETED:
            repair_interpreter()
        self.kernel[self.grid](*self.arguments, **self.meta)


class Problem(NamedTuple):
    """What all kernels of a call share; `diagonals` are in powers of two."""

    query: Tensor
    key: Tensor
    value: Tensor
    diagonals: Tensor | None
    query_segments: Tensor | None
    key_segments: Tensor | None
    seed: Tensor | None
    causal: bool
    scale: float
    constant_beyond: int | None
    dropout: float
    tiles: Tiles

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        diagonals: Tensor | None,
        query_segments: Tensor | None,
        key_segments: Tensor | None,
        seed: Tensor | None,
        causal: bool,
        scale: float,
        constant_beyond: int | None,
        dropout: float,
        tiles: Tiles | None = None,
    ) -> Problem:
        """Of the operator's inputs; `tiles` None: those for the device."""
        query, key, value = (_adjacent_channels(tensor) for tensor in separate(query, key, value))
        _check(query, key, value, diagonals, query_segments, key_segments)
        if diagonals is not None:
            diagonals = diagonals.contiguous() * LOG2_E
        query_ids, key_ids = (None if ids is None else ids.contiguous() for ids in (query_segments, key_segments))
        if tiles is None:
            capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
            tiles = choose_tiles(capability, query.shape[-1], query.element_size())
        options = (causal, scale, constant_beyond, dropout, tiles)
        return Problem(query, key, value, diagonals, query_ids, key_ids, seed, *options)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """b, n, q, k, d."""
        batch, queries, heads, channels = self.query.shape
        return batch, heads, queries, self.key.shape[1], channels

    @property
    def far(self) -> bool:
        """Whether the bias of far tiles is one number."""
        return self.diagonals is not None and self.constant_beyond is not None

    @property
    def product_scale(self) -> float:
        """Takes products to scores in powers of two."""
        return self.scale * LOG2_E

    def segment_strides(self) -> tuple[int, int]:
        """From row to row of the batch, of the ids of queries and of keys."""
        ids = (self.query_segments, self.key_segments)
        query, key = (0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0) for tensor in ids)
        return query, key

    def dropout_numbers(self) -> tuple[int, float]:
        """The bound of 31 random bits from which a probability is kept, and what kept ones are multiplied by."""
        return _kept_from(self.dropout), 1.0 / (1.0 - self.dropout)

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Constants that all kernels over tiles take, and how they are launched."""
        channels = self.query.shape[-1]
        # Follows torch's older ways to set it, too, whose getter is an error after this one was set.
        exact = self.query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        return {
            "FAR": self.far,
            "CAUSAL": self.causal,
            "SEGMENTS": 0 if self.key_segments is None else 1 if self.query_segments is None else 2,
            "DROPOUT": self.dropout > 0.0,
            "HEAD_DIM": channels,
            "WIDTH": padded(channels),
            "PRECISION": "ieee" if exact else "tf32",
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def _kept_from(dropout: float) -> int:
    return round(dropout * 2**31)


def _adjacent_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of each `[b, s, n, d]`, from row to row of the batch, position to position and head to head."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    diagonals: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
) -> None:
    """Kernels read memory by these shapes."""
    batch, queries, heads, channels = query.shape
    keys = key.shape[1]
    assert key.shape == value.shape == (batch, keys, heads, channels), (query.shape, key.shape, value.shape)
    assert queries and keys and HEAD_DIMS[0] <= channels <= HEAD_DIMS[1], (query.shape, key.shape)
    assert query.dtype == key.dtype == value.dtype and query.dtype in DTYPES, (query.dtype, key.dtype, value.dtype)
    if diagonals is not None:
        assert diagonals.dtype == torch.float32 and diagonals.shape == (heads, queries + keys - 1), diagonals.shape
    for ids, length in ((query_segments, queries), (key_segments, keys)):
        assert ids is None or (ids.dtype == torch.int32 and ids.shape in ((batch, length), (1, length))), ids
    assert query_segments is None or key_segments is not None
    tensors = (key, value, diagonals, query_segments, key_segments)
    assert all(tensor is None or tensor.device == query.device for tensor in tensors)


def forward_launch(problem: Problem, context: Tensor, statistics: Tensor) -> Launch:
    """Of the forward pass, into `context` `[b, q, n, d]` and `statistics` fp32 `[b, n, q]`, both contiguous."""
    from megatron.core.extensions.triton_attention_kernels import attention_forward

    batch, heads, queries, keys, _ = problem.sizes
    tile = problem.tiles.forward
    tiles = -(-queries // tile.rows)
    arguments = (
        problem.query, problem.key, problem.value, context, statistics, problem.diagonals, problem.query_segments,
        problem.key_segments, problem.seed, *_strides(problem.query, problem.key, problem.value),
        *problem.segment_strides(), heads, queries, keys, tiles, problem.product_scale, problem.constant_beyond or 0,
        *problem.dropout_numbers(),
    )  # fmt: skip
    constants = {
        "BIAS": problem.diagonals is not None,
        "RAGGED": keys % tile.columns != 0,
        "M": tile.rows,
        "N": tile.columns,
        "SCAN": SCANNED_SEGMENTS,
    }
    return Launch(attention_forward, (tiles * batch * heads,), arguments, problem.constants(tile) | constants)


def query_gradient_launch(
    problem: Problem,
    gradient: Tensor,
    context: Tensor,
    statistics: Tensor,
    delta: Tensor,
    target: Tensor,
    far_sums: Tensor | None,
) -> Launch:
    """Of the gradient of queries, into `target` `[b, q, n, d]`.

    Also writes `delta` fp32 `[b, n, q]`, which the other gradients need, and `far_sums` fp32 `[2, n, b tiles]`.
    """
    from megatron.core.extensions.triton_attention_gradients import attention_query_gradient

    batch, heads, queries, keys, _ = problem.sizes
    tile = problem.tiles.queries
    tiles = -(-queries // tile.rows)
    arguments = (
        gradient, context, statistics, delta, problem.query, problem.key, problem.value, target, far_sums,
        problem.diagonals, problem.query_segments, problem.key_segments, problem.seed,
        *_strides(gradient, problem.query, problem.key, problem.value, target), *problem.segment_strides(),
        batch, heads, queries, keys, tiles, problem.scale, problem.product_scale, problem.constant_beyond or 0,
        *problem.dropout_numbers(),
    )  # fmt: skip
    constants = {
        "BIAS": problem.diagonals is not None,
        "FAR_SUMS": far_sums is not None,
        "RAGGED": keys % tile.columns != 0,
        "M": tile.rows,
        "N": tile.columns,
        "SCAN": SCANNED_SEGMENTS,
    }
    return Launch(attention_query_gradient, (tiles * batch * heads,), arguments, problem.constants(tile) | constants)


def key_gradient_launch(
    problem: Problem, gradient: Tensor, statistics: Tensor, delta: Tensor, key_target: Tensor, value_target: Tensor
) -> Launch:
    """Of the gradients of keys and values, into the targets `[b, k, n, d]`."""
    from megatron.core.extensions.triton_attention_gradients import attention_key_gradient

    batch, heads, queries, keys, _ = problem.sizes
    tile = problem.tiles.keys
    tiles = -(-keys // tile.columns)
    arguments = (
        gradient, statistics, delta, problem.query, problem.key, problem.value, key_target, value_target,
        problem.diagonals, problem.query_segments, problem.key_segments, problem.seed,
        *_strides(gradient, problem.query, problem.key, problem.value, key_target, value_target),
        *problem.segment_strides(), heads, queries, keys, tiles, problem.scale, problem.product_scale,
        problem.constant_beyond or 0, *problem.dropout_numbers(),
    )  # fmt: skip
    constants = {
        "BIAS": problem.diagonals is not None,
        "M": tile.rows,
        "N": tile.columns,
        "SCAN": SCANNED_SEGMENTS,
    }
    return Launch(attention_key_gradient, (tiles * batch * heads,), arguments, problem.constants(tile) | constants)


class BiasSums(NamedTuple):
    """How near tiles' sums are divided: diagonals of square tiles from `first` on, each among `splits` programs."""

    side: int
    first: int
    diagonals: int
    splits: int

    @staticmethod
    def of(problem: Problem) -> BiasSums:
        """From shapes and the device's tiles only."""
        batch, heads, queries, keys, _ = problem.sizes
        side, rows = problem.tiles.bias.rows, problem.tiles.queries.rows
        assert side == problem.tiles.bias.columns == problem.tiles.queries.columns and rows % side == 0, problem.tiles
        row_tiles, column_tiles = -(-queries // side), -(-keys // side)
        first, last = 1 - row_tiles, 0 if problem.causal else column_tiles - 1
        if problem.constant_beyond is not None:  # the rest is far from whole tiles of the queries' gradient
            reach = problem.constant_beyond + rows - 2
            first, last = max(first, -(reach // side)), min(last, reach // side)
        count = last - first + 1
        most = max(FREE_SPLITS, queries * keys // (64 * count * 2 * side))
        wanted = -(-BIAS_PROGRAMS // (heads * count))
        splits = max(1, min(most, wanted, batch * min(row_tiles, column_tiles)))
        numbers = heads * count * splits * 2 * side
        assert numbers <= max(heads * queries * keys // 64, heads * FREE_SPLITS * count * 2 * side), numbers
        return BiasSums(side, first, count, splits)

    def shape(self, heads: int) -> tuple[int, int, int, int]:
        """Of the workspace."""
        return heads, self.diagonals, self.splits, 2 * self.side


def bias_gradient_launch(
    problem: Problem, sums: BiasSums, gradient: Tensor, statistics: Tensor, delta: Tensor, partial_sums: Tensor
) -> Launch:
    """Of the first pass over near tiles, into `partial_sums` of the shape that `sums` has."""
    from megatron.core.extensions.triton_attention_gradients import attention_bias_gradient

    batch, heads, queries, keys, _ = problem.sizes
    tile = problem.tiles.bias
    arguments = (
        gradient, statistics, delta, problem.query, problem.key, problem.value, partial_sums,
        problem.diagonals, problem.query_segments, problem.key_segments, problem.seed,
        *_strides(gradient, problem.query, problem.key, problem.value), *problem.segment_strides(),
        batch, heads, queries, keys, sums.first, sums.diagonals, sums.splits, problem.product_scale,
        problem.constant_beyond or 0, *problem.dropout_numbers(),
    )  # fmt: skip
    constants = {"RAGGED": keys % tile.columns != 0, "T": tile.columns, "M": problem.tiles.queries.rows}
    grid = (heads * sums.diagonals * sums.splits,)
    return Launch(attention_bias_gradient, grid, arguments, problem.constants(tile) | constants)


def sum_launch(
    problem: Problem, sums: BiasSums, partial_sums: Tensor, far_sums: Tensor | None, result: Tensor
) -> Launch:
    """Of the second pass, into `result` fp32 `[n, q + k - 1]`."""
    from megatron.core.extensions.triton_attention_gradients import sum_diagonals

    heads, length = result.shape
    blocks = -(-length // SUMMED_DIAGONALS)
    row_tiles = 0 if far_sums is None else far_sums.shape[2]
    arguments = (
        partial_sums, far_sums, result, heads, problem.query.shape[1], problem.key.shape[1],
        sums.first, sums.diagonals, sums.splits, blocks, row_tiles,
    )  # fmt: skip
    meta = {"T": sums.side, "BLOCK": SUMMED_DIAGONALS, "FAR": far_sums is not None}
    return Launch(sum_diagonals, (heads * blocks,), arguments, meta)


def _on_device(tensor: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def _forward(query: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    problem = Problem.of(query, *inputs)
    batch, heads, queries, _, channels = problem.sizes
    context = query.new_empty(batch, queries, heads, channels)
    statistics = query.new_empty(batch, heads, queries, dtype=torch.float32)
    with _on_device(query):
        forward_launch(problem, context, statistics).run()
    return context, statistics


def _backward(
    gradient: Tensor,
    context: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, diagonals_gradient = inputs
    problem = Problem.of(query, key, value, *rest)
    batch, heads, queries, keys, _ = problem.sizes
    gradient, context = _adjacent_channels(gradient), context.contiguous()
    assert gradient.shape == context.shape == problem.query.shape and gradient.dtype == problem.query.dtype
    assert statistics.shape == (batch, heads, queries) and statistics.is_contiguous()
    count = fused_count(key, value)
    gradients = empty_gradients(gradient, keys, count)
    query_target, key_target, value_target = separate_gradients(gradients, count)
    delta = torch.empty_like(statistics)
    far_sums = None
    if diagonals_gradient and problem.far:
        far_sums = statistics.new_empty(2, heads, batch * -(-queries // problem.tiles.queries.rows))
    result = statistics.new_empty((heads, queries + keys - 1) if diagonals_gradient else 0)
    with _on_device(query):
        query_gradient_launch(problem, gradient, context, statistics, delta, query_target, far_sums).run()
        key_gradient_launch(problem, gradient, statistics, delta, key_target, value_target).run()
        if diagonals_gradient:
            sums = BiasSums.of(problem)
            partial_sums = statistics.new_empty(sums.shape(heads))
            bias_gradient_launch(problem, sums, gradient, statistics, delta, partial_sums).run()
            sum_launch(problem, sums, partial_sums, far_sums, result).run()
    return *gradients, result


def _fake_forward(query: Tensor, key: Tensor | None, value: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    query = separate(query, key, value)[0]
    batch, queries, heads, channels = query.shape
    context = query.new_empty(batch, queries, heads, channels)
    return context, query.new_empty(batch, heads, queries, dtype=torch.float32)


def _fake_backward(
    gradient: Tensor,
    context: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys = separate(query, key, value)[1].shape[1]
    diagonals = (gradient.shape[2], gradient.shape[1] + keys - 1) if inputs[-1] else (0,)
    return *empty_gradients(gradient, keys, fused_count(key, value)), statistics.new_empty(diagonals)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 11
    wanted, saved = ctx.needs_input_grad[3], ctx.saved_tensors  # which recomputation unpacks once
    result = torch.ops.megatron_t5.triton_attention_backward(gradient, *saved, *ctx.options, wanted)
    key, value = saved[3:5]
    return *of_inputs(result, fused_count(key, value)), result[3] if wanted else None, *(None,) * 7


def _refuse_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError("attention in Triton has no second derivative; use --attention-backend unfused")


for _device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
    LIBRARY.impl("triton_attention", _forward, _device)
    LIBRARY.impl("triton_attention_backward", _backward, _device)
torch.library.register_fake("megatron_t5::triton_attention", _fake_forward, lib=LIBRARY)
torch.library.register_fake("megatron_t5::triton_attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "megatron_t5::triton_attention", _differentiate, setup_context=_keep_for_backward, lib=LIBRARY
)
torch.library.register_autograd("megatron_t5::triton_attention_backward", _refuse_second_derivative, lib=LIBRARY)


def attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    diagonals: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    *,
    causal: bool,
    scale: float = 1.0,
    constant_beyond: int | None = None,
    dropout: float = 0.0,
    stream: int = 0,
) -> Tensor:
    """Softmax attention with a bias by distance.

    Args:
        query: `[b, q, n, d]`, fp32, bf16 or fp16, any strides, d from 16 to 256; or of query, key and value,
            `[b, s, n, 3, d]`. A batch of 1 beside a larger one is expanded, here and below.
        key: `[b, k, n, d]`; of key and value, `[b, k, n, 2, d]`; None if `query` holds it.
        value: `[b, k, n, d]`; None if `query` or `key` holds it.
        diagonals: fp32 `[n, q + k - 1]`, added to the scores by ascending key - query, or None.
        query_segments: int32 `[b or 1, q]`, >= 0, or None. A query sees the keys of its own segment; of segment 0
            it sees none, and its result and gradient are 0. None: it sees every key whose segment is not 0.
        key_segments: int32 `[b or 1, k]`, or None if `query_segments` is: every key is visible.
        causal: Keys after the query are hidden.
        scale: Multiplies the scores.
        constant_beyond: All `diagonals` of distances >= this are equal, and so are all of distances <= its negative;
            None if that is not known. Given it, **the gradient of `diagonals` is that of what they were looked up
            from, not of each**: what belongs to far tiles of a side is one sum, on the outermost diagonal of that side.
            Indexing sends it where the other far ones go.
        dropout: Share of the probabilities that is dropped.
        stream: Tells ranks apart that draw the same seed and are to drop different places.

    Returns:
        `[b, q, n, d]`, contiguous. Two runs give the same bits, gradients included.
    """
    assert value is None or key is not None
    assert constant_beyond is None or constant_beyond >= 0, constant_beyond
    query, key, value = with_equal_batches(query, key, value)
    drawn = _seed(query.device, stream) if dropout > 0.0 else None
    tensors = (query, key, value, diagonals, query_segments, key_segments, drawn)
    context: Tensor = torch.ops.megatron_t5.triton_attention(*tensors, causal, scale, constant_beyond, dropout)[0]
    return context


def dropout_mask(seed: Tensor, batch: int, heads: int, queries: int, keys: int, dropout: float) -> Tensor:
    """Which probabilities attention keeps that draws this seed, bool `[b, n, q, k]`; the kernels never write it."""
    from megatron.core.extensions.triton_attention_kernels import write_kept

    result = torch.empty(batch, heads, queries, keys, dtype=torch.uint8, device=seed.device)
    tiles = -(-queries // 64)
    arguments = (result, seed, queries, keys, tiles, _kept_from(dropout))
    with _on_device(seed):
        Launch(write_kept, (batch * heads * tiles,), arguments, {"M": 64, "N": 64}).run()
    return result.bool()


def _seed(device: torch.device, stream: int) -> Tensor:
    """A new seed, int64 `[1]`, of the device's default generator: nothing has to be copied to the device."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device) + stream


def _attend(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: ScoreBias, options: AttentionOptions
) -> Tensor:
    query_segments, key_segments = (None, None) if bias.segments is None else bias.segments
    diagonals = None if bias.diagonals is None else bias.diagonals.float()
    return attention(
        query, key, value, diagonals, query_segments, key_segments,
        causal=bias.causal, scale=options.scale, constant_beyond=bias.constant_beyond, dropout=options.dropout,
        stream=options.stream,
    )  # fmt: skip


def _refusal(request: AttentionRequest) -> str | None:
    if request.device.type == "cuda" and torch.cuda.get_device_capability(request.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or above"
    return None


BACKEND = AttentionBackend(
    name="triton",
    attend=_attend,
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    dtypes=DTYPES,
    bias="vector",
    bias_gradient=True,
    segments="ids",
    masks=False,
    dropout=True,
    deterministic=True,
    compiles=True,
    head_dims=HEAD_DIMS,
    package="triton",
    refusal=_refusal,
)
