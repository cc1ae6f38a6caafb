"""Rotary position embedding (Su et al. 2021) of queries and keys, the two halves of the channels as pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.config import ModelConfig


class RotaryAngles(NamedTuple):
    """Cosines and sines `[s, 1, r/2]` for positions 0 .. s - 1, where r channels of each head are rotated."""

    cos: Tensor
    sin: Tensor


def rotary_angles(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> RotaryAngles:
    """Angles `position * base^(-2 i / r)`, computed in fp32 or better and cast to `dtype`."""
    rotated = int(config.kv_channels * config.rotary_percent)
    precision = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, rotated, 2, device=device, dtype=precision) / rotated
    positions = torch.arange(length, device=device, dtype=precision)
    angles = torch.outer(positions, float(config.rotary_base) ** -exponents)[:, None, :]
    return RotaryAngles(angles.cos().to(dtype), angles.sin().to(dtype))


def apply_rotary(x: Tensor, angles: RotaryAngles) -> Tensor:
    """Rotate the first r channels of `x` `[b, s, n, d]`; the others pass unchanged."""
    half = angles.cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated_first = first * angles.cos - second * angles.sin
    rotated_second = second * angles.cos + first * angles.sin
    return torch.cat((rotated_first, rotated_second, rest), dim=-1)
