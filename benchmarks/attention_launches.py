"""The launches of our attention kernels one by one, to be timed or compiled on their own.

Shapes: b batch, n heads, s sequence, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from attention_contenders import BUCKETS, MAX_DISTANCE, Shape, buckets

# The kernels whose tiles are in the table, by the field of theirs.
TILED = {"forward": "forward", "queries": "queries", "keys": "keys", "bias": "bias"}


def launches(
    shape: Shape, device: torch.device, *, tiles: Any, bias: bool = True, segments: bool = False, dropout: float = 0.0
) -> dict[str, Any]:
    """Launches of the forward and the backward pass of self-attention of a fused projection, in their order.

    On the device `meta` nothing is computed: they tell what would be launched. Elsewhere, each finds what the ones
    before it have written.
    """
    from megatron.core.extensions import triton_attention as ours

    size = (shape.batch, shape.length, shape.heads)
    fused = torch.empty(*size, 3, shape.channels, dtype=shape.dtype, device=device).normal_()
    fused[..., 0, :] *= shape.channels**-0.5
    context = torch.empty(*size, shape.channels, dtype=shape.dtype, device=device)
    gradient = torch.empty_like(context).normal_()
    statistics = torch.empty(shape.batch, shape.heads, shape.length, device=device)
    delta = torch.empty_like(statistics)
    diagonals = None
    if bias:
        diagonals = torch.empty(shape.heads, BUCKETS, device=device).normal_()[:, buckets(shape, device)]
    ids = torch.ones(shape.batch, shape.length, dtype=torch.int32, device=device) if segments else None
    seed = torch.ones(1, dtype=torch.int64, device=device) if dropout else None
    beyond = MAX_DISTANCE if bias else None
    problem = ours.Problem.of(
        fused, None, None, diagonals, ids, ids, seed, shape.causal, 1.0, beyond, dropout, tiles=tiles
    )
    query, key, value = torch.empty_like(fused).unbind(-2)
    row_tiles = shape.batch * -(-shape.length // tiles.queries.rows)
    far_sums = torch.empty(2, shape.heads, row_tiles, device=device) if bias else None
    found = {
        "forward": ours.forward_launch(problem, context, statistics),
        "queries": ours.query_gradient_launch(problem, gradient, context, statistics, delta, query, far_sums),
        "keys": ours.key_gradient_launch(problem, gradient, statistics, delta, key, value),
    }
    if bias:
        sums = ours.BiasSums.of(problem)
        partial_sums = torch.empty(sums.shape(shape.heads), device=device)
        result = torch.empty(shape.heads, 2 * shape.length - 1, device=device)
        found["bias"] = ours.bias_gradient_launch(problem, sums, gradient, statistics, delta, partial_sums)
        found["sums"] = ours.sum_launch(problem, sums, partial_sums, far_sums, result)
    return found
