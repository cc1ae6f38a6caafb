"""Adafactor (Shazeer and Stern) as T5X configures it: no momentum, factored second moments, relative step sizes.

Legend: m logical matrices of one parameter, n of the model, r_i granules of rows (see logical_matrices.py), g rows of a
granule, c columns (all dimensions but the first).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron.core.config import OptimizerConfig
from megatron.core.optimizer.base import Optimizer
from megatron.core.optimizer.logical_matrices import LogicalMatrices
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor

EPS_GRADIENT = 1e-30  # added to the squared gradient
EPS_PARAMETER = 1e-3  # least RMS by which a step is multiplied
CLIP_THRESHOLD = 1.0  # an update of a larger RMS is scaled down to it
MIN_FACTORED_SIZE = 128  # a matrix with a smaller dimension keeps the whole second moment


class Adafactor(Optimizer):
    """Adafactor whose row and column factors, clipping and scaling are those of each logical matrix.

    At step t the second moment decays by `1 - t**-adafactor_decay_rate`. Two all-reduces a step: column sums together
    with the parameters' sums of squares, and the updates' sums of squares.
    """

    def __init__(self, config: OptimizerConfig, model: nn.Module, context: ParallelContext) -> None:
        super().__init__(model, context)
        self.decay_rate = config.adafactor_decay_rate
        self.matrices = LogicalMatrices(self.parameters, self.specs, context.dp_group)
        # On the CPU: the decay is computed from it on the host.
        self.step_count = torch.zeros((), dtype=torch.float32)
        self.row_moment: dict[int, torch.Tensor] = {}  # [rows], sharded like the parameter
        self.column_moment: dict[int, torch.Tensor] = {}  # [m, c], replicated
        self.full_moment: dict[int, torch.Tensor] = {}  # like the parameter
        self.granules: dict[int, list[torch.Tensor]] = {}  # of each factored parameter, those of each logical matrix
        self.full: list[int] = []
        self.factored: list[int] = []
        for index, parameter in enumerate(self.parameters):
            rows = parameter.shape[0] // len(self.specs[index].matrices)
            if parameter.ndim == 2 and min(rows, parameter.shape[1]) >= MIN_FACTORED_SIZE:
                self.factored.append(index)
                matrices = len(self.specs[index].matrices)
                self.row_moment[index] = _zero_row_moment(parameter)
                self.column_moment[index] = local_tensor(parameter.detach()).new_zeros(matrices, parameter.shape[1])
                granule_matrix = self.matrices.granule_matrix[index]
                self.granules[index] = [(granule_matrix == m).nonzero().squeeze(1) for m in range(matrices)]
            else:
                self.full.append(index)
                self.full_moment[index] = torch.zeros_like(parameter).detach()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters in place; the gradients become the unscaled updates."""
        self.step_count += 1
        beta2 = 1.0 - self.step_count.item() ** -self.decay_rate
        parameters, gradients = self.local_parameters(), self.local_gradients()
        views, updates = self.matrices.views(parameters), self.matrices.views(gradients)
        rms = self._update_moments(beta2, views, gradients)
        for index in self.full:
            gradients[index].mul_(local_tensor(self.full_moment[index]).rsqrt())
        for index in self.factored:
            self._divide_by_factors(index, gradients[index])
        sums = self.matrices.all_reduce(self.matrices.local_sums_of_squares(updates))
        scales = rms.clamp_(min=EPS_PARAMETER) / (self.matrices.rms(sums) / CLIP_THRESHOLD).clamp_(min=1.0)
        scale_rows = self.matrices.per_granule(scales, parameters[0].dtype)
        torch._foreach_addcmul_(views, updates, scale_rows, value=-lr)

    def _update_moments(self, beta2: float, views: list[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
        """Bring the second moments up to date and return the parameters' RMS: float64 `[n]`."""
        for index in self.full:
            moment = local_tensor(self.full_moment[index])
            moment.lerp_(gradients[index].square().add_(EPS_GRADIENT), 1.0 - beta2)
        column_sums = []
        for index in self.factored:
            squares = gradients[index].square().add_(EPS_GRADIENT)
            local_tensor(self.row_moment[index]).lerp_(squares.mean(1), 1.0 - beta2)
            column_sums.append(self._column_sums(index, squares))
        parameter_sums = self.matrices.local_sums_of_squares(views)
        parts = [parameter_sums, *[part.double().flatten() for part in column_sums]]
        reduced = self.matrices.all_reduce(torch.cat(parts)).split([part.numel() for part in parts])
        for index, columns in zip(self.factored, reduced[1:], strict=True):
            moment = self.column_moment[index]
            rows = self.parameters[index].shape[0] // len(self.specs[index].matrices)
            moment.lerp_(columns.view_as(moment).div(rows).to(moment.dtype), 1.0 - beta2)
        return self.matrices.rms(reduced[0])

    def _column_sums(self, index: int, squares: torch.Tensor) -> torch.Tensor:
        """Sum over this rank's rows of each logical matrix: `[rows, c]` -> `[m, c]`."""
        granules = squares.view(self.matrices.shapes[index]).sum(1)  # [r_i, c]
        of_matrix = self.granules[index]
        if len(of_matrix) == 1:
            return granules.sum(0, keepdim=True)
        return torch.stack([granules[chosen].sum(0) for chosen in of_matrix])

    def _divide_by_factors(self, index: int, gradient: torch.Tensor) -> None:
        """Divide `gradient` in place by the root of the factored second moment, `row x column / mean`."""
        columns = self.column_moment[index]
        # Both moments average the same squares, so the mean of the columns is that of the rows, which are sharded.
        mean = columns.mean(1)  # [m]
        matrix = self.matrices.granule_matrix[index]  # [r_i]
        granules, rows, _ = self.matrices.shapes[index]
        row_moment = local_tensor(self.row_moment[index]).view(granules, rows, 1)
        row_factor = (row_moment / mean[matrix].view(-1, 1, 1)).rsqrt()  # [r_i, g, 1]
        column_factor = columns.rsqrt()[matrix].unsqueeze(1)  # [r_i, 1, c]
        gradient.view(self.matrices.shapes[index]).mul_(row_factor).mul_(column_factor)

    def named_state(self) -> dict[str, torch.Tensor]:
        """Moments by parameter, and the step count."""
        state = {"optimizer/step": self.step_count}
        kinds = {"row_moment": self.row_moment, "column_moment": self.column_moment, "full_moment": self.full_moment}
        for kind, moments in kinds.items():
            state.update({f"optimizer/{kind}/{self.names[index]}": moment for index, moment in moments.items()})
        return state


def _zero_row_moment(parameter: torch.Tensor) -> torch.Tensor:
    """Zeros `[rows]`, sharded like dimension 0 of `parameter`."""
    local = local_tensor(parameter.detach())
    zeros = local.new_zeros(local.shape[0])
    if not isinstance(parameter, DTensor):
        return zeros
    return DTensor.from_local(
        zeros,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size((parameter.shape[0],)),
        stride=(1,),
    )
