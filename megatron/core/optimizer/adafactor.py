"""Adafactor (Shazeer and Stern) as T5X configures it: no momentum, factored second moments, relative step sizes.

Legend: m logical matrices of one parameter, n of the model, r_i granules of rows (see logical_matrices.py), g rows of a
granule, rows and c columns (all dimensions but the first) of the whole parameter, rows' and c' of this rank's part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, Replicate

from megatron.core.config import OptimizerConfig
from megatron.core.optimizer.base import Optimizer, Synchronize
from megatron.core.optimizer.logical_matrices import LogicalMatrices
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ModelParameter, local_tensor

EPS_GRADIENT = 1e-30  # added to the squared gradient
EPS_PARAMETER = 1e-3  # least RMS by which a step is multiplied
CLIP_THRESHOLD = 1.0  # an update of a larger RMS is scaled down to it
MIN_FACTORED_SIZE = 128  # a matrix with a smaller dimension keeps the whole second moment


class Adafactor(Optimizer):
    """Adafactor whose row and column factors, clipping and scaling are those of each logical matrix.

    At step t the second moment decays by `1 - t**-adafactor_decay_rate`. Two all-reduces a step: column sums (and row
    sums, where columns are divided) together with the parameters' sums of squares, and the updates' sums of squares.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Sequence[ModelParameter],
        context: ParallelContext,
        synchronize: Synchronize | None = None,
    ) -> None:
        super().__init__(parameters, context, synchronize)
        self.decay_rate = config.adafactor_decay_rate
        self.matrices = LogicalMatrices(self)
        self.step_count = torch.zeros((), dtype=torch.float32, device=context.device)
        self.row_moment: dict[int, torch.Tensor] = {}  # [rows], divided as the parameter's rows are
        self.column_moment: dict[int, torch.Tensor] = {}  # [m, c], replicated
        self.full_moment: dict[int, torch.Tensor] = {}  # like the parameter
        self.granules: dict[int, list[torch.Tensor]] = {}  # of each factored parameter, those of each logical matrix
        self.full: list[int] = []
        self.factored: list[int] = []
        for index, parameter in enumerate(self.parameters):
            if parameter.ndim == 2 and min(self.matrices.rows[index], self.shapes[index][1]) >= MIN_FACTORED_SIZE:
                self.factored.append(index)
                matrices = self.matrices.counts[index]
                self.row_moment[index] = _zero_row_moment(parameter)
                self.column_moment[index] = local_tensor(parameter.detach()).new_zeros(matrices, parameter.shape[1])
                granule_matrix = self.matrices.granule_matrix[index]
                self.granules[index] = [(granule_matrix == m).nonzero().squeeze(1) for m in range(matrices)]
            else:
                self.full.append(index)
                self.full_moment[index] = torch.zeros_like(parameter).detach()

    @torch.no_grad()
    def step(self, lr: float, divisor: torch.Tensor | None = None, skip: torch.Tensor | None = None) -> None:
        """Update the parameters in place; the gradients become the unscaled updates."""
        self.count_step(skip)
        parameters, gradients = self.local_parameters(), self.local_gradients()
        if divisor is not None:
            torch._foreach_div_(gradients, divisor.to(gradients[0].dtype))
        views, updates = self.matrices.views(parameters), self.matrices.views(gradients)
        rms = self._update_moments(views, gradients, skip)
        for index in self.full:
            gradients[index].mul_(local_tensor(self.full_moment[index]).rsqrt())
        for index in self.factored:
            self._divide_by_factors(index, gradients[index])
        if skip is not None:
            for gradient in gradients:
                gradient.masked_fill_(skip, 0.0)
        update_rms = self.matrices.rms(self.matrices.sums_of_squares(updates))
        scales = rms.clamp_(min=EPS_PARAMETER) / (update_rms / CLIP_THRESHOLD).clamp_(min=1.0)
        scale_rows = self.matrices.per_granule(scales, parameters[0].dtype)
        torch._foreach_addcmul_(views, updates, scale_rows, value=-lr)

    def _update_moments(
        self, views: list[torch.Tensor], gradients: list[torch.Tensor], skip: torch.Tensor | None
    ) -> torch.Tensor:
        """Bring the second moments up to date and return the parameters' RMS: float64 `[n]`."""
        weight = self._weight_of_squares()

        def blend(moment: torch.Tensor, squares: torch.Tensor) -> None:
            moment.lerp_(squares if skip is None else torch.where(skip, moment, squares), weight)

        for index in self.full:
            blend(local_tensor(self.full_moment[index]), gradients[index].square().add_(EPS_GRADIENT))
        columns: dict[int, torch.Tensor] = {}
        rows: dict[int, torch.Tensor] = {}
        for index in self.factored:
            squares = gradients[index].square().add_(EPS_GRADIENT)  # [rows', c']
            columns[index] = self._column_sums(index, squares)
            if squares.shape[1] == self.shapes[index][1]:
                blend(local_tensor(self.row_moment[index]), squares.mean(1))
            else:
                rows[index] = self._row_sums(index, squares)
        own = self.matrices.local_sums_of_squares(views)  # [n]
        parts = [*own.split(self.matrices.counts), *columns.values(), *rows.values()]
        sizes = [part.numel() for part in parts]
        sums = torch.cat([part.flatten() for part in parts])
        indices = [*range(len(self.parameters)), *columns, *rows]
        totals = self.sum_over_ranks(sums, indices, sizes)[own.numel() :].split(sizes[len(self.parameters) :])
        for index, total in zip(columns, totals[: len(columns)], strict=True):
            moment = self.column_moment[index]
            blend(moment, total.view_as(moment).div(self.matrices.rows[index]).to(moment.dtype))
        for index, total in zip(rows, totals[len(columns) :], strict=True):
            moment = local_tensor(self.row_moment[index])
            mean = total.narrow(0, *self.matrices.slices[index][0]) / self.shapes[index][1]
            blend(moment, mean.to(moment.dtype))
        return self.matrices.rms(sums[: own.numel()])

    def _weight_of_squares(self) -> float | torch.Tensor:
        """`step**-decay_rate`, the weight of this step's squares in the second moments; on a GPU it stays there."""
        step = self.step_count.double().clamp(min=1.0)  # 0 where the first step is skipped
        if step.is_cpu:
            beta2 = 1.0 - step.item() ** -self.decay_rate
            return 1.0 - beta2
        return step.pow(-self.decay_rate).float()

    def _column_sums(self, index: int, squares: torch.Tensor) -> torch.Tensor:
        """This rank's share of the sums over the rows of each logical matrix: `[rows', c']` to float64 `[m, c]`."""
        of_matrix = self.granules[index]
        if len(of_matrix) == 1:
            sums = squares.sum(0, keepdim=True)  # rows of padding add EPS_GRADIENT, as columns do to sums of rows
        else:
            granules = squares.view(self.matrices.shapes[index]).sum(1)  # [r_i, c']
            sums = torch.stack([granules[chosen].sum(0) for chosen in of_matrix])
        return self._placed(index, sums, 1)  # [m, c]

    def _row_sums(self, index: int, squares: torch.Tensor) -> torch.Tensor:
        """This rank's share of the sums over all columns: `[rows', c']` to float64 `[rows]`."""
        return self._placed(index, squares.sum(1), 0)

    def _placed(self, index: int, sums: torch.Tensor, dim: int) -> torch.Tensor:
        """`sums` at this rank's place along `dim` of the parameter, zeros elsewhere; all zeros without contribution."""
        parameter = self.parameters[index]
        start, count = self.matrices.slices[index][dim]
        if self.contributes[index] and count == parameter.shape[dim]:
            return sums.double()
        whole = sums.new_zeros(*sums.shape[:-1], parameter.shape[dim], dtype=torch.float64)
        if self.contributes[index]:
            whole.narrow(-1, start, count).copy_(sums)
        return whole

    def _divide_by_factors(self, index: int, gradient: torch.Tensor) -> None:
        """Divide `gradient` in place by the root of the factored second moment, `row x column / mean`."""
        columns = self.column_moment[index]
        # Both moments average the same squares, so the mean of the columns is that of the rows, which can be divided.
        mean = columns[:, : self.shapes[index][1]].mean(1)  # [m]
        matrix = self.matrices.granule_matrix[index]  # [r_i]
        granules, rows, _ = self.matrices.shapes[index]
        row_moment = local_tensor(self.row_moment[index]).view(granules, rows, 1)
        row_factor = (row_moment / mean[matrix].view(-1, 1, 1)).rsqrt()  # [r_i, g, 1]
        columns = columns.narrow(1, *self.matrices.slices[index][1])
        column_factor = columns.rsqrt()[matrix].unsqueeze(1)  # [r_i, 1, c']
        gradient.view(self.matrices.shapes[index]).mul_(row_factor).mul_(column_factor)

    def parameter_state(self, index: int) -> dict[str, torch.Tensor]:
        """The moments of rows and of columns, or the whole second moment."""
        if index in self.full_moment:
            return {"full_moment": self.full_moment[index]}
        return {"row_moment": self.row_moment[index], "column_moment": self.column_moment[index]}

    def state_shape(self, index: int, kind: str) -> torch.Size:
        """That of the parameter; of the rows; or of the logical matrices and the columns."""
        rows, *columns = self.shapes[index]
        if kind == "row_moment":
            return torch.Size((rows,))
        if kind == "column_moment":
            return torch.Size((self.matrices.counts[index], *columns))
        return super().state_shape(index, kind)


def _zero_row_moment(parameter: torch.Tensor) -> torch.Tensor:
    """Zeros `[rows]`, placed like dimension 0 of `parameter`; replicated over the axes that divide its columns."""
    local = local_tensor(parameter.detach())
    zeros = local.new_zeros(local.shape[0])
    if not isinstance(parameter, DTensor):
        return zeros
    placements = [Replicate() if placement.is_shard(1) else placement for placement in parameter.placements]
    size = torch.Size((parameter.shape[0],))
    return DTensor.from_local(zeros, parameter.device_mesh, placements, run_check=False, shape=size, stride=(1,))
