"""Times tile sizes, warps and stages of our attention kernels beside those of their table.

Every kernel is timed on its own, on tensors that the kernels before it have written. All variants are compiled first,
by as many processes as there are cores, which leave them in Triton's cache.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from attention_contenders import Shape
from attention_launches import TILED, launches
from attention_timing import timed_call

# Rows, columns, warps and stages of the tiles of each kernel. The bias's are square, and no larger than the rows of the
# queries' gradient.
GRIDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "queries": ((64, 128), (32, 64), (4, 8), (1, 2, 3)),
    "keys": ((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
    "bias": ((32, 64), (0,), (4, 8), (1, 2, 3)),
}
TINY_GRIDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "forward": ((16, 32), (16,), (4,), (2,)),
    "queries": ((16, 32), (16,), (4,), (2,)),
    "keys": ((16,), (16, 32), (4,), (2,)),
    "bias": ((16,), (0,), (4,), (2,)),
}
ROUNDS = 5


def shapes(tiny: bool) -> list[Shape]:
    """What the table is chosen by, the most important first."""
    if tiny:
        return [Shape(1, 1, 20, 16, False, torch.float32)]
    return [
        Shape(16384 // length, 12, length, channels, causal)
        for causal, length, channels in product((False, True), (512, 2048), (64, 128))
    ]


def variants(kernel: str, table: Any, grid: tuple[tuple[int, ...], ...]) -> Iterator[Any]:
    """All tiles of a step, of which those of one kernel differ from the table's; the table's own first."""
    from megatron.core.extensions.triton_attention_tiles import Tile

    yield table
    for rows, columns, warps, stages in product(*grid):
        tile = Tile(rows, columns or rows, warps, stages)
        if tile == getattr(table, kernel):
            continue
        tiles = table._replace(**{kernel: tile})
        # Both have to agree on what is far.
        if kernel == "queries":
            side = tile.columns
            if tile.rows % side:
                continue
            tiles = tiles._replace(bias=Tile(side, side, *table.bias[2:]))
        if kernel == "bias":
            tiles = tiles._replace(queries=Tile(max(tile.rows, table.queries.rows), tile.rows, *table.queries[2:]))
        yield tiles


def _compile(shape: Shape, kernel: str, tiles: Any) -> None:
    """Into Triton's cache."""
    try:
        launch = launches(shape, torch.device("meta"), tiles=tiles)[kernel]
        launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.meta)
    except Exception as error:  # the process that times it will say so
        print(f"not compiled: {kernel} {getattr(tiles, kernel)}: {type(error).__name__}", flush=True)


def measure_variants(
    shape: Shape,
    device: torch.device,
    tiny: bool,
    add: Callable[[dict[str, Any]], None],
    remaining_s: Callable[[], float],
) -> None:
    """A row of each variant of each kernel."""
    from megatron.core.extensions.triton_attention_tiles import choose_tiles

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    table = choose_tiles(capability, shape.channels, shape.dtype.itemsize)
    grids = TINY_GRIDS if tiny else GRIDS
    wanted = [(kernel, tiles) for kernel in TILED for tiles in variants(kernel, table, grids[kernel])]
    if device.type == "cuda":
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            for _ in pool.map(partial(_compile, shape), *zip(*wanted, strict=True)):
                pass
    for kernel, tiles in wanted:
        if remaining_s() < 0:
            return
        add(_timed(shape, device, kernel, tiles, of_table=tiles is table))


def _timed(shape: Shape, device: torch.device, kernel: str, tiles: Any, *, of_table: bool) -> dict[str, Any]:
    tile = getattr(tiles, kernel)
    row = {
        "kernel": kernel, "variant": f"{tile.rows}x{tile.columns} {tile.warps} {tile.stages}", "of_table": of_table,
        **shape.described(),
    }  # fmt: skip
    try:
        all_launches = launches(shape, device, tiles=tiles)
        for name, launch in all_launches.items():
            launch.run()
            if name == kernel:
                break
        call = timed_call([all_launches[kernel].run], device, graph=True)
        row["ms"] = round(statistics.median(call.milliseconds() for _ in range(ROUNDS)), 5)
    except Exception as error:  # tiles that do not fit
        row["error_message"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row
