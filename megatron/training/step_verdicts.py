"""Whether steps were finite, found out without making the host wait for the device.

On a GPU the host only queues work. Reading a number of the step just made would stop it until all of that is done, and
then the device, which would have nothing to do until the next step is queued. So the device decides by itself whether
a step changes anything (`Optimizer.step`), and the host learns of it later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.distributed import GradientNorm

# A step is looked at when so many further ones have been queued. The same number on every rank, as what follows from a
# verdict is done by all ranks together. It also is how far the host runs ahead of the device.
STEPS_LATER = 2


def decides_by_itself(device: torch.device, needs_to_know: bool) -> bool:
    """Whether steps on `device` are skipped there, without the host.

    A CPU has nothing to gain. Where the host needs to know before the next step, as fp16's loss scale does, it decides.
    """
    return device.type != "cpu" and not needs_to_know


class Verdict(NamedTuple):
    """What became of one step.

    Attributes:
        step: Its number.
        is_finite: Whether it was made; the same on all ranks.
        loss_is_finite: Of this rank.
        nonfinite_gradients: Parameters of this rank whose gradients were not finite.
    """

    step: int
    is_finite: bool
    loss_is_finite: bool
    nonfinite_gradients: list[str]


class _Pending(NamedTuple):
    step: int
    numbers: Tensor  # on the host: the norm, the sums of the losses, the squares of the parameters `indices`
    indices: list[int]
    copied: torch.cuda.Event | None


class StepVerdicts:
    """The steps of which the host does not know yet whether they were finite.

    Args:
        names: Of this rank's parameters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._pending: deque[_Pending] = deque()
        self._free: list[Tensor] = []  # host memory that was used before

    def add(self, step: int, norm: GradientNorm, loss_sums: Tensor) -> None:
        """Begin to find out about a step.

        Args:
            step: Its number; steps come in order.
            norm: Of its gradients.
            loss_sums: Its losses on this rank, float64 `[2]`.
        """
        numbers = torch.cat([norm.total[None], loss_sums, norm.squares])
        host, copied = self._host_memory(numbers), None
        host.copy_(numbers, non_blocking=True)
        if numbers.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_Pending(step, host, norm.indices, copied))

    def take(self, last_step: int) -> Iterator[Verdict]:
        """The verdicts of the steps up to `last_step` that have not been taken, in order; waits for them."""
        while self._pending and self._pending[0].step <= last_step:
            pending = self._pending.popleft()
            if pending.copied is not None:
                pending.copied.synchronize()
            norm, *others = pending.numbers.tolist()
            self._free.append(pending.numbers)
            losses, squares = others[:2], others[2:]
            bad = [index for index, square in zip(pending.indices, squares, strict=True) if not math.isfinite(square)]
            names = [self._names[index] for index in sorted(bad)]
            yield Verdict(pending.step, math.isfinite(norm), all(map(math.isfinite, losses)), names)

    def _host_memory(self, numbers: Tensor) -> Tensor:
        """Memory for a copy of `numbers`, that of an earlier step if it fits."""
        if self._free and self._free[-1].shape == numbers.shape:
            return self._free.pop()
        return torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
