"""Triton kernels of attention with a bias by distance: the forward pass, and what all kernels share.

Imported only where Triton is; `triton_attention` launches what is here. Scores are in powers of two: the scale and the
diagonals come multiplied by log2(e).

The keys that a tile of queries visits fall into ranges, each with a loop of its own: tiles far before the queries,
where the bias is one number; near ones, which gather it from the vector; far ones after them; and those at an edge, the
diagonal of a causal mask or the ragged end of the keys. Only edges compare positions. Rows and columns past the end
read the last one instead, so that no load needs a mask.

Shapes: b batch, n heads, q queries, k keys, d channels of a head, D d padded to a power of two, M and N rows and
columns of a tile. An item is a head of a row of the batch, number `row * n + head`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.core.extensions.triton_interpreter import INTERPRETED

# How a tile's bias is found.
NO_BIAS = tl.constexpr(0)
CONSTANT = tl.constexpr(1)
VECTOR = tl.constexpr(2)
# Who has segment ids.
NO_SEGMENTS = tl.constexpr(0)
KEY_SEGMENTS = tl.constexpr(1)
ALL_SEGMENTS = tl.constexpr(2)
# Larger than any position or segment id.
LARGEST = tl.constexpr(2**31 - 1)
# Whether PTX can be written.
HAS_PTX = tl.constexpr(not INTERPRETED)


@triton.jit
def rows_of(start, last, ROWS: tl.constexpr, CLAMPED: tl.constexpr):
    """Positions `[ROWS]` from `start`, those after `last` replaced by it."""
    rows = start + tl.arange(0, ROWS)
    if CLAMPED:
        rows = tl.minimum(rows, last)
    return rows


@triton.jit
def tile_pointers(base, rows, start, stride, WIDTH: tl.constexpr):
    """Addresses `[rows, D]`; what is far away is added in 64 bits, once a tile."""
    local = (rows - start)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return base + tl.cast(start, tl.int64) * stride + local


@triton.jit
def load_tile(base, rows, start, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """`[rows, D]` of the sequence at `base`; channels of the padding are 0."""
    pointers = tile_pointers(base, rows, start, stride, WIDTH)
    if HEAD_DIM == WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=(tl.arange(0, WIDTH) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_tile(base, values, start, stride, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Writes `[rows, D]`, what lies in the sequence of this length and has a channel, in the dtype of `base`."""
    rows = start + tl.arange(0, ROWS)
    inside = rows[:, None] < length
    if HEAD_DIM != WIDTH:
        inside = inside & (tl.arange(0, WIDTH) < HEAD_DIM)[None, :]
    pointers = tile_pointers(base, rows, start, stride, WIDTH)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def item_base(pointer, batch, head, batch_stride, head_stride):
    """Where the sequence of an item begins."""
    return pointer + tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def diagonals_of(diagonals, head, queries, keys, FAR: tl.constexpr):
    """Where a head's bias at distance 0 is, and the bias far before and far after the queries."""
    left, right = 0.0, 0.0
    first = diagonals + head * (queries + keys - 1)
    if FAR:
        left, right = tl.load(first), tl.load(first + (queries + keys - 2))
    return first + (queries - 1), left, right


@triton.jit
def query_ids(pointer, batch, batch_stride, rows, SEGMENTS: tl.constexpr):
    """Segment ids of queries of a row of the batch; all 1 if only keys have some."""
    if SEGMENTS == ALL_SEGMENTS:
        return tl.load(pointer + tl.cast(batch, tl.int64) * batch_stride + rows)
    return rows * 0 + 1


@triton.jit
def key_ids(pointer, columns, SEGMENTS: tl.constexpr):
    """Segment ids of keys; those of padding are -1, so that equal ids are all that has to be asked for."""
    ids = tl.load(pointer + columns)
    if SEGMENTS == KEY_SEGMENTS:
        ids = (ids != 0).to(tl.int32)
    return tl.where(ids == 0, -1, ids)


@triton.jit
def range_of_ids(ids):
    """Smallest and largest of the ids > 0; an empty range if there are none."""
    return tl.min(tl.where(ids > 0, ids, LARGEST), 0), tl.max(ids, 0)


@triton.jit
def positions_of(pointer, length, low, high, KEYS_ONLY: tl.constexpr, SCAN: tl.constexpr):
    """First position with an id in [low, high], and the one after the last; (`length`, 0) if there is none."""
    first = tl.cast(length, tl.int32)
    last = first * 0
    for start in range(0, length, SCAN):
        positions = start + tl.arange(0, SCAN)
        ids = tl.load(pointer + positions, mask=positions < length, other=0)
        if KEYS_ONLY:
            ids = (ids != 0).to(tl.int32)
        hit = (ids > 0) & (ids >= low) & (ids <= high)
        first = tl.minimum(first, tl.min(tl.where(hit, positions, LARGEST), 0))
        last = tl.maximum(last, tl.max(tl.where(hit, positions + 1, 0), 0))
    return first, last


@triton.jit
def far_limits(start, constant_beyond, M: tl.constexpr, N: tl.constexpr):
    """Tiles of keys before the first limit lie far before the queries from `start`, those from the second one after.

    The gradient of the bias is summed by two kernels that divide the scores by this rule, so there is one.
    """
    left_end = tl.maximum(start - constant_beyond + 1, 0) // N * N
    right_begin = (start + M - 1 + constant_beyond + N - 1) // N * N
    return left_end, right_begin


@triton.jit
def key_ranges(start, queries, keys, key_segments, query_segment_ids, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr,
               M: tl.constexpr, N: tl.constexpr, SCAN: tl.constexpr):  # fmt: skip
    """Keys for the queries from `start`: the first tile, the end of whole tiles, the first tile at an edge, the end."""
    begin = tl.cast(start, tl.int32) * 0
    end = begin + keys
    edge = keys // N * N
    if CAUSAL:
        end = tl.minimum(end, tl.minimum(start + M, queries))
        edge = tl.minimum(edge, (start + 1) // N * N)
    if SEGMENTS != NO_SEGMENTS:
        low, high = range_of_ids(query_segment_ids)
        first, last = positions_of(key_segments, keys, low, high, SEGMENTS == KEY_SEGMENTS, SCAN)
        begin = first // N * N
        end = tl.minimum(end, last)
    return begin, tl.minimum(end, edge), tl.maximum(begin, edge), end


@triton.jit
def gather(pointers):
    """What is at addresses that do not change, straight into registers.

    Triton would stage such loads through shared memory, ahead of the loop, as it does those of keys and values: a tile
    of fp32 for each stage, of what the first-level cache has anyway. It leaves loads alone that it does not see.
    """
    if HAS_PTX:
        return tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [pointers], tl.float32, True, 1)
    return tl.load(pointers)


@triton.jit
def biased(products, rows, columns, bias, constant, scale, KIND: tl.constexpr):
    """Scores of products; rows and columns are `[M, 1]` and `[1, N]`, or `[1, M]` and `[N, 1]`."""
    if KIND == VECTOR:
        return products * scale + gather(bias + (columns - rows))
    if KIND == CONSTANT:
        return products * scale + constant
    return products * scale


@triton.jit
def hidden(scores, rows, columns, row_ids, column_ids, keys, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
           SEGMENTS: tl.constexpr):  # fmt: skip
    """Scores with -inf where a query does not see a key."""
    if EDGE:
        if CAUSAL:
            scores = tl.where((columns <= rows) & (columns < keys), scores, float("-inf"))
        else:
            scores = tl.where(columns < keys, scores, float("-inf"))
    if SEGMENTS != NO_SEGMENTS:
        scores = tl.where(row_ids == column_ids, scores, float("-inf"))
    return scores


@triton.jit
def kept(seed, item, rows, columns, threshold):
    """Which probabilities dropout keeps, by random bits of the seed, the item and the place.

    Philox gives a row and a column bits each. A place hashes their sum (Wellons' lowbias32), a tenth of Philox's work;
    of an item's places, one pair in 2^32 has equal sums.
    """
    bits = tl.philox(seed, rows, rows * 0, item, 0)[0] + tl.philox(seed, columns, columns * 0 + 1, item, 0)[0]
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return (bits >> 1).to(tl.int32) >= threshold


@triton.jit
def write_kept(result, seed, queries, keys, tiles, threshold, M: tl.constexpr, N: tl.constexpr):
    """Rows of `result` uint8 `[b n, q, k]`: what `kept` says."""
    item, row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M
    rows = (row + tl.arange(0, M))[:, None]
    drawn = tl.load(seed)
    for start in range(0, keys, N):
        columns = (start + tl.arange(0, N))[None, :]
        keep = kept(drawn, item, rows, columns, threshold)
        target = result + (tl.cast(item, tl.int64) * queries + rows) * keys + columns
        tl.store(target, keep.to(tl.uint8), mask=(rows < queries) & (columns < keys))


@triton.jit
def forward_tiles(
    context, total, peak, query, key, value, key_stride, value_stride, bias, constant, key_segments, rows, row_ids,
    seed, item, threshold, scale, keys, begin, end,
    KIND: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end) of whole tiles, or tiles at an edge, to the running softmax of a tile of queries."""
    for start in range(begin, end, N):
        inside = rows_of(start, keys - 1, N, EDGE)
        columns = (start + tl.arange(0, N))[None, :]
        key_tile = load_tile(key, inside, start, key_stride, HEAD_DIM, WIDTH)
        products = tl.dot(query, tl.trans(key_tile), input_precision=PRECISION)  # [M, N]
        scores = biased(products, rows[:, None], inside[None, :], bias, constant, scale, KIND)
        column_ids = rows
        if SEGMENTS != NO_SEGMENTS:
            column_ids = key_ids(key_segments, inside, SEGMENTS)
        scores = hidden(scores, rows[:, None], columns, row_ids[:, None], column_ids[None, :], keys, EDGE, CAUSAL,
                        SEGMENTS)  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # Of a query that has seen no key yet the peak is -inf, and -inf less itself is not a number.
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        probabilities = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(peak - finite)
        peak = new_peak
        total = total * shrink + tl.sum(probabilities, 1)
        if DROPOUT:
            probabilities = tl.where(kept(seed, item, rows[:, None], columns, threshold), probabilities, 0.0)
        value_tile = load_tile(value, inside, start, value_stride, HEAD_DIM, WIDTH)
        context = tl.dot(
            probabilities.to(value_tile.dtype), value_tile, context * shrink[:, None], input_precision=PRECISION
        )
    return context, total, peak


@triton.jit
def attention_forward(
    query, key, value, context, statistics, diagonals, query_segments, key_segments, seed,
    query_batch, query_stride, query_head, key_batch, key_stride, key_head, value_batch, value_stride, value_head,
    query_segments_batch, key_segments_batch, heads, queries, keys, tiles, scale, constant_beyond, threshold,
    kept_scale, BIAS: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
    SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, SCAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Context `[b, q, n, d]`, contiguous, and fp32 statistics `[b n, q]` of a tile of queries of an item.

    A statistic is the logarithm to base 2 of the sum of the powers of two of a row's scores; of a query that sees no
    key it is +inf, so that its probabilities, computed again, are 0.
    """
    tile, item = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    batch, head, start = item // heads, item % heads, tile * M
    rows = rows_of(start, queries - 1, M, True)
    query = item_base(query, batch, head, query_batch, query_head)
    key = item_base(key, batch, head, key_batch, key_head)
    value = item_base(value, batch, head, value_batch, value_head)
    query_tile = load_tile(query, rows, start, query_stride, HEAD_DIM, WIDTH)
    row_ids = rows
    if SEGMENTS != NO_SEGMENTS:
        key_segments += tl.cast(batch, tl.int64) * key_segments_batch
        row_ids = query_ids(query_segments, batch, query_segments_batch, rows, SEGMENTS)
    begin, whole, edge, end = key_ranges(start, queries, keys, key_segments, row_ids, CAUSAL, SEGMENTS, M, N, SCAN)
    drawn = 0
    if DROPOUT:
        drawn = tl.load(seed)
    bias, left, right = diagonals, 0.0, 0.0
    if BIAS:
        bias, left, right = diagonals_of(diagonals, head, queries, keys, FAR)
    sums = tl.zeros([M, WIDTH], tl.float32)
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    NEAR: tl.constexpr = VECTOR if BIAS else NO_BIAS
    near_begin, near_end = begin, whole
    if FAR:
        left_end, right_begin = far_limits(start, constant_beyond, M, N)
        near_begin = tl.maximum(begin, tl.minimum(left_end, whole))
        near_end = tl.maximum(near_begin, tl.minimum(right_begin, whole))
        sums, total, peak = forward_tiles(
            sums, total, peak, query_tile, key, value, key_stride, value_stride, bias, left, key_segments, rows,
            row_ids, drawn, item, threshold, scale, keys, begin, near_begin,
            CONSTANT, False, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, N, PRECISION,
        )  # fmt: skip
    sums, total, peak = forward_tiles(
        sums, total, peak, query_tile, key, value, key_stride, value_stride, bias, 0.0, key_segments, rows, row_ids,
        drawn, item, threshold, scale, keys, near_begin, near_end,
        NEAR, False, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, N, PRECISION,
    )  # fmt: skip
    if FAR and not CAUSAL:
        sums, total, peak = forward_tiles(
            sums, total, peak, query_tile, key, value, key_stride, value_stride, bias, right, key_segments, rows,
            row_ids, drawn, item, threshold, scale, keys, near_end, whole,
            CONSTANT, False, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, N, PRECISION,
        )  # fmt: skip
    if CAUSAL or RAGGED:
        sums, total, peak = forward_tiles(
            sums, total, peak, query_tile, key, value, key_stride, value_stride, bias, 0.0, key_segments, rows, row_ids,
            drawn, item, threshold, scale, keys, edge, end,
            NEAR, True, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, N, PRECISION,
        )  # fmt: skip
    empty = total == 0.0
    factor = tl.where(empty, 0.0, kept_scale / tl.where(empty, 1.0, total))
    context = item_base(context, batch, head, queries * tl.cast(heads, tl.int64) * HEAD_DIM, HEAD_DIM)
    store_tile(context, sums * factor[:, None], start, heads * HEAD_DIM, queries, M, HEAD_DIM, WIDTH)
    logarithms = tl.where(empty, float("inf"), peak + tl.log2(tl.where(empty, 1.0, total)))
    places = start + tl.arange(0, M)
    tl.store(statistics + tl.cast(item, tl.int64) * queries + places, logarithms, mask=places < queries)
