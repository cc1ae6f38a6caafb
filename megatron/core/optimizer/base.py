"""What the trainer and the checkpoint need from an optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ParamSpec, local_tensor, named_parameter_specs


class Optimizer(ABC):
    """Updates the parameters of a model from their gradients.

    All state is allocated at construction, so build the optimizer after the parameters have been materialised; loading
    a checkpoint then fills the tensors of `named_state` in place.

    Attributes:
        names: Qualified name of each parameter.
        parameters: The parameters: plain tensors (replicated) or DTensors sharded along dimension 0.
        specs: What each parameter is.
        step_count: Number of updates so far, 0-dimensional float32.
    """

    step_count: torch.Tensor

    def __init__(self, model: nn.Module, context: ParallelContext) -> None:
        specs = named_parameter_specs(model)
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [parameter for _, parameter in model.named_parameters()]
        self.specs: list[ParamSpec] = [specs[name] for name in self.names]
        self.context = context

    @abstractmethod
    def step(self, lr: float) -> None:
        """Update the parameters in place with learning rate `lr`; the gradients may be overwritten."""

    @abstractmethod
    def named_state(self) -> dict[str, torch.Tensor]:
        """State tensors by checkpoint name (`optimizer/exp_avg/<parameter>`), placed like their parameters."""

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def local_parameters(self) -> list[torch.Tensor]:
        """The rows of each parameter that this rank holds (not kept: sharding may move them)."""
        return [local_tensor(parameter.detach()) for parameter in self.parameters]

    def local_gradients(self) -> list[torch.Tensor]:
        """The rows of each gradient that this rank holds."""
        gradients = []
        for name, parameter in zip(self.names, self.parameters, strict=True):
            assert parameter.grad is not None, f"{name} has no gradient"
            gradients.append(local_tensor(parameter.grad))
        return gradients
