"""T5's relative position bias (Raffel et al. 2020, section 2.1): a learned scalar for each head and distance bucket.

One table serves a whole stack. The bias depends on `key position - query position` only, so it is looked up for the
`query_length + key_length - 1` distinct distances, the diagonals of the score matrix; the gradient of the table is then
a sum along diagonals and never a scatter of `query_length * key_length` values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.parameters import Init, ParamSpec, local_tensor
from megatron.core.transformer.initialization import matrix_init


def relative_position_bucket(
    relative_position: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """Bucket of `key position - query position`, int64 of the same shape.

    Small distances have a bucket each, larger ones share buckets that widen logarithmically up to `max_distance`, and
    all beyond fall into the last one. Bidirectional: half of the buckets for keys after the query. Causal: keys after
    the query share bucket 0 with distance 0 (attention masks them).
    """
    if bidirectional:
        num_buckets //= 2
        offset = (relative_position > 0).long() * num_buckets
        distance = relative_position.abs()
    else:
        offset = torch.zeros_like(relative_position)
        distance = -relative_position.clamp(max=0)
    exact = num_buckets // 2
    # fp64 with a small margin gives the exact floor at powers on every device; fp32 logarithms differ in the last bit.
    share = (distance.clamp(min=1).double() / exact).log() / math.log(max_distance / exact)
    logarithmic = exact + (share * (num_buckets - exact) + 1e-9).floor().long()
    return offset + torch.where(distance < exact, distance, logarithmic.clamp(max=num_buckets - 1))


def constant_beyond(bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """Distance from which all keys of a side share a bucket, at most `max_distance`."""
    distances = torch.arange(max_distance + 1, device="cpu")
    buckets = relative_position_bucket(
        -distances, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    return int((buckets < buckets[-1]).sum())


class RelativePositionBias(nn.Module):
    """The bias table of one stack, its heads divided among the tensor-parallel ranks.

    Args:
        config: Heads, buckets and largest distance.
        bidirectional: True for the encoder; the decoder's tells keys before the query apart.

    Attributes:
        constant_beyond: Distance from which all keys of a side share a bucket.
    """

    def __init__(self, config: ModelConfig, *, bidirectional: bool) -> None:
        super().__init__()
        heads, buckets = config.num_attention_heads, config.relative_attention_num_buckets
        self.bidirectional = bidirectional
        self.num_buckets = buckets
        self.max_distance = config.relative_attention_max_distance
        self.constant_beyond = constant_beyond(bidirectional, buckets, self.max_distance)
        self.weight = nn.Parameter(torch.empty(heads, buckets))
        if config.init_method_std is None:  # T5X: variance scaling, fan_avg, uniform
            init = Init("uniform", ((6.0 / (heads + buckets)) ** 0.5,))
        else:
            init = matrix_init(config, 0.0)
        self.parameter_specs = {"weight": ParamSpec(("heads", "buckets"), init, weight_decay=False)}

    def forward(self, query_length: int, key_length: int) -> Tensor:
        """Bias of each diagonal of the scores, `[n', q + k - 1]` by ascending key position - query position.

        In the dtype of the table, for the n' heads of this rank (`extensions.score_bias.ScoreBias`).
        """
        return self._values(torch.arange(1 - query_length, key_length, device=self.weight.device))

    def last_row(self, length: int, dtype: torch.dtype) -> Tensor:
        """Bias `[n', length]` of the last of `length` positions to all of them; its end is the row of earlier ones."""
        return self._values(torch.arange(1 - length, 1, device=self.weight.device)).to(dtype)

    def _values(self, distances: Tensor) -> Tensor:
        """`[d]`, key position less query position, to `[n', d]`."""
        buckets = relative_position_bucket(
            distances,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return local_tensor(self.weight)[:, buckets]
