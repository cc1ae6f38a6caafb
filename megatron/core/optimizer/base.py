"""What the trainer and the checkpoint need from an optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch.distributed import all_reduce

from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ModelParameter, ParamSpec, local_tensor, sharded_axes

# Replaces each tensor, in place, by the one that the owner of the shared parameter of that name has. The names are
# sorted, so that the ranks that hold copies meet in the same order; every rank calls it equally often in a step.
Synchronize: TypeAlias = Callable[[dict[str, torch.Tensor]], None]


class Optimizer(ABC):
    """Updates the parameters of a model from their gradients.

    All state is allocated at construction, so build the optimizer after the parameters have been materialised; loading
    a checkpoint then fills the tensors of `named_state` in place. Copies of a shared parameter have state of their own
    and take the same steps; of two on one rank, only the first is in `named_state` (see `refresh_copies`).

    Args:
        parameters: What this rank holds, of all its stages.
        context: The layout.
        synchronize: Makes sums over shared parameters bit-equal to their owners'. None when all copies are on this
            rank.

    Attributes:
        names: Global name of each parameter.
        parameters: The parameters: plain, or DTensors divided over dp (dimension 0) and tp (dimension 0 or 1).
        specs: What each parameter is.
        shapes: Global shape of each parameter without padding.
        shared: Whether each parameter has copies, here or on other pipeline ranks.
        is_copy: Whether a lower stage holds each parameter too.
        sharding_group: Ranks over which any parameter is divided, or None.
        contributes: Whether this rank's part of each parameter goes into sums over that group.
        copies: (index, index of the first parameter of the same name) of the further ones on this rank.
        step_count: Number of updates so far, 0-dimensional float32.
    """

    step_count: torch.Tensor

    def __init__(
        self, parameters: Sequence[ModelParameter], context: ParallelContext, synchronize: Synchronize | None = None
    ) -> None:
        self.names = [p.name for p in parameters]
        self.parameters = [p.parameter for p in parameters]
        self.specs: list[ParamSpec] = [p.spec for p in parameters]
        self.shapes = [p.shape for p in parameters]
        self.shared = [p.shared for p in parameters]
        self.is_copy = [p.is_copy for p in parameters]
        first = {name: index for index, name in reversed(list(enumerate(self.names)))}
        self.copies = [(index, first[name]) for index, name in enumerate(self.names) if first[name] != index]
        self.context = context
        self.synchronize = synchronize
        axes = [sharded_axes(parameter) for parameter in self.parameters]
        over_dp, over_tp = any("dp" in a for a in axes), any("tp" in a for a in axes)
        self.sharding_group = context.sharding_group(over_dp=over_dp, over_tp=over_tp)
        # Of the replicas of a parameter within that group, one contributes to a sum.
        counts_dp, counts_tp = not over_dp or context.dp_rank == 0, not over_tp or context.tp_rank == 0
        self.contributes = [("dp" in a or counts_dp) and ("tp" in a or counts_tp) for a in axes]

    @abstractmethod
    def step(self, lr: float, divisor: torch.Tensor | None = None, skip: torch.Tensor | None = None) -> None:
        """Update the parameters in place; the gradients may be overwritten.

        Args:
            lr: Learning rate.
            divisor: Of all gradients, 0-dimensional: loss scale and clipping, without a pass of their own over them.
            skip: 0-dimensional bool on the device, the same on all ranks: change nothing, neither parameters nor state
                nor the count of steps, whatever the gradients are. The host need not know. None: do not skip.
        """

    def count_step(self, skip: torch.Tensor | None) -> None:
        """Count an update, unless it is skipped."""
        if skip is None:
            self.step_count += 1
        else:
            self.step_count += skip.logical_not()

    @abstractmethod
    def parameter_state(self, index: int) -> dict[str, torch.Tensor]:
        """State tensors of one parameter by kind (`exp_avg`), placed like the parameter."""

    def state_shape(self, index: int, kind: str) -> torch.Size:
        """Global shape of a state tensor of one parameter without padding."""
        return self.shapes[index]

    def sum_over_ranks(self, sums: torch.Tensor, indices: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Add shares of sums over whole parameters, in place and in one all-reduce; the same bits wherever they end.

        Args:
            sums: This rank's shares, float64; zero for parameters to which it does not contribute.
            indices: Parameter of each piece of `sums`.
            sizes: Length of each piece.
        """
        if self.sharding_group is not None:
            all_reduce(sums, group=self.sharding_group)
        if not any(self.shared):
            return sums
        # The order of a summation can depend on the place in the buffer: copies take the owner's totals.
        pieces: dict[int, list[torch.Tensor]] = {}
        for index, piece in zip(indices, sums.split(list(sizes)), strict=True):
            if self.shared[index]:
                pieces.setdefault(index, []).append(piece)
        first = dict(self.copies)
        totals = {self.names[i]: torch.cat(pieces[i]) for i in pieces if i not in first}
        if self.synchronize is not None:
            self.synchronize(dict(sorted(totals.items())))
        for index, parts in pieces.items():
            total = totals[self.names[index]]
            for part, value in zip(parts, total.split([p.numel() for p in parts]), strict=True):
                part.copy_(value)
        return sums

    def named_state(self, owned_only: bool = False) -> dict[str, torch.Tensor]:
        """The step count and all state tensors by checkpoint name, `optimizer/<kind>/<parameter>`.

        `owned_only` leaves out what other ranks own, which is what a checkpoint is to hold.
        """
        state = {"optimizer/step": self.step_count}
        further = {index for index, _ in self.copies}
        for index, name in enumerate(self.names):
            if index not in further and not (owned_only and self.is_copy[index]):
                named = self.parameter_state(index).items()
                state.update({f"optimizer/{kind}/{name}": tensor for kind, tensor in named})
        return state

    def named_shapes(self) -> dict[str, torch.Size]:
        """Global shape without padding of each tensor that `named_state` may have."""
        shapes = {"optimizer/step": self.step_count.shape}
        for index, name in enumerate(self.names):
            for kind in self.parameter_state(index):
                shapes[f"optimizer/{kind}/{name}"] = self.state_shape(index, kind)
        return shapes

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Give further copies on this rank the value and state of the first, after a checkpoint has been loaded."""
        for index, first in self.copies:
            local_tensor(self.parameters[index].detach()).copy_(local_tensor(self.parameters[first].detach()))
            state, source = self.parameter_state(index), self.parameter_state(first)
            for kind, tensor in state.items():
                local_tensor(tensor).copy_(local_tensor(source[kind]))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def local_parameters(self) -> list[torch.Tensor]:
        """The part of each parameter that this rank holds (not kept: sharding may move it)."""
        return [local_tensor(parameter.detach()) for parameter in self.parameters]

    def local_gradients(self) -> list[torch.Tensor]:
        """The part of each gradient that this rank holds, contiguous."""
        gradients = []
        for name, parameter in zip(self.names, self.parameters, strict=True):
            assert parameter.grad is not None, f"{name} has no gradient"
            # A DTensor's gradient has the layout that the backward pass happened to produce.
            gradients.append(local_tensor(parameter.grad).contiguous())
        return gradients
