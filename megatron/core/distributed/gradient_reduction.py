"""Sum of the gradients of replicas over the data-parallel ranks, bucket by bucket while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.distributed import ProcessGroup, Work

from megatron.core.distributed.flat_all_reduce import gradient_sizes, start_all_reduce
from megatron.core.parameters import buckets

# Large enough for the full bandwidth of a network, small enough that little is left when the backward pass ends.
BUCKET_MIB = 25


class GradientReduction:
    """Sums gradients over a group, each bucket as soon as a backward pass has made all of it.

    Buckets are runs of the parameters in reverse order, which is about the order in which a backward pass comes to
    them. They are fixed from the start and summed in that order alone, whatever the order in which gradients appear,
    so that all ranks make the same calls. A parameter without a gradient must be so on all ranks of the group; the
    buckets from its own on wait for `finish`.

    Each backward pass accumulates into gradients as usual. After `start`, one more does; `finish` then sums what has
    not been summed yet (everything, without `start`). So what must not be summed must not be started.

    Args:
        parameters: In the order in which a forward pass uses them; their Parameter objects must stay.
        group: The ranks.
        bucket_bytes: Of a bucket, at most, unless a single gradient is larger.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], group: ProcessGroup, bucket_bytes: int = BUCKET_MIB * 2**20
    ) -> None:
        backward = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        self._group = group
        self._buckets = [
            [backward[index] for index in indices] for indices in buckets(gradient_sizes(backward), bucket_bytes)
        ]
        self._missing: list[set[nn.Parameter]] | None = None  # of each bucket; None: not started
        self._works: list[Work | None] = []  # of the buckets begun
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._accumulated, number))

    def start(self) -> None:
        """Let the next backward pass sum what it makes: call it before the last one of a step."""
        assert not self._works, "the last sum has not been finished"
        self._missing = [set(bucket) for bucket in self._buckets]

    def _accumulated(self, bucket: int, parameter: nn.Parameter) -> None:
        """A gradient is whole."""
        if self._missing is None:
            return
        assert parameter in self._missing[bucket], "a second backward pass after `start`"
        self._missing[bucket].remove(parameter)
        while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
            self._begin_next()

    def _begin_next(self) -> None:
        self._works.append(start_all_reduce(self._buckets[len(self._works)], self._group))

    def finish(self) -> None:
        """Sum what has not been summed, and wait until all gradients of the step are their sums."""
        while len(self._works) < len(self._buckets):
            self._begin_next()
        works, self._works, self._missing = self._works, [], None
        for work in works:
            if work is not None:
                work.wait()
