"""Triton kernels of the loss: what a row of logits gives, and its gradient in the place of the logits.

Offsets are int64 from the row on: a chunk of logits may have more than 2**31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_statistics(logits, labels, log_z, label_logit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`logsumexp` of a row and its label's logit, 0 where it has no such column. Grid: rows.

    The largest number so far is that of the row, the sum is one for each column of a block: an exponential a number,
    and one reduction over threads a block.
    """
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * WIDTH
    largest = -float("inf")
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(first + columns, mask=columns < WIDTH, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, 0))
        shift = tl.where(larger == -float("inf"), 0.0, larger)  # nothing but -inf so far: their exponential is 0
        sums = sums * tl.exp(largest - shift) + tl.exp(values - shift)
        largest = larger
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    tl.store(log_z + row, shift + tl.log(tl.sum(sums, 0)))
    label = tl.load(labels + row)
    there = (label >= 0) & (label < WIDTH)
    logit = tl.load(first + tl.where(there, label, 0), mask=there, other=0.0).to(tl.float32)
    tl.store(label_logit + row, logit)


@triton.jit
def logits_gradient(logits, labels, log_z, label_scale, softmax_scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Overwrites logits by `softmax * softmax_scale - onehot * label_scale`. Grid: rows, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + row * WIDTH + columns
    values = tl.load(places, mask=columns < WIDTH, other=-float("inf")).to(tl.float32)
    softmax = tl.exp(values - tl.load(log_z + row)) * tl.load(softmax_scale + row)
    softmax -= tl.where(columns == tl.load(labels + row), tl.load(label_scale + row), 0.0)
    tl.store(places, softmax.to(logits.dtype.element_ty), mask=columns < WIDTH)
