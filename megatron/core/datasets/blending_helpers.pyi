"""Types of the C++ extension built from blending_helpers.cpp."""

import numpy as np
from numpy.typing import NDArray

class BlendOrder:
    """The order in which datasets give the samples of a blend; may be used by several threads.

    Attributes:
        block_length: Positions that at most are walked to reach any one.
    """

    block_length: int

    def __init__(self, rates: NDArray[np.int64], least_block: int = 4096) -> None:
        """Prepare the order.

        Args:
            rates: int64 [d], shares of the datasets in any unit: at least 1, and 2**-28 of their sum, which is at most
                2**62.
            least_block: Blocks are not shorter; another length gives another order.

        Raises:
            ValueError: An argument is out of these bounds.
        """

    def draws(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Which dataset gives each position, and how many of the positions before were its.

        Args:
            positions: int64 [m], in [0, 2**62), in any order; quickest ascending, call after call.

        Returns:
            Datasets, int32 [m], and draws, int64 [m].
        """

    def counts(self, position: int) -> NDArray[np.int64]:
        """Draws of each dataset before `position`, int64 [d]."""
