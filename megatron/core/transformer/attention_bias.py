"""Masks of attention, as one additive bias for all layers of a stack.

Shapes: b batch, n heads, q query length, k key length. Segment ids number the documents packed into a row from 1; 0 is
padding. A query sees the keys of its own segment; what padding sees matters to nobody.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# T5X's value.
MASKED_SCORE = -1e10


def masked_score(dtype: torch.dtype) -> float:
    """What is added to the scores of hidden keys.

    Finite with any score added, so that a row whose keys are all masked (padding) gives a uniform softmax and not NaN.
    """
    return max(MASKED_SCORE, torch.finfo(dtype).min / 2)


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


def visible_keys(
    query_segments: Tensor | None, key_segments: Tensor | None, key_mask: Tensor | None = None
) -> Tensor | None:
    """Which keys a query may attend to: bool `[b, 1, q or 1, k]`, or None for all.

    Args:
        query_segments: `[b, q]`, or None.
        key_segments: `[b, k]`; given exactly when `query_segments` is.
        key_mask: bool `[b, k]`, True for real tokens; used when there are no segments.

    Raises:
        ValueError: Only one of the two sides has segments.
    """
    if (query_segments is None) != (key_segments is None):
        raise ValueError("segment ids must be given for the encoder and the decoder, or for neither")
    if query_segments is not None and key_segments is not None:
        return query_segments[:, None, :, None] == key_segments[:, None, None, :]
    return None if key_mask is None else key_mask[:, None, None, :]


def causal_bias(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Additive bias `[1, 1, length, length]` that hides the keys after each query."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return torch.zeros(length, length, dtype=dtype, device=device).masked_fill(hidden, masked_score(dtype))[None, None]


def masked_bias(bias: Tensor | None, visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`bias` `[1, 1 or n, q, k]` with `masked_score` where `visible` `[b, 1, q or 1, k]` is False.

    Without a mask the bias keeps its batch dimension of 1; without a bias the mask keeps its head dimension of 1.
    """
    if visible is None:
        return bias
    if bias is None:
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, masked_score(dtype))
    return bias.masked_fill(~visible, masked_score(bias.dtype))
