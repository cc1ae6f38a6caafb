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

from megatron.core.optimizer.base import Optimizer
from megatron.core.parameters import local_slice, local_tensor


class LogicalMatrices:
    """Index from the local rows of an optimizer's parameters to the logical matrices of the model.

    Attributes:
        counts: Logical matrices of each parameter.
        slices: Of each parameter and dimension, the first index and the number of indices that this rank holds.
        shapes: Of each parameter, its local shape as `(granules, rows of a granule, rest of the elements of a row)`.
        granule_matrix: Of each parameter, the logical matrix (counted in it) of its granules, int64 `[r_i]`.
        rows: Of each parameter, the rows of one of its logical matrices on all ranks, without padding.
        numel: Elements of each logical matrix on all ranks, without padding, float64 `[n]`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        device = local_tensor(optimizer.parameters[0]).device
        self.counts = [len(spec.matrices) for spec in optimizer.specs]
        self.slices = [[local_slice(p, dim) for dim in range(p.ndim)] for p in optimizer.parameters]
        self.shapes: list[tuple[int, int, int]] = []
        self.granule_matrix: list[torch.Tensor] = []
        self.rows: list[int] = []
        numel: list[float] = []
        matrix_of_all, contributes = [], []
        for index, (parameter, spec) in enumerate(zip(optimizer.parameters, optimizer.specs, strict=True)):
            shape, matrices = spec.shape_of(parameter), len(spec.matrices)
            assert shape[0] % (spec.block * matrices) == 0 or matrices == 1, (shape, spec)
            start, count = self.slices[index][0]
            granule = max(1, count if matrices == 1 else math.gcd(spec.block, start, count))
            self.shapes.append((count // granule, granule, local_tensor(parameter).shape[1:].numel()))
            first_rows = spec.matrix_of_rows(start, count, device)[::granule]
            self.granule_matrix.append(first_rows)
            matrix_of_all.append(first_rows + len(numel))
            contributes.append(torch.full_like(first_rows, optimizer.contributes[index], dtype=torch.bool))
            self.rows.append(shape[0] // matrices)
            numel += [self.rows[-1] * shape[1:].numel()] * matrices
        self.numel = torch.tensor(numel, dtype=torch.float64, device=device)
        self.matrix_of_granule = torch.cat(matrix_of_all)  # [r]
        # Granules that contribute, sorted by matrix: a segmented sum is deterministic, adding into an index on a GPU is
        # not.
        chosen = torch.cat(contributes).nonzero().squeeze(1)
        matrix_of_chosen = self.matrix_of_granule[chosen]
        self.order = chosen[torch.argsort(matrix_of_chosen, stable=True)]
        self.lengths = torch.bincount(matrix_of_chosen, minlength=len(numel))

    def views(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each local tensor, viewed as one row a granule: `[r_i, elements of a granule]`."""
        return [t.view(shape[0], shape[1] * shape[2]) for t, shape in zip(tensors, self.shapes, strict=True)]

    def local_sums_of_squares(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """This rank's share of the sum of squares of each logical matrix: float64 `[n]`."""
        norms = torch.cat([torch.linalg.vector_norm(view, dim=1) for view in views])  # [r]
        return torch.segment_reduce(norms.double().square()[self.order], "sum", lengths=self.lengths, unsafe=True)

    def sums_of_squares(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum of squares of each logical matrix over all ranks: float64 `[n]`."""
        return self.optimizer.sum_over_ranks(self.local_sums_of_squares(views), range(len(self.counts)), self.counts)

    def rms(self, sums_of_squares: torch.Tensor) -> torch.Tensor:
        """Root mean square of each logical matrix from its sum of squares on all ranks: float64 `[n]`."""
        return (sums_of_squares / self.numel).sqrt()

    def per_granule(self, values: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """One value a logical matrix `[n]` -> one value a granule, for each parameter `[r_i, 1]`."""
        granules = values.to(dtype)[self.matrix_of_granule].unsqueeze(1)
        return list(granules.split([shape[0] for shape in self.shapes]))
