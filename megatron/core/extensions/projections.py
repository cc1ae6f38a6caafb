"""Query, key and value as attention operators are given them: three tensors, or parts of fused projections.

What comes as one tensor has one gradient, which a backward pass writes in place, so that nobody has to put it together.

Shapes: b batch, n heads, q queries, k keys, s either, d channels of a head.
"""

from __future__ import annotations

from torch import Tensor

from megatron.core.extensions.attention import separate


def fused_count(key: Tensor | None, value: Tensor | None) -> int:
    """How many projections the last given tensor holds."""
    return 3 if key is None else 2 if value is None else 1


def _expanded(tensor: Tensor, batch: int) -> Tensor:
    return tensor if tensor.shape[0] == batch else tensor.expand(batch, *tensor.shape[1:])


def with_equal_batches(
    query: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The projections, those of one row expanded to the batch of the others."""
    sizes = [tensor.shape[0] for tensor in (query, key, value) if tensor is not None]
    batch = next((size for size in sizes if size != 1), 1)
    assert all(size in (1, batch) for size in sizes), sizes
    key, value = (None if tensor is None else _expanded(tensor, batch) for tensor in (key, value))
    return _expanded(query, batch), key, value


def empty_gradients(gradient: Tensor, keys: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the gradients of projections that were given with `count` of them in one tensor.

    Args:
        gradient: Of the attention's result, `[b, q, n, d]`.
        keys: k.
        count: `fused_count`; the gradients that it leaves out are empty.
    """
    batch, queries, heads, channels = gradient.shape
    shapes: dict[int, tuple[tuple[int, ...], ...]] = {
        1: (gradient.shape, (batch, keys, heads, channels), (batch, keys, heads, channels)),
        2: (gradient.shape, (batch, keys, heads, 2, channels), (0,)),
        3: ((batch, queries, heads, 3, channels), (0,), (0,)),
    }
    query, key, value = (gradient.new_empty(shape) for shape in shapes[count])
    return query, key, value


def of_inputs(gradients: tuple[Tensor, ...], count: int) -> tuple[Tensor | None, ...]:
    """The gradients of projections, None where no tensor was given."""
    return tuple(gradient if index <= 3 - count else None for index, gradient in enumerate(gradients[:3]))


def separate_gradients(gradients: tuple[Tensor, ...], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views `[b, s, n, d]` of the gradients, one for each projection."""
    query, key, value = of_inputs(gradients, count)
    assert query is not None
    return separate(query, key, value)
