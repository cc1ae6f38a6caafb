"""AdamW (Loshchilov and Hutter), with the fused kernel of torch or apex on the shards that this rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron.core.config import OptimizerConfig
from megatron.core.extensions import apex
from megatron.core.optimizer.base import Optimizer, Synchronize
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ModelParameter, local_tensor


class AdamW(Optimizer):
    """AdamW: bias-corrected moments, decoupled weight decay where the parameter's spec asks for it."""

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Sequence[ModelParameter],
        context: ParallelContext,
        synchronize: Synchronize | None = None,
    ) -> None:
        super().__init__(parameters, context, synchronize)
        if config.optimizer_backend == "apex":
            apex.check_adam(context.device)
        self.config = config
        self.exp_avg = [torch.zeros_like(parameter).detach() for parameter in self.parameters]
        self.exp_avg_sq = [torch.zeros_like(parameter).detach() for parameter in self.parameters]
        self.local_exp_avg = [local_tensor(state) for state in self.exp_avg]
        self.local_exp_avg_sq = [local_tensor(state) for state in self.exp_avg_sq]
        self.step_count = torch.zeros((), dtype=torch.float32, device=context.device)
        # A rank can hold no row of a small parameter; the kernel gets the others.
        self.held = [index for index, state in enumerate(self.local_exp_avg) if state.numel()]

    @torch.no_grad()
    def step(self, lr: float, divisor: torch.Tensor | None = None, skip: torch.Tensor | None = None) -> None:
        """Update the parameters in place."""
        self.count_step(skip)
        parameters, gradients = self.local_parameters(), self.local_gradients()
        for decays in (True, False):
            indices = [i for i in self.held if self.specs[i].weight_decay == decays]
            weight_decay = self.config.weight_decay if decays else 0.0
            self._fused(indices, [parameters[i] for i in indices], gradients, divisor, lr, weight_decay, skip)

    def _fused(
        self,
        indices: list[int],
        targets: list[torch.Tensor],
        gradients: list[torch.Tensor],
        divisor: torch.Tensor | None,
        lr: float,
        decay: float,
        skip: torch.Tensor | None,
    ) -> None:
        """One AdamW step of `targets` with the gradients and moments of the parameters `indices`."""
        if not indices:
            return
        lists = (
            targets,
            [gradients[i] for i in indices],
            [self.local_exp_avg[i] for i in indices],
            [self.local_exp_avg_sq[i] for i in indices],
        )
        if self.config.optimizer_backend == "apex":
            apex.adam(
                *lists,
                self.step_count,
                lr=lr,
                betas=(self.config.adam_beta1, self.config.adam_beta2),
                eps=self.config.adam_eps,
                weight_decay=decay,
                divisor=divisor,
                skip=skip,
            )
            return
        torch._fused_adamw_(
            *lists,
            [],
            [self.step_count] * len(indices),
            lr=lr,
            beta1=self.config.adam_beta1,
            beta2=self.config.adam_beta2,
            weight_decay=decay,
            eps=self.config.adam_eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None if divisor is None else divisor.float(),
            found_inf=None if skip is None else skip.float(),  # of mixed precision: the kernel then returns at once
        )

    def parameter_state(self, index: int) -> dict[str, torch.Tensor]:
        """Both moments."""
        return {"exp_avg": self.exp_avg[index], "exp_avg_sq": self.exp_avg_sq[index]}
