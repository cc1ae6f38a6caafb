"""Masks and segment ids of the two stacks, on their way to the attention backends.

Shapes: b batch, s sequence. Segment ids number the documents packed into a row from 1; 0 is padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_segments(mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """Segment ids with masked tokens counted as padding, or None when there are no segments."""
    if segment_ids is None or mask is None:
        return segment_ids
    return segment_ids.masked_fill(~mask, 0)


def pad_masks(
    mask: Tensor | None, segment_ids: Tensor | None, length: int, padding: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and segment ids `[b, s]` of a sequence of `length` s with `padding` more tokens, which nothing may see.

    Without either, the mask that is made is `[1, s + padding]`.
    """
    if not padding:
        return mask, segment_ids
    if mask is None and segment_ids is None:
        mask = torch.ones(1, length, dtype=torch.bool, device=device)
    padded_mask = None if mask is None else F.pad(mask, (0, padding))
    return padded_mask, None if segment_ids is None else F.pad(segment_ids, (0, padding))
