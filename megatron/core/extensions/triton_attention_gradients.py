"""Triton kernels of the backward pass of attention with a bias by distance.

Every element of a result is written by one program, which sums in a fixed order: the same inputs give the same bits.
Probabilities are computed again from the statistics of the forward pass. Scores are in powers of two there, so that the
gradients below are of the scores in natural units, as the diagonals are.

The gradient of the diagonals is summed in two passes. Of tiles far from the queries the kernel of the queries' gradient
keeps one sum a side. Of near tiles a kernel of its own takes one diagonal of square tiles, adds them up over the batch
in registers and sums the elements' diagonals once, at the end. `sum_diagonals` puts the parts together.

Shapes: as in triton_attention_kernels; T rows and columns of a square tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.core.extensions.triton_attention_kernels import (
    ALL_SEGMENTS,
    CONSTANT,
    NO_BIAS,
    NO_SEGMENTS,
    VECTOR,
    biased,
    diagonals_of,
    far_limits,
    hidden,
    item_base,
    kept,
    key_ids,
    key_ranges,
    load_tile,
    positions_of,
    query_ids,
    range_of_ids,
    rows_of,
    store_tile,
)


@triton.jit
def query_gradient_tiles(
    sums, left_sums, right_sums, query, gradient, statistics, delta, key, value, key_stride, value_stride, bias,
    constant, key_segments, rows, row_ids, seed, item, threshold, kept_scale, scale, keys, left_end, right_begin,
    begin, end, KIND: tl.constexpr, EDGE: tl.constexpr, FAR_SUMS: tl.constexpr, CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the keys [begin, end) give to the gradient of a tile of queries, and far scores' gradients by row."""
    for start in range(begin, end, N):
        inside = rows_of(start, keys - 1, N, EDGE)
        columns = (start + tl.arange(0, N))[None, :]
        key_tile = load_tile(key, inside, start, key_stride, HEAD_DIM, WIDTH)
        value_tile = load_tile(value, inside, start, value_stride, HEAD_DIM, WIDTH)
        products = tl.dot(query, tl.trans(key_tile), input_precision=PRECISION)  # [M, N]
        scores = biased(products, rows[:, None], inside[None, :], bias, constant, scale, KIND)
        column_ids = rows
        if SEGMENTS != NO_SEGMENTS:
            column_ids = key_ids(key_segments, inside, SEGMENTS)
        scores = hidden(scores, rows[:, None], columns, row_ids[:, None], column_ids[None, :], keys, EDGE, CAUSAL,
                        SEGMENTS)  # fmt: skip
        probabilities = tl.exp2(scores - statistics[:, None])
        gradients = tl.dot(gradient, tl.trans(value_tile), input_precision=PRECISION)
        if DROPOUT:
            gradients = tl.where(kept(seed, item, rows[:, None], columns, threshold), gradients * kept_scale, 0.0)
        gradients = probabilities * (gradients - delta[:, None])
        if FAR_SUMS:
            row_sums = tl.sum(gradients, 1)
            left_sums += tl.where(start < left_end, row_sums, 0.0)
            right_sums += tl.where(start >= right_begin, row_sums, 0.0)
        sums = tl.dot(gradients.to(key_tile.dtype), key_tile, sums, input_precision=PRECISION)
    return sums, left_sums, right_sums


@triton.jit
def rows_of_forward(gradient, context, delta, statistics, item, start, queries, M: tl.constexpr):
    """Of a tile of queries `delta`, stored, too, and statistics, +inf past the end: nothing is summed there."""
    row_delta = tl.sum(gradient.to(tl.float32) * context.to(tl.float32), 1)
    rows = start + tl.arange(0, M)
    places = tl.cast(item, tl.int64) * queries + rows
    tl.store(delta + places, row_delta, mask=rows < queries)
    return row_delta, tl.load(statistics + places, mask=rows < queries, other=float("inf"))


@triton.jit
def attention_query_gradient(
    gradient, context, statistics, delta, query, key, value, query_gradient, far_sums, diagonals, query_segments,
    key_segments, seed, gradient_batch, gradient_stride, gradient_head, query_batch, query_stride, query_head,
    key_batch, key_stride, key_head, value_batch, value_stride, value_head,
    query_gradient_batch, query_gradient_stride, query_gradient_head, query_segments_batch, key_segments_batch,
    rows_of_batch, heads, queries, keys, tiles, product_scale, scale, constant_beyond, threshold, kept_scale,
    BIAS: tl.constexpr, FAR: tl.constexpr, FAR_SUMS: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
    SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, SCAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries; `delta` fp32 `[b n, q]`, a row's sum of context times gradient; the far sums.

    `far_sums` is fp32 `[2, n, b tiles]`, of the scores' gradients far before and far after the queries.
    """
    tile, item = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    batch, head, start = item // heads, item % heads, tile * M
    rows = rows_of(start, queries - 1, M, True)
    query = item_base(query, batch, head, query_batch, query_head)
    key = item_base(key, batch, head, key_batch, key_head)
    value = item_base(value, batch, head, value_batch, value_head)
    gradient = item_base(gradient, batch, head, gradient_batch, gradient_head)
    context = item_base(context, batch, head, queries * tl.cast(heads, tl.int64) * HEAD_DIM, HEAD_DIM)
    query_tile = load_tile(query, rows, start, query_stride, HEAD_DIM, WIDTH)
    gradient_tile = load_tile(gradient, rows, start, gradient_stride, HEAD_DIM, WIDTH)
    context_tile = load_tile(context, rows, start, heads * HEAD_DIM, HEAD_DIM, WIDTH)
    row_delta, row_statistics = rows_of_forward(gradient_tile, context_tile, delta, statistics, item, start, queries, M)
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
    sums, left_sums, right_sums = tl.zeros([M, WIDTH], tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    NEAR: tl.constexpr = VECTOR if BIAS else NO_BIAS
    near_begin, near_end = begin, whole
    left_end, right_begin = 0, keys
    if FAR:
        left_end, right_begin = far_limits(start, constant_beyond, M, N)
        near_begin = tl.maximum(begin, tl.minimum(left_end, whole))
        near_end = tl.maximum(near_begin, tl.minimum(right_begin, whole))
        sums, left_sums, right_sums = query_gradient_tiles(
            sums, left_sums, right_sums, query_tile, gradient_tile, row_statistics, row_delta, key, value, key_stride,
            value_stride, bias, left, key_segments, rows, row_ids, drawn, item, threshold, kept_scale, scale, keys,
            left_end, right_begin, begin, near_begin,
            CONSTANT, False, FAR_SUMS, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, N, PRECISION,
        )  # fmt: skip
    sums, left_sums, right_sums = query_gradient_tiles(
        sums, left_sums, right_sums, query_tile, gradient_tile, row_statistics, row_delta, key, value, key_stride,
        value_stride, bias, 0.0, key_segments, rows, row_ids, drawn, item, threshold, kept_scale, scale, keys,
        left_end, right_begin, near_begin, near_end,
        NEAR, False, False, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, N, PRECISION,
    )  # fmt: skip
    if FAR and not CAUSAL:
        sums, left_sums, right_sums = query_gradient_tiles(
            sums, left_sums, right_sums, query_tile, gradient_tile, row_statistics, row_delta, key, value, key_stride,
            value_stride, bias, right, key_segments, rows, row_ids, drawn, item, threshold, kept_scale, scale, keys,
            left_end, right_begin, near_end, whole,
            CONSTANT, False, FAR_SUMS, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, N, PRECISION,
        )  # fmt: skip
    if CAUSAL or RAGGED:
        sums, left_sums, right_sums = query_gradient_tiles(
            sums, left_sums, right_sums, query_tile, gradient_tile, row_statistics, row_delta, key, value, key_stride,
            value_stride, bias, 0.0, key_segments, rows, row_ids, drawn, item, threshold, kept_scale, scale, keys,
            left_end, right_begin, edge, end,
            NEAR, True, FAR_SUMS, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, N, PRECISION,
        )  # fmt: skip
    query_gradient = item_base(query_gradient, batch, head, query_gradient_batch, query_gradient_head)
    store_tile(query_gradient, sums * product_scale, start, query_gradient_stride, queries, M, HEAD_DIM, WIDTH)
    if FAR_SUMS:
        row_tiles = rows_of_batch * tiles
        target = far_sums + head * row_tiles + batch * tiles + tile
        tl.store(target, tl.sum(left_sums, 0))
        tl.store(target + heads * row_tiles, tl.sum(right_sums, 0))


@triton.jit
def key_gradient_tiles(
    key_sums, value_sums, key, value, query, gradient, statistics, delta, query_stride, gradient_stride, bias, constant,
    query_segments, columns, column_ids, seed, item, threshold, kept_scale, scale, queries, keys, begin, end,
    KIND: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the queries [begin, end) give to the gradients of a tile of keys and values; scores are transposed."""
    for start in range(begin, end, M):
        places = start + tl.arange(0, M)
        rows = rows_of(start, queries - 1, M, True)
        query_tile = load_tile(query, rows, start, query_stride, HEAD_DIM, WIDTH)
        gradient_tile = load_tile(gradient, rows, start, gradient_stride, HEAD_DIM, WIDTH)
        # Of queries past the end all probabilities are 0.
        row_statistics = tl.load(statistics + places, mask=places < queries, other=float("inf"))
        row_delta = tl.load(delta + places, mask=places < queries, other=0.0)
        products = tl.dot(key, tl.trans(query_tile), input_precision=PRECISION)  # [N, M]
        scores = biased(products, rows[None, :], columns[:, None], bias, constant, scale, KIND)
        row_ids = rows
        if SEGMENTS != NO_SEGMENTS:
            row_ids = query_ids(query_segments, 0, 0, rows, SEGMENTS)
        scores = hidden(scores, rows[None, :], columns[:, None], row_ids[None, :], column_ids[:, None], keys, EDGE,
                        CAUSAL, SEGMENTS)  # fmt: skip
        probabilities = tl.exp2(scores - row_statistics[None, :])
        gradients = tl.dot(value, tl.trans(gradient_tile), input_precision=PRECISION)
        dropped = probabilities
        if DROPOUT:
            keep = kept(seed, item, rows[None, :], columns[:, None], threshold)
            dropped = tl.where(keep, probabilities * kept_scale, 0.0)
            gradients = tl.where(keep, gradients * kept_scale, 0.0)
        value_sums = tl.dot(dropped.to(gradient_tile.dtype), gradient_tile, value_sums, input_precision=PRECISION)
        gradients = probabilities * (gradients - row_delta[None, :])
        key_sums = tl.dot(gradients.to(query_tile.dtype), query_tile, key_sums, input_precision=PRECISION)
    return key_sums, value_sums


@triton.jit
def query_range(columns, queries, query_segments, key_segments, SEGMENTS: tl.constexpr, M: tl.constexpr,
                SCAN: tl.constexpr):  # fmt: skip
    """For a tile of keys: the first tile of queries that may see them, where these end, and the keys' ids."""
    begin = tl.cast(0, tl.int32)
    end = begin + queries
    column_ids = columns
    if SEGMENTS != NO_SEGMENTS:
        column_ids = key_ids(key_segments, columns, SEGMENTS)
        low, high = range_of_ids(column_ids)
        if SEGMENTS == ALL_SEGMENTS:
            first, last = positions_of(query_segments, queries, low, high, False, SCAN)
            begin = first // M * M
            end = last
        else:
            end = tl.where(high > 0, end, 0)
    return begin, end, column_ids


@triton.jit
def attention_key_gradient(
    gradient, statistics, delta, query, key, value, key_gradient, value_gradient, diagonals, query_segments,
    key_segments, seed, gradient_batch, gradient_stride, gradient_head, query_batch, query_stride, query_head,
    key_batch, key_stride, key_head, value_batch, value_stride, value_head,
    key_gradient_batch, key_gradient_stride, key_gradient_head,
    value_gradient_batch, value_gradient_stride, value_gradient_head, query_segments_batch, key_segments_batch,
    heads, queries, keys, tiles, product_scale, scale, constant_beyond, threshold, kept_scale,
    BIAS: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SCAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values."""
    tile, item = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head, start = item // heads, item % heads, tile * N
    columns = rows_of(start, keys - 1, N, True)
    query = item_base(query, batch, head, query_batch, query_head)
    gradient = item_base(gradient, batch, head, gradient_batch, gradient_head)
    key = item_base(key, batch, head, key_batch, key_head)
    value = item_base(value, batch, head, value_batch, value_head)
    key_tile = load_tile(key, columns, start, key_stride, HEAD_DIM, WIDTH)
    value_tile = load_tile(value, columns, start, value_stride, HEAD_DIM, WIDTH)
    statistics += tl.cast(item, tl.int64) * queries
    delta += tl.cast(item, tl.int64) * queries
    if SEGMENTS == ALL_SEGMENTS:
        query_segments += tl.cast(batch, tl.int64) * query_segments_batch
    if SEGMENTS != NO_SEGMENTS:
        key_segments += tl.cast(batch, tl.int64) * key_segments_batch
    begin, end, column_ids = query_range(columns, queries, query_segments, key_segments, SEGMENTS, M, SCAN)
    drawn = 0
    if DROPOUT:
        drawn = tl.load(seed)
    bias, left, right = diagonals, 0.0, 0.0
    if BIAS:
        bias, left, right = diagonals_of(diagonals, head, queries, keys, FAR)
    key_sums = tl.zeros([N, WIDTH], tl.float32)
    value_sums = tl.zeros([N, WIDTH], tl.float32)
    NEAR: tl.constexpr = VECTOR if BIAS else NO_BIAS
    near_begin, near_end = begin, end
    if CAUSAL:
        begin = tl.maximum(begin, start // M * M)
        near_begin = tl.maximum(begin, tl.minimum((start + N - 1 + M - 1) // M * M, end))
        key_sums, value_sums = key_gradient_tiles(
            key_sums, value_sums, key_tile, value_tile, query, gradient, statistics, delta, query_stride,
            gradient_stride, bias, 0.0, query_segments, columns, column_ids, drawn, item, threshold, kept_scale,
            scale, queries, keys, begin, near_begin,
            NEAR, True, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, M, PRECISION,
        )  # fmt: skip
    elif FAR:  # the keys lie far after these queries
        near_begin = tl.maximum(begin, tl.minimum(tl.maximum(start - constant_beyond + 1, 0) // M * M, end))
        key_sums, value_sums = key_gradient_tiles(
            key_sums, value_sums, key_tile, value_tile, query, gradient, statistics, delta, query_stride,
            gradient_stride, bias, right, query_segments, columns, column_ids, drawn, item, threshold, kept_scale,
            scale, queries, keys, begin, near_begin,
            CONSTANT, False, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, M, PRECISION,
        )  # fmt: skip
    if FAR:
        left_begin = (start + N - 1 + constant_beyond + M - 1) // M * M
        near_end = tl.maximum(near_begin, tl.minimum(left_begin, end))
    key_sums, value_sums = key_gradient_tiles(
        key_sums, value_sums, key_tile, value_tile, query, gradient, statistics, delta, query_stride, gradient_stride,
        bias, 0.0, query_segments, columns, column_ids, drawn, item, threshold, kept_scale, scale, queries, keys,
        near_begin, near_end, NEAR, False, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, M, PRECISION,
    )  # fmt: skip
    if FAR:
        key_sums, value_sums = key_gradient_tiles(
            key_sums, value_sums, key_tile, value_tile, query, gradient, statistics, delta, query_stride,
            gradient_stride, bias, left, query_segments, columns, column_ids, drawn, item, threshold, kept_scale,
            scale, queries, keys, near_end, end,
            CONSTANT, False, CAUSAL, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, M, PRECISION,
        )  # fmt: skip
    key_gradient = item_base(key_gradient, batch, head, key_gradient_batch, key_gradient_head)
    value_gradient = item_base(value_gradient, batch, head, value_gradient_batch, value_gradient_head)
    store_tile(key_gradient, key_sums * product_scale, start, key_gradient_stride, keys, N, HEAD_DIM, WIDTH)
    store_tile(value_gradient, value_sums, start, value_gradient_stride, keys, N, HEAD_DIM, WIDTH)


@triton.jit
def bias_gradient_tile(
    sums, bias, columns_of_tile, gradient, statistics, delta, query, key, value, seed, near, row, column, batch, head,
    heads, gradient_batch, gradient_stride, gradient_head, query_batch, query_stride, query_head,
    key_batch, key_stride, key_head, value_batch, value_stride, value_head, row_ids, column_ids,
    queries, keys, threshold, kept_scale, scale,
    RAGGED: tl.constexpr, SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the gradients of the scores of one tile `[T, T]`, which are 0 if it is not near."""
    rows = rows_of(row, queries - 1, T, True)
    columns = rows_of(column, keys - 1, T, RAGGED)
    item = batch * heads + head
    query = item_base(query, batch, head, query_batch, query_head)
    key = item_base(key, batch, head, key_batch, key_head)
    value = item_base(value, batch, head, value_batch, value_head)
    gradient = item_base(gradient, batch, head, gradient_batch, gradient_head)
    query_tile = load_tile(query, rows, row, query_stride, HEAD_DIM, WIDTH)
    key_tile = load_tile(key, columns, column, key_stride, HEAD_DIM, WIDTH)
    value_tile = load_tile(value, columns, column, value_stride, HEAD_DIM, WIDTH)
    gradient_tile = load_tile(gradient, rows, row, gradient_stride, HEAD_DIM, WIDTH)
    places = row + tl.arange(0, T)
    first = tl.cast(item, tl.int64) * queries
    row_statistics = tl.load(statistics + first + places, mask=(places < queries) & near, other=float("inf"))
    row_delta = tl.load(delta + first + rows)
    scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION) * scale + bias
    # The bias hides what a causal mask does.
    scores = hidden(scores, rows[:, None], (column + columns_of_tile)[None, :], row_ids[:, None], column_ids[None, :],
                    keys, RAGGED, False, SEGMENTS)  # fmt: skip
    probabilities = tl.exp2(scores - row_statistics[:, None])
    gradients = tl.dot(gradient_tile, tl.trans(value_tile), input_precision=PRECISION)
    if DROPOUT:
        drawn = tl.load(seed)
        keep = kept(drawn, item, rows[:, None], columns[None, :], threshold)
        gradients = tl.where(keep, gradients * kept_scale, 0.0)
    return sums + probabilities * (gradients - row_delta[:, None])


@triton.jit
def attention_bias_gradient(
    gradient, statistics, delta, query, key, value, partial_sums, diagonals, query_segments, key_segments, seed,
    gradient_batch, gradient_stride, gradient_head, query_batch, query_stride, query_head,
    key_batch, key_stride, key_head, value_batch, value_stride, value_head, query_segments_batch, key_segments_batch,
    rows_of_batch, heads, queries, keys, first_offset, offsets, splits, scale, constant_beyond, threshold, kept_scale,
    FAR: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr, SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the scores' gradients by distance over near tiles: one split of a diagonal of square tiles of a head.

    Tiles are `first_offset`, ... tiles after the queries'. `partial_sums` is fp32 `[n, offsets, splits, 2 T]`, of which
    number p is of distance `offset T - (T - 1) + p`. M is that of the queries' gradient, which sums far tiles.
    """
    split = tl.program_id(0) % splits
    offset_index = tl.program_id(0) // splits % offsets
    head = tl.program_id(0) // splits // offsets
    offset = first_offset + offset_index
    lines = tl.arange(0, T)
    # All tiles on the diagonal have the same bias.
    distances = offset * T + lines[None, :] - lines[:, None]
    length = queries + keys - 1
    bias = tl.load(diagonals + head * length + tl.minimum(tl.maximum(distances + queries - 1, 0), length - 1))
    if CAUSAL:
        bias = tl.where(distances <= 0, bias, float("-inf"))
    first_row = tl.maximum(0, -offset)
    count = tl.minimum((queries + T - 1) // T, (keys + T - 1) // T - offset) - first_row
    sums = tl.zeros([T, T], tl.float32)
    for pair in range(split, rows_of_batch * count, splits):
        batch = pair // count
        row = (first_row + pair % count) * T
        column = row + offset * T
        near = True
        if FAR and M != T:
            left_end, right_begin = far_limits(row // M * M, constant_beyond, M, T)
            near = (column >= left_end) & (column < right_begin)
        row_ids, column_ids = lines, lines
        if SEGMENTS != NO_SEGMENTS:
            rows, columns = rows_of(row, queries - 1, T, True), rows_of(column, keys - 1, T, True)
            row_ids = query_ids(query_segments, batch, query_segments_batch, rows, SEGMENTS)
            column_ids = key_ids(key_segments + tl.cast(batch, tl.int64) * key_segments_batch, columns, SEGMENTS)
            low, high = range_of_ids(row_ids)
            key_low, key_high = range_of_ids(column_ids)
            overlap = (low <= key_high) & (key_low <= high)
        # Without segments nothing is asked, for a loop without a condition is the one that loads ahead.
        if SEGMENTS == NO_SEGMENTS or overlap:
            sums = bias_gradient_tile(
                sums, bias, lines, gradient, statistics, delta, query, key, value, seed, near, row, column, batch, head,
                heads, gradient_batch, gradient_stride, gradient_head, query_batch, query_stride, query_head,
                key_batch, key_stride, key_head, value_batch, value_stride, value_head, row_ids, column_ids,
                queries, keys, threshold, kept_scale, scale,
                RAGGED, SEGMENTS, DROPOUT, HEAD_DIM, WIDTH, T, PRECISION,
            )  # fmt: skip
    numbers = tl.arange(0, 2 * T)
    places = numbers[None, :] + lines[:, None] - (T - 1)  # [T, 2 T]: the column of each row at a distance
    sheared = tl.gather(sums, tl.minimum(tl.maximum(places, 0), T - 1), axis=1)
    by_distance = tl.sum(tl.where((places >= 0) & (places < T), sheared, 0.0), 0)
    tl.store(partial_sums + tl.cast(tl.program_id(0), tl.int64) * (2 * T) + numbers, by_distance)


@triton.jit
def sum_diagonals(
    partial_sums, far_sums, result, heads, queries, keys, first_offset, offsets, splits, blocks, row_tiles,
    T: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Gradient of the diagonals, fp32 `[n, q + k - 1]`, of a block of them.

    A distance has a place in two neighbouring diagonals of tiles. The sums far from the queries go to the outermost
    diagonal of their side.
    """
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    length = queries + keys - 1
    index = block * BLOCK + tl.arange(0, BLOCK)
    # Counted from the first distance of the first diagonal of tiles, less T: never negative where anything is.
    place = index - (queries - 1) - (first_offset - 1) * T + (T - 1)
    upper = tl.where(place >= 0, place // T, 0) - 1  # the diagonal of tiles in whose first half it lies
    within = place - (upper + 1) * T
    base = partial_sums + tl.cast(head, tl.int64) * offsets * splits * (2 * T)
    sums = tl.zeros([BLOCK], tl.float32)
    in_upper = (place >= 0) & (upper >= 0) & (upper < offsets)
    in_lower = (place >= 0) & (upper >= 1) & (upper <= offsets)
    for split in range(splits):
        sums += tl.load(base + (upper * splits + split) * (2 * T) + within, mask=in_upper, other=0.0)
        sums += tl.load(base + ((upper - 1) * splits + split) * (2 * T) + T + within, mask=in_lower, other=0.0)
    if FAR:
        left, right = 0.0, 0.0
        for start in range(0, row_tiles, BLOCK):
            places = start + tl.arange(0, BLOCK)
            of_head = far_sums + head * row_tiles + places
            left += tl.sum(tl.load(of_head, mask=places < row_tiles, other=0.0), 0)
            right += tl.sum(tl.load(of_head + heads * row_tiles, mask=places < row_tiles, other=0.0), 0)
        sums += tl.where(index == 0, left, 0.0) + tl.where(index == length - 1, right, 0.0)
    tl.store(result + tl.cast(head, tl.int64) * length + index, sums, mask=index < length)
