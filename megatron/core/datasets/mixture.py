"""Mixing datasets: which one gives position k of an endless stream, as a pure function of k.

After any number k of draws, a dataset with share p has had p * k of them but for about one. The datasets are leaves of
a Huffman tree over their shares; a node that has had k draws has passed round(k * f) of them to its left child, where f
is the left child's part of its share. So a draw is placed by walking down the tree, in a few nanoseconds and without
state, and the roundings on the way hardly add up: a leaf's error is at most half the sum of p / (share of the node)
over the nodes on its path, of which every other is at least twice as large, and below 1.7 for any shares.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets import packing_helpers


class Mixture:
    """A stream of draws from datasets in given proportions.

    Attributes:
        fractions: Of each node, the left child's part of the share in units of 2**-64.  # [n - 1] uint64
        children: Its two children: a node, or ~leaf.  # [n - 1, 2] int32
    """

    def __init__(self, rates: Sequence[int]) -> None:
        """Build the tree.

        Args:
            rates: Positive shares of the datasets, in any unit; whole numbers, which no platform rounds differently.
        """
        assert rates and min(rates) > 0
        # Ties go by the order of making, so that the tree is determined.
        heap = [(rate, n, ~n) for n, rate in enumerate(rates)]
        heapq.heapify(heap)
        joins: list[tuple[int, int, int]] = []  # fraction, left and right child; the last one is the root
        while len(heap) > 1:
            right, left = heapq.heappop(heap), heapq.heappop(heap)
            total = left[0] + right[0]
            joins.append(((left[0] << 64) // total, left[2], right[2]))
            heapq.heappush(heap, (total, len(rates) + len(joins), len(joins) - 1))
        last = len(joins) - 1
        nodes = [(fraction, *(last - c if c >= 0 else c for c in children)) for fraction, *children in reversed(joins)]
        self.fractions = np.array([node[0] for node in nodes], np.uint64)
        self.children = np.array([node[1:] for node in nodes], np.int32).reshape(-1, 2)

    def draws(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Dataset of each position `[m]` of the stream, and how many earlier positions were the same dataset's."""
        return packing_helpers.mixture_draws(self.fractions, self.children, positions)
