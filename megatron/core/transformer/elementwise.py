"""What stands between the matrix products: dropout, residual additions, activations.

Each is one operator on CPUs (`core.extensions.cpu_elementwise`) and torch's operations elsewhere and for other dtypes;
gated activations have other implementations, too (`core.extensions.elementwise`).
Dropout is that of activations which are equal on all tensor-parallel ranks, or divided along the sequence; for others
see `TensorParallel.dropout`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron.core.extensions import cpu_elementwise
from megatron.core.extensions.elementwise import Implementations


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with each element dropped with probability `p`, the others scaled up."""
    if p == 0.0:
        return x
    return cpu_elementwise.dropout(x, p) if cpu_elementwise.supports(x) else F.dropout(x, p)


def add_dropout(residual: Tensor, branch: Tensor, p: float) -> Tensor:
    """`residual + dropout(branch, p)`."""
    if p > 0.0 and residual.dtype == branch.dtype and cpu_elementwise.supports(branch):
        return cpu_elementwise.dropout_add(residual, branch, p)
    return residual + dropout(branch, p)


def gated_activation(x: Tensor, name: str, implementations: Implementations) -> Tensor:
    """`activation(gate) * up` of `[..., 2 f]`, rows `(unit, gate|up)`, to `[..., f]`."""
    activated: Tensor = implementations.module(x).gated_activation(x, name)
    return activated
