"""Attention on CPUs as one operator. (Its author replaces this file; until then nothing is supported.)"""

from __future__ import annotations

from typing import Any

import torch


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attention` computes with tensors of this device and dtype."""
    return False


def attention(*arguments: Any, **options: Any) -> torch.Tensor:
    """To come."""
    raise NotImplementedError
