"""Linear layer and embedding that know their logical axes, logical matrices and initial distribution.

Parameters may be fp32 while activations are bf16, so weights are cast to the activations' dtype where they are used;
with equal dtypes (FSDP2's mixed precision has cast already) that costs nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.parameters import Init, ParamSpec


class Linear(nn.Module):
    """`y = x W^T (+ b)` with one or more logical matrices fused along the rows of `W`.

    Args:
        in_features: Width of the input.
        out_features: Width of the output: the rows of all logical matrices together.
        axes: Logical names of the weight's two dimensions (output, input).
        init: Initial distribution of the weight.
        matrices: Names of the fused logical matrices.
        block: Consecutive rows that belong to one logical matrix.
        bias: Add a bias, initially zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        init: Init,
        matrices: tuple[str, ...] = ("weight",),
        block: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.parameter_specs = {"weight": ParamSpec(axes, init, matrices, block)}
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
            zeros = Init("constant", (0.0,) * len(matrices))
            self.parameter_specs["bias"] = ParamSpec(axes[:1], zeros, matrices, block, weight_decay=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Module):
    """Table of vectors looked up by id.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Width of a row.
        axis: Logical name of the rows' dimension.
        init: Initial distribution.
        weight_decay: Whether decoupled weight decay applies.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, axis: str, init: Init, weight_decay: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        self.parameter_specs = {"weight": ParamSpec((axis, "embed"), init, weight_decay=weight_decay)}

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids `[...]` to vectors `[..., embedding_dim]` in the table's dtype."""
        return F.embedding(ids, self.weight)
