"""Sums over the logical matrices of a model, whatever is fused into one parameter and however it is sharded.

A fused parameter (query, key and value in one) holds several logical matrices as interleaved blocks of rows. Optimizers
that scale by a matrix's RMS must see each of them, or fusing and sharding would change the training.

Legend: n logical matrices of the model, r granules of all parameters that this rank holds, i one parameter.
A granule is the largest run of rows that lies within one logical matrix, wherever the shard begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.tensor import DTensor

from megatron.core.parameters import ParamSpec, local_rows, local_tensor


class LogicalMatrices:
    """Index from the local rows of the parameters to the logical matrices of the model.

    Args:
        parameters: Plain tensors (replicated on all ranks) or DTensors sharded along dimension 0; not a mixture.
        specs: What each parameter is.
        group: Ranks over which the parameters are sharded.

    Attributes:
        shapes: Of each parameter, its local shape as `(granules, rows of a granule, rest of the elements of a row)`.
        granule_matrix: Of each parameter, the logical matrix (counted in it) of its granules, int64 `[r_i]`.
        numel: Elements of each logical matrix on all ranks, float64 `[n]`.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], specs: Sequence[ParamSpec], group: ProcessGroup | None
    ) -> None:
        sharded = {isinstance(parameter, DTensor) for parameter in parameters}
        assert len(sharded) == 1, "parameters must be all sharded or all replicated"
        self.group = group if sharded.pop() else None
        device = local_tensor(parameters[0]).device
        self.shapes: list[tuple[int, int, int]] = []
        self.granule_matrix: list[torch.Tensor] = []
        numel: list[float] = []
        matrix_of_all = []
        for parameter, spec in zip(parameters, specs, strict=True):
            rows, matrices = parameter.shape[0], len(spec.matrices)
            assert rows % (spec.block * matrices) == 0 or matrices == 1, (parameter.shape, spec)
            start, count = local_rows(parameter)
            granule = max(1, count if matrices == 1 else math.gcd(spec.block, start, count))
            self.shapes.append((count // granule, granule, parameter.shape[1:].numel()))
            first_rows = spec.matrix_of_rows(start, count, device)[::granule]
            self.granule_matrix.append(first_rows)
            matrix_of_all.append(first_rows + len(numel))
            numel += [parameter.numel() / matrices] * matrices
        self.numel = torch.tensor(numel, dtype=torch.float64, device=device)
        self.matrix_of_granule = torch.cat(matrix_of_all)  # [r]
        # Granules sorted by matrix: a segmented sum is deterministic, adding into an index on a GPU is not.
        self.order = torch.argsort(self.matrix_of_granule, stable=True)
        self.lengths = torch.bincount(self.matrix_of_granule, minlength=len(numel))

    def views(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each local tensor, viewed as one row a granule: `[r_i, elements of a granule]`."""
        return [t.view(shape[0], shape[1] * shape[2]) for t, shape in zip(tensors, self.shapes, strict=True)]

    def local_sums_of_squares(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """This rank's share of the sum of squares of each logical matrix: float64 `[n]`."""
        norms = torch.cat([torch.linalg.vector_norm(view, dim=1) for view in views])  # [r]
        return torch.segment_reduce(norms.double().square()[self.order], "sum", lengths=self.lengths, unsafe=True)

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Add `sums` over the ranks that hold shards, in place."""
        if self.group is not None:
            all_reduce(sums, group=self.group)
        return sums

    def rms(self, sums_of_squares: torch.Tensor) -> torch.Tensor:
        """Root mean square of each logical matrix from its sum of squares on all ranks: float64 `[n]`."""
        return (sums_of_squares / self.numel).sqrt()

    def per_granule(self, values: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """One value a logical matrix `[n]` -> one value a granule, for each parameter `[r_i, 1]`."""
        granules = values.to(dtype)[self.matrix_of_granule].unsqueeze(1)
        return list(granules.split([shape[0] for shape in self.shapes]))
