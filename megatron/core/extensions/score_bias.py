"""What is added to attention scores: masks and the relative position bias.

Shapes: b batch, n heads, q query length, k key length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.extensions.attention import AttentionBackend

# T5X's value.
MASKED_SCORE = -1e10


def masked_score(dtype: torch.dtype) -> float:
    """What is added to the scores of hidden keys.

    Finite with any score added, so that a row whose keys are all masked (padding) gives a uniform softmax and not NaN.
    """
    return max(MASKED_SCORE, torch.finfo(dtype).min / 2)


class Segments(NamedTuple):
    """Which keys a query may attend to: those of its own segment.

    Segment ids number the documents packed into a row from 1; 0 is padding. What padding sees matters to nobody, and
    backends differ in it.

    Attributes:
        query: int32 `[b, q]`; None where every query sees all keys that are no padding.
        key: int32 `[b or 1, k]`.
    """

    query: Tensor | None
    key: Tensor

    @staticmethod
    def of(query: Tensor | None, key: Tensor | None, key_mask: Tensor | None = None) -> Segments | None:
        """Of segment ids, or of a mask; None when every key is visible.

        Args:
            query: Segment ids `[b, q]`, or None.
            key: Segment ids `[b, k]`; given exactly when `query` is.
            key_mask: bool `[b, k]`, True for real tokens; used when there are no segments.

        Raises:
            ValueError: Only one of the two sides has segments.
        """
        if (query is None) != (key is None):
            raise ValueError("segment ids must be given for the encoder and the decoder, or for neither")
        if query is not None and key is not None:
            return Segments(query.int(), key.int())
        return None if key_mask is None else Segments(None, key_mask.int())

    def visible(self) -> Tensor:
        """bool `[b, 1, q or 1, k]`."""
        key = self.key[:, None, None, :]
        return key != 0 if self.query is None else self.query[:, None, :, None] == key


def additive_mask(segments: Segments | None, dtype: torch.dtype) -> Tensor | None:
    """What segments add to the scores, `[b, 1, q or 1, k]`: 0, or `masked_score` where a key is not visible."""
    if segments is None:
        return None
    visible = segments.visible()
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, masked_score(dtype))


class ScoreBias(NamedTuple):
    """What is added to the scores of queries and keys before the softmax, masks included.

    T5's relative position bias depends on key position - query position alone. It is a vector here, one number for each
    diagonal of the scores, so that an operator need not read a matrix for each head, nor write one as its gradient; a
    causal mask is a flag, and segments are ids, so that nothing is computed for what they hide. `dense` is for
    operators that take a matrix.

    Attributes:
        query_length: q.
        key_length: k.
        diagonals: fp32 `[n, q + k - 1]` by ascending key position - query position, or None.
        mask: Additive, `[b or 1, n or 1, q or 1, k]`, or None. Beside anything else it only hides: it is 0, or
            `masked_score`.
        causal: Hide the keys after each query.
        segments: Hide the keys of other segments; None: hide none.
        constant_beyond: Diagonals of all distances that reach it are equal, on either side; None where that is not
            known.
        backend: The `AttentionBackend` for which this was prepared; None: any can take it.
        prepared: What that backend has made of it, once for all layers.
    """

    query_length: int
    key_length: int
    diagonals: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    segments: Segments | None = None
    constant_beyond: int | None = None
    backend: AttentionBackend | None = None
    prepared: Any = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is added, but for what `causal` hides."""
        return self.diagonals is None and self.mask is None and self.segments is None

    def with_mask(self, dtype: torch.dtype) -> ScoreBias:
        """The same with segments as an additive mask."""
        if self.segments is None:
            return self
        assert self.mask is None
        return self._replace(mask=additive_mask(self.segments, dtype), segments=None)

    def as_matrix(self, dtype: torch.dtype, device: torch.device) -> ScoreBias:
        """The same with everything in `mask`."""
        return ScoreBias(self.query_length, self.key_length, mask=self.dense(dtype, device), backend=self.backend)

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
        mask = self.with_mask(dtype).mask
        if mask is None:
            return bias
        if bias is None:
            return mask.to(dtype)
        # Not their sum, which could leave the range of fp16 where both hide a key.
        return bias.masked_fill(mask != 0, masked_score(dtype))
