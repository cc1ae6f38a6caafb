"""Linear layers and embeddings that know their logical axes, logical matrices and initial distribution.

Layers are built with global shapes and sharded afterwards (`core.parameters.shard_parameters`): the axes say which
dimension of a weight the tensor-parallel ranks divide, and the layer's class what that needs of the activations.

Parameters may be fp32 while activations are bf16 or fp16, so products cast weights to the activations' dtype
(`products`); with equal dtypes (FSDP2's mixed precision has cast already) that costs nothing.

Shapes: b batch, s sequence, s' this rank's part of the sequence under sequence parallelism (else s), h hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.parameters import Init, ParamSpec, local_tensor
from megatron.core.tensor_parallel.handle import TensorParallel
from megatron.core.tensor_parallel.weight_gradients import LinearFunction

# A row-parallel product of fp16 is computed this much smaller: T5's feed-forward outputs exceed fp16's largest number.
FP16_PRODUCT_SCALE = 2.0**-4


class Linear(nn.Module):
    """`y = x W^T (+ b)` with one or more logical matrices fused along the rows of `W`.

    With rows divided among ranks, each computes its own outputs from the whole input, whose gradient is then a sum over
    the ranks that the caller takes care of; `ColumnParallelLinear` does.

    Args:
        in_features: Width of the input.
        out_features: Width of the output: the rows of all logical matrices together.
        axes: Logical names of the weight's two dimensions (output, input).
        init: Initial distribution of the weight.
        matrices: Names of the fused logical matrices.
        block: Consecutive rows that belong to one logical matrix.
        bias: Add a bias, initially zero.
        tensor_parallel: The ranks.
        valid_shape: Outputs and inputs that are no padding.
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
        tensor_parallel: TensorParallel,
        valid_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.parameter_specs = {"weight": ParamSpec(axes, init, matrices, block, valid_shape=valid_shape)}
        # Replaces the product of the ranks where a backend has one for this layer (FP8, Transformer Engine).
        self.product: LinearFunction | None = None
        # This rank's part of the weight in the dtype of the input, where something keeps it up to date with the weight.
        self.cast: Tensor | None = None
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
            zeros = Init("constant", (0.0,) * len(matrices))
            self.parameter_specs["bias"] = ParamSpec(
                axes[:1], zeros, matrices, block, weight_decay=False, valid_shape=valid_shape and valid_shape[:1]
            )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]` (this rank's share of them), in the dtype of `x`."""
        bias = None if self.bias is None else local_tensor(self.bias).to(x.dtype)
        return self.linear(x, bias)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of this rank's part of the weight, by whatever computes this layer."""
        product, weight = self.product or self.tensor_parallel.linear, local_tensor(self.weight)
        return product(x, weight, bias) if self.cast is None else product(x, weight, bias, self.cast)


class ColumnParallelLinear(Linear):
    """A linear layer whose outputs the ranks divide.

    Under sequence parallelism the input is gathered and the gathered input kept for the weight's gradient: `b s h`
    numbers for each column-parallel product of a layer, not `b s' h`. Gathering again in the backward pass would spare
    them, but binds the gradients of input and weight together, which zero-bubble schedules compute apart.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[b, s', in_features]` to `[b, s, out_features / ranks]`."""
        return super().forward(self.tensor_parallel.enter(x))


class RowParallelLinear(Linear):
    """A linear layer whose inputs the ranks divide; the products are summed over the ranks, the bias added once.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        axes: Logical names of the weight's two dimensions (output, input).
        init: Initial distribution of the weight.
        bias: Add a bias, initially zero.
        tensor_parallel: The ranks.
        valid_shape: Outputs and inputs that are no padding.
        output_dtype: Dtype of the result and of the sum over the ranks; that of the input if not given.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        init: Init,
        bias: bool = False,
        tensor_parallel: TensorParallel,
        valid_shape: tuple[int, int] | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features,
            axes=axes, init=init, bias=bias, tensor_parallel=tensor_parallel, valid_shape=valid_shape,
        )  # fmt: skip
        self.output_dtype = output_dtype

    def forward(self, x: Tensor) -> Tensor:
        """`[b, s, in_features / ranks]` to `[b, s', out_features]`."""
        bias = None if self.bias is None else local_tensor(self.bias).to(self.output_dtype or x.dtype)
        if self.tensor_parallel.size == 1 and self.output_dtype in (None, x.dtype):
            return self.linear(x, bias)
        product = self.tensor_parallel.leave(self._product(x))
        return product if bias is None else product + bias

    def _product(self, x: Tensor) -> Tensor:
        if self.output_dtype is None:
            return self.linear(x)
        if x.dtype != torch.float16:
            return self.linear(x).to(self.output_dtype)
        return self.linear(x * FP16_PRODUCT_SCALE).to(self.output_dtype) * (1.0 / FP16_PRODUCT_SCALE)


class Embedding(nn.Module):
    """Table of vectors, the same on all ranks.

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

    def rows(self, start: int, count: int) -> Tensor:
        """Rows `start .. start + count`, zeros beyond the table: `[count, embedding_dim]`."""
        weight = local_tensor(self.weight)[start : start + count]
        return F.pad(weight, (0, 0, 0, count - len(weight))) if len(weight) < count else weight


class VocabParallelEmbedding(nn.Module):
    """Table of vectors looked up by id, its rows divided among the ranks (and padded to divide).

    Args:
        num_embeddings: Rows that mean something.
        embedding_dim: Width of a row.
        init: Initial distribution.
        tensor_parallel: The ranks.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, init: Init, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.weight = nn.Parameter(torch.empty(tensor_parallel.round_up(num_embeddings), embedding_dim))
        valid_shape = (num_embeddings, embedding_dim)
        self.parameter_specs = {"weight": ParamSpec(("vocab", "embed"), init, valid_shape=valid_shape)}

    def forward(self, *ids: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Each of the integer ids `[b, s]` to vectors `[b, s', embedding_dim]`, padded with the vector of id 0.

        All are one lookup and one collective, and the backward pass makes one gradient of the table's size.

        Args:
            ids: Any number of them; each has its own length.
            dtype: Dtype of the vectors; the table's if not given.
        """
        parallel = self.tensor_parallel
        num_parts = parallel.size if parallel.sequence_parallel else 1
        parts = []  # [p, b, s'] each: outermost the rank that receives the part
        for each in ids:
            padded = F.pad(each, (0, parallel.padded_length(each.shape[1]) - each.shape[1]))
            parts.append(padded.unflatten(1, (num_parts, -1)).movedim(1, 0))
        lengths = [part[0].numel() for part in parts]
        vectors = self._lookup(torch.cat([part.flatten(1) for part in parts], dim=1).flatten())  # [p b s', h]
        if dtype is not None:  # exact before the sum, in which each vector has one summand that is not zero
            vectors = vectors.to(dtype)
        if parallel.size > 1:
            vectors = parallel.leave(vectors[None])[0]  # [b s', h]
        return tuple(
            vector.unflatten(0, part.shape[1:]) for vector, part in zip(vectors.split(lengths), parts, strict=True)
        )

    def _lookup(self, ids: Tensor) -> Tensor:
        """`[n]` to `[n, h]`, zeros where another rank has the row."""
        weight = local_tensor(self.weight)
        if self.tensor_parallel.size == 1:
            return F.embedding(ids, weight)
        local = ids - self.tensor_parallel.rank * len(weight)
        elsewhere = (local < 0) | (local >= len(weight))
        return F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[:, None], 0.0)


class VocabParallelHead(nn.Module):
    """Weight of the projection to the vocabulary, its rows divided among the ranks (see `vocab_parallel_logits`).

    Args:
        hidden_size: Width of the input.
        num_embeddings: Rows that mean something.
        init: Initial distribution.
        tensor_parallel: The ranks.
    """

    def __init__(self, hidden_size: int, num_embeddings: int, *, init: Init, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tensor_parallel.round_up(num_embeddings), hidden_size))
        valid_shape = (num_embeddings, hidden_size)
        self.parameter_specs = {"weight": ParamSpec(("vocab", "embed"), init, valid_shape=valid_shape)}


def vocab_parallel_logits(hidden: Tensor, weight: Tensor, num_embeddings: int, parallel: TensorParallel) -> Tensor:
    """This rank's logits `[b, t, v']` of `hidden` `[b, t, h]`, without those of rows that pad the vocabulary.

    Args:
        hidden: Input of a column-parallel product.
        weight: Table of the vocabulary, maybe tied: all its rows, or a DTensor.
        num_embeddings: Rows of the table that mean something.
        parallel: The ranks.
    """
    local = local_tensor(weight)
    valid = min(len(local), num_embeddings - parallel.rank * len(local))
    assert valid > 0, f"{num_embeddings} ids leave nothing for rank {parallel.rank} of {parallel.size}"
    if valid < len(local):
        local = local[:valid]
    return parallel.linear(hidden, local)


def join_logits(logits: Tensor, num_embeddings: int, parallel: TensorParallel) -> Tensor:
    """The ranks' logits of `vocab_parallel_logits` to all of them, `[b, t, num_embeddings]`, on every rank."""
    missing = parallel.round_up(num_embeddings) // parallel.size - logits.shape[-1]
    joined = parallel.join_last(F.pad(logits, (0, missing)) if missing else logits)
    return joined if joined.shape[-1] == num_embeddings else joined[..., :num_embeddings]
