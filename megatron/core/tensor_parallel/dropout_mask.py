"""Masks of dropout that differ between ranks whose generators are in the same state, on any device.

An operator, so that torch.compile, which knows no generators but torch's default ones, takes it as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.extensions.seeds import seed

LIBRARY = torch.library.Library("megatron_t5", "FRAGMENT")
LIBRARY.define("dropout_mask(Tensor x, Tensor seed, float p) -> Tensor")


def dropout_mask(x: Tensor, p: float, stream: int) -> Tensor:
    """Which elements of `x` are kept, each with probability `1 - p`: bool of its shape.

    A function of `stream` and of a seed that is drawn from torch's default generator for the CPU.
    """
    mask: Tensor = torch.ops.megatron_t5.dropout_mask(x.detach(), seed(stream), p)
    return mask


def _draw(x: Tensor, seed: Tensor, p: float) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p, generator=generator)


LIBRARY.impl("dropout_mask", _draw, "CompositeExplicitAutograd")
torch.library.register_fake(
    "megatron_t5::dropout_mask", lambda x, seed, p: torch.empty_like(x, dtype=torch.bool), lib=LIBRARY
)
