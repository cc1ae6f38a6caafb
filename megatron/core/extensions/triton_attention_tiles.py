"""Sizes of the tiles that attention in Triton computes.

Chosen from tables, not tried out: all ranks agree, and the first step is no slower than it must be.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Of one kernel: rows (queries) and columns (keys) of a tile, warps, and stages of the pipeline of loads."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2


class Tiles(NamedTuple):
    """Tiles of the kernels: forward, gradients of keys and values, gradient of queries, gradient of the bias.

    The bias's are square, their side is the columns of the queries' gradient, and divides the rows of that: both
    kernels have to agree on what is far.
    """

    forward: Tile
    keys: Tile
    queries: Tile
    bias: Tile


# By bytes of an element and padded head width. Chosen by the registers and the shared memory that compiled kernels
# take: more than what a thread can have is kept in memory, and that is slow.
TILES_OF_HOPPER = {
    (2, 64): Tiles(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    (2, 128): Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    (2, 256): Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 8, 1), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    (4, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    (4, 128): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
    (4, 256): Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
}
TILES_OF_AMPERE = {
    (2, 64): Tiles(Tile(128, 64, 8, 3), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (2, 128): Tiles(Tile(64, 64, 4, 2), Tile(32, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)),
    (2, 256): Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 2)),
    (4, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (4, 128): Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
    (4, 256): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
# Small, so that short sequences have many tiles.
TILES_OF_INTERPRETER = Tiles(Tile(64, 32), Tile(32, 64), Tile(64, 32), Tile(32, 32))


def choose_tiles(capability: tuple[int, int] | None, head_dim: int, element_size: int) -> Tiles:
    """Tiles for a compute capability; None: for the interpreter."""
    if capability is None:
        return TILES_OF_INTERPRETER
    table = TILES_OF_HOPPER if capability in ((9, 0), (10, 0), (10, 3)) else TILES_OF_AMPERE
    return table[element_size, max(64, padded(head_dim))]


def padded(head_dim: int) -> int:
    """The power of two that holds a head's channels."""
    return max(16, 1 << (head_dim - 1).bit_length())
