"""Seeds of dropout, for operators whose backward pass draws the same random bits again."""

from __future__ import annotations

import torch
from torch import Tensor


def seed(stream: int = 0) -> Tensor:
    """A new seed, int64 `[]` on the CPU, never negative.

    Drawn from torch's default generator for the CPU, so that what restores its state for a recomputation gets the same
    dropout, whatever the default device is.

    Args:
        stream: Tells ranks apart that draw the same seed and are to drop different places.
    """
    drawn = torch.randint(2**62, (), dtype=torch.int64, device="cpu")
    return drawn + stream if stream else drawn
