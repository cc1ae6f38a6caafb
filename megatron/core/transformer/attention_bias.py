"""What is added to attention scores: masks and the relative position bias, for all layers of a stack.

Shapes: b batch, n heads, q query length, k key length. Segment ids number the documents packed into a row from 1; 0 is
padding. A query sees the keys of its own segment; what padding sees matters to nobody.
"""

from __future__ import annotations

from typing import NamedTuple

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


def additive_mask(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`visible` `[b, 1, q or 1, k]` as what is added to scores: 0, or `masked_score` where it is False."""
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, masked_score(dtype))


class ScoreBias(NamedTuple):
    """What is added to the scores of queries and keys before the softmax, masks included.

    T5's relative position bias depends on key position - query position alone. It is a vector here, one number for each
    diagonal of the scores, so that an operator need not read a matrix for each head, nor write one as its gradient; a
    causal mask is a flag, so that nothing is computed for what it hides. `dense` is for operators that take a matrix.

    Attributes:
        query_length: q.
        key_length: k.
        diagonals: fp32 `[n, q + k - 1]` by ascending key position - query position, or None.
        mask: Additive, `[b or 1, n or 1, q or 1, k]`, or None. Beside diagonals or `causal` it only hides: it is 0, or
            `masked_score`.
        causal: Hide the keys after each query.
    """

    query_length: int
    key_length: int
    diagonals: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False

    def as_matrix(self, dtype: torch.dtype, device: torch.device) -> ScoreBias:
        """The same with everything in `mask`."""
        return ScoreBias(self.query_length, self.key_length, mask=self.dense(dtype, device))

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Everything that is added, `[b or 1, n or 1, q or 1, k]`, or None for nothing."""
        bias = None
        if self.diagonals is not None or self.causal:
            distances = torch.arange(1 - self.query_length, self.key_length, device=device)
            values = torch.zeros(1, len(distances), device=device) if self.diagonals is None else self.diagonals
            if self.causal:
                values = values.masked_fill(distances > 0, masked_score(dtype))
            # Window i of the values holds the distances i - (q - 1) ..., which is the row of query q - 1 - i.
            bias = values.unfold(-1, self.key_length, 1).flip(-2).to(dtype).unsqueeze(0)
        if self.mask is None:
            return bias
        if bias is None:
            return self.mask.to(dtype)
        # Not their sum, which could leave the range of fp16 where both hide a key.
        return bias.masked_fill(self.mask != 0, masked_score(dtype))
