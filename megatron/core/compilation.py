"""`--compile`: torch.compile of whole layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def compile_layers(layers: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile the forward pass of each layer; layers of a class that compute the same share one compiled code.

    Only `forward` is compiled, not the call of the module: what FSDP2 does before and after a layer is no part of
    it, and stays eager. Whatever cannot be compiled is an error instead of a slow way round it, and every shape is
    compiled for itself.

    Args:
        layers: Changed in place.
        backend: Of torch.compile. Others than the default are for tests.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend)
