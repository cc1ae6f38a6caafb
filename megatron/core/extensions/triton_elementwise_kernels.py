"""Triton kernels of `triton_elementwise`: one pass over memory each, fp32 arithmetic.

Rows of at most `WHOLE_ROW` numbers stay in registers; of wider ones a program reads BLOCK numbers at a time, twice.
Nothing is added up by atomics: each program writes its own sums, which torch adds up in their order. FlashT5 has
Triton kernels for the same operations.

Offsets are int64 from the row on: tensors may have more than 2**31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

WHOLE_ROW = 8192


# Dropout


@triton.jit
def keep_factors(seed, row, start, p, scale, BLOCK: tl.constexpr):
    """fp32 `[BLOCK]`: 0 with probability `p`, else `scale`, for columns from `start` of a row.

    Four columns have one draw of Philox (Salmon et al. 2011), whose counter is the place and whose key is the seed.
    """
    group = start // 4 + tl.arange(0, BLOCK // 4)
    zero = group * 0
    a, b, c, d = tl.philox(seed, group, zero + row, zero, zero)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # a0 b0 c0 d0 a1 ...
    return tl.where(tl.uint_to_uniform_float(words) < p, 0.0, scale)


# Normalisation


@triton.jit
def load_or_sum(
    residual, branch, total, seed, row, start, offset, p, scale,
    ADD: tl.constexpr, DROP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """fp32 `[BLOCK]` of `total`; with ADD they are first put there: `residual + dropout(branch)`, rounded."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    if ADD:
        values = tl.load(branch + offset + columns, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            values = values * keep_factors(seed, row, start, p, scale, BLOCK)
        values += tl.load(residual + offset + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + offset + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    else:
        values = tl.load(total + offset + columns, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def rounded_weight(weight, columns, inside, dtype: tl.constexpr):
    """The weight in the input's precision, in which it multiplies."""
    return tl.load(weight + columns, mask=inside, other=0.0).to(dtype).to(tl.float32)


@triton.jit
def store_norm(values, scale, weight, y, start, offset, dtype: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """As T5X has it: back in the input's precision, then times the weight, which rounds again."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    normed = (values * scale).to(dtype).to(tl.float32) * rounded_weight(weight, columns, inside, dtype)
    tl.store(y + offset + columns, normed.to(dtype).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm(
    residual, branch, total, weight, y, seed, epsilon, p, scale,
    ADD: tl.constexpr, DROP: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm of a row of `total` to `y`; with ADD `total` is computed too. Grid: rows."""
    row = tl.program_id(0)
    offset = row.to(tl.int64) * WIDTH
    key = 0
    if DROP:
        key = tl.load(seed)
    dtype: tl.constexpr = total.dtype.element_ty
    if WHOLE:
        values = load_or_sum(residual, branch, total, key, row, 0, offset, p, scale, ADD, DROP, WIDTH, BLOCK)
        root = tl.rsqrt(tl.sum(values * values) / WIDTH + epsilon)
        store_norm(values, root, weight, y, 0, offset, dtype, WIDTH, BLOCK)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            values = load_or_sum(residual, branch, total, key, row, start, offset, p, scale, ADD, DROP, WIDTH, BLOCK)
            squares += values * values
        root = tl.rsqrt(tl.sum(squares) / WIDTH + epsilon)
        if ADD:
            tl.debug_barrier()  # other threads read what was stored
        for start in range(0, WIDTH, BLOCK):
            values = load_or_sum(None, None, total, key, row, start, offset, p, scale, False, False, WIDTH, BLOCK)
            store_norm(values, root, weight, y, start, offset, dtype, WIDTH, BLOCK)


@triton.jit
def load_weight(weight, start, dtype: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`rounded_weight` of a block of columns."""
    columns = start + tl.arange(0, BLOCK)
    return rounded_weight(weight, columns, columns < WIDTH, dtype)


@triton.jit
def load_row(x, start, offset, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 `[BLOCK]` of a row, 0 beyond its end."""
    columns = start + tl.arange(0, BLOCK)
    return tl.load(x + offset + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_gradient(
    inner, more, x_gradient, branch_gradient, seed, row, start, offset, p, scale,
    MORE: tl.constexpr, DROP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The input's gradient, plus `more` with MORE, and with DROP that of the branch that was dropped."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    if MORE:
        inner += tl.load(more + offset + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = inner.to(x_gradient.dtype.element_ty)
    tl.store(x_gradient + offset + columns, rounded, mask=inside)
    if DROP:
        dropped = rounded.to(tl.float32) * keep_factors(seed, row, start, p, scale, BLOCK)
        tl.store(branch_gradient + offset + columns, dropped.to(branch_gradient.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_gradient(
    more, gradient, x, weight, x_gradient, branch_gradient, partial, seed, rows, epsilon, p, scale,
    MORE: tl.constexpr, DROP: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the input and, for the weight, the sum of the program's rows in `partial` `[programs, width]`.

    Grid: any number of programs. `partial` starts at zero for rows that are not WHOLE.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    sums = partial + program.to(tl.int64) * WIDTH
    dtype: tl.constexpr = x.dtype.element_ty
    key = 0
    if DROP:
        key = tl.load(seed)
    if WHOLE:
        total = tl.zeros((BLOCK,), tl.float32)
        weights = load_weight(weight, 0, dtype, WIDTH, BLOCK)
        row = program
        while row < rows:
            offset = row.to(tl.int64) * WIDTH
            values = load_row(x, 0, offset, WIDTH, BLOCK)
            outer = load_row(gradient, 0, offset, WIDTH, BLOCK)
            weighted = outer * weights
            root = tl.rsqrt(tl.sum(values * values) / WIDTH + epsilon)
            along = tl.sum(values * weighted) * root * root / WIDTH  # what is along x does not change the norm
            total += outer * (values * root)
            inner = root * (weighted - values * along)
            store_gradient(
                inner, more, x_gradient, branch_gradient, key, row, 0, offset, p, scale, MORE, DROP, WIDTH, BLOCK
            )
            row += programs
        columns = tl.arange(0, BLOCK)
        tl.store(sums + columns, total, mask=columns < WIDTH)
    else:
        row = program
        while row < rows:
            offset = row.to(tl.int64) * WIDTH
            squares = tl.zeros((BLOCK,), tl.float32)
            products = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, WIDTH, BLOCK):
                values = load_row(x, start, offset, WIDTH, BLOCK)
                squares += values * values
                weights = load_weight(weight, start, dtype, WIDTH, BLOCK)
                products += values * load_row(gradient, start, offset, WIDTH, BLOCK) * weights
            root = tl.rsqrt(tl.sum(squares) / WIDTH + epsilon)
            along = tl.sum(products) * root * root / WIDTH
            for start in range(0, WIDTH, BLOCK):
                values = load_row(x, start, offset, WIDTH, BLOCK)
                outer = load_row(gradient, start, offset, WIDTH, BLOCK)
                columns = start + tl.arange(0, BLOCK)
                before = tl.load(sums + columns, mask=columns < WIDTH, other=0.0)
                tl.store(sums + columns, before + outer * (values * root), mask=columns < WIDTH)
                weighted = outer * load_weight(weight, start, dtype, WIDTH, BLOCK)
                inner = root * (weighted - values * along)
                store_gradient(
                    inner, more, x_gradient, branch_gradient, key, row, start, offset, p, scale,
                    MORE, DROP, WIDTH, BLOCK,
                )  # fmt: skip
            tl.debug_barrier()  # the next row's sums may be read by other threads
            row += programs


# Gated activation


@triton.jit
def activated(x, GELU: tl.constexpr):
    """Value and slope of an activation `x * sigmoid(z(x))`.

    Beyond `bound` the sigmoid is 0 or 1 to fp32, and x is taken for -bound below it, so that nothing overflows.
    """
    bound: tl.constexpr = 9.5 if GELU else 80.0
    above = tl.where(x < -bound, -bound, x)
    within = tl.where(above > bound, bound, above)
    if GELU:  # z = 2 sqrt(2 / pi) (x + 0.044715 x^3): with it the sigmoid is (1 + tanh(z / 2)) / 2
        z = 1.5957691216057308 * within * (1.0 + 0.044715 * within * within)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * within * within)
    else:
        z = within
        slope = 1.0
    inverse = tl.exp(-z)
    sigmoid = 1.0 / (1.0 + inverse)
    return above * sigmoid, sigmoid + within * slope * (inverse * sigmoid * sigmoid)


@triton.jit
def load_units(x, block, units, BLOCK: tl.constexpr):
    """fp32 `[BLOCK]` each of gate and up, which lie side by side."""
    places = block * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    pairs = tl.load(x + places, mask=places < tl.cast(units, tl.int64) * 2, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(pairs, (BLOCK, 2)))


@triton.jit
def gated(x, y, units, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """`activation(gate) * up`. Grid: blocks of units."""
    block = tl.program_id(0).to(tl.int64)
    gate, up = load_units(x, block, units, BLOCK)
    value, _ = activated(gate, GELU)
    places = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + places, (value * up).to(y.dtype.element_ty), mask=places < units)


@triton.jit
def gated_gradient(gradient, x, x_gradient, units, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of gate and up, side by side. Grid: blocks of units."""
    block = tl.program_id(0).to(tl.int64)
    gate, up = load_units(x, block, units, BLOCK)
    value, slope = activated(gate, GELU)
    places = block * BLOCK + tl.arange(0, BLOCK)
    outer = tl.load(gradient + places, mask=places < units, other=0.0).to(tl.float32)
    pairs = tl.interleave(outer * up * slope, outer * value)
    places = block * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    inside = places < tl.cast(units, tl.int64) * 2
    tl.store(x_gradient + places, pairs.to(x_gradient.dtype.element_ty), mask=inside)
