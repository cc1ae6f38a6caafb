"""Sum of many gradients over a group of ranks in few collectives."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.tensor import DTensor

from megatron.core.parameters import buckets, local_tensor

# Gradients are summed in buffers of at most this size, or that of the largest gradient.
BUFFER_MIB = 64


@torch.no_grad()
def all_reduce_gradients_(parameters: Iterable[nn.Parameter], group: ProcessGroup | None) -> None:
    """Sum the gradients (of DTensors: the parts that the ranks hold) of `parameters` over `group`, in place.

    Gradients are copied into buffers, which are summed in one all-reduce each and then serve as the gradients. A
    parameter without a gradient must be so on all ranks of the group. None as the group: nothing is done.
    """
    if group is None or group.size() == 1:
        return
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    sizes = [local_tensor(parameter.detach()).nbytes for parameter in with_gradient]
    for indices in buckets(sizes, BUFFER_MIB * 2**20):
        bucket = [with_gradient[index] for index in indices]
        gradients = [local_tensor(parameter.grad) for parameter in bucket]  # type: ignore[arg-type]
        buffer = torch.cat([gradient.flatten() for gradient in gradients])
        all_reduce(buffer, group=group)
        pieces = buffer.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, piece in zip(bucket, gradients, pieces, strict=True):
            parameter.grad = _with_local(parameter, piece.view(gradient.shape))


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
