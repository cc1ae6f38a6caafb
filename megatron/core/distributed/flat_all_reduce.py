"""Sum of many gradients over a group of ranks in few collectives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed import ProcessGroup, Work, all_reduce
from torch.distributed.tensor import DTensor

from megatron.core.parameters import buckets, local_tensor

# Gradients are summed in buffers of at most this size, or that of the largest gradient.
BUFFER_MIB = 64


@torch.no_grad()
def all_reduce_gradients_(parameters: Iterable[nn.Parameter], group: ProcessGroup | None) -> None:
    """Sum the gradients (of DTensors: the parts that the ranks hold) of `parameters` over `group`, in place.

    A parameter without a gradient must be so on all ranks of the group. None as the group: nothing is done.
    """
    if group is None or group.size() == 1:
        return
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    for indices in buckets(gradient_sizes(with_gradient), BUFFER_MIB * 2**20):
        work = start_all_reduce([with_gradient[index] for index in indices], group)
        if work is not None:
            work.wait()


def gradient_sizes(parameters: Sequence[nn.Parameter]) -> list[int]:
    """Bytes of the gradients of the parts that this rank holds."""
    return [local_tensor(parameter.detach()).nbytes for parameter in parameters]


@torch.no_grad()
def start_all_reduce(parameters: Sequence[nn.Parameter], group: ProcessGroup) -> Work | None:
    """Begin to sum the gradients of `parameters` over `group`, in one all-reduce.

    Gradients are joined in a buffer, of which they are views from then on; what held them before is let go. One alone
    is summed where it is. They must be left alone until the returned work is done. None: there is no gradient.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if not with_gradient:
        return None
    gradients = [local_tensor(parameter.grad) for parameter in with_gradient]  # type: ignore[arg-type]
    flat = [gradient.flatten() for gradient in gradients]  # without a copy where it is contiguous
    buffer = flat[0] if len(flat) == 1 else torch.cat(flat)
    pieces = buffer.split([gradient.numel() for gradient in gradients])
    for parameter, gradient, piece in zip(with_gradient, gradients, pieces, strict=True):
        parameter.grad = _with_local(parameter, piece.view(gradient.shape))
    return all_reduce(buffer, group=group, async_op=True)


def _with_local(parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    """`local` as a gradient of `parameter`: of its global shape and placement."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
