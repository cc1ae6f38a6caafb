"""Steps of a pipeline: runs the stages of this rank under the schedules of `torch.distributed.pipelining`.

M microbatches a step, b rows each, t decoder length. Every pipeline rank is given the whole batch; what stages pass on
are hidden states only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megatron.core.parallel_state import ParallelContext
from megatron.core.pipeline_parallel.schedules import build_schedule


class Plan(Protocol):
    """What the runtime needs to know of how the model is cut."""

    @property
    def schedule(self) -> str:
        """A key of `SCHEDULES`."""

    @property
    def stages(self) -> Sequence[Any]:
        """All stages of the pipeline, in order."""

    def stages_of(self, rank: int) -> list[int]:
        """Indices of the stages of a pipeline rank, ascending."""


class Pipeline:
    """The stages of this rank, and one step of all ranks over all microbatches.

    All pipeline ranks call the methods together, with the same batch. Gradients are sums: they are accumulated on the
    stage modules in fp32 and never divided. FSDP2 reduces them over the data-parallel ranks after the last backward
    pass of a stage; replicas are for `DataParallel.reduce_gradients` to sum afterwards.

    Args:
        modules: The stages of this rank, ascending, on the context's device. Their forward pass takes what the stage
            before returned as positional and the whole microbatch as keyword arguments; the last stage returns
            cross-entropy and z-loss `[b, t]`.
        plan: The stages of all ranks and the schedule.
        context: The layout; with more than one pipeline rank.
        num_microbatches: Microbatches a step, M.
    """

    def __init__(
        self, modules: Sequence[nn.Module], plan: Plan, context: ParallelContext, num_microbatches: int
    ) -> None:
        self.context = context
        self.num_microbatches = num_microbatches
        indices = plan.stages_of(context.pp_rank)
        assert len(indices) == len(modules) and context.pp_size > 1
        self.has_loss = indices[-1] == len(plan.stages) - 1
        self._factor = torch.ones(())
        self._sums: list[Tensor] = []

        def build(loss_fn: Any) -> Any:
            stages = [
                _Stage(
                    module,
                    index,
                    len(plan.stages),
                    context.device,
                    group=context.pp_group,
                    dw_builder=_no_deferred_work,
                )
                for module, index in zip(modules, indices, strict=True)
            ]
            return build_schedule(plan.schedule, stages, num_microbatches, loss_fn)

        self._training = build(self._loss)
        self._evaluation = build(None)

    def forward_backward(self, batch: dict[str, Tensor], factor: Tensor) -> Tensor:
        """Gradients of `factor` x the summed loss of a step, added to those of the stages' parameters.

        Args:
            batch: Keyword arguments of the stages for all microbatches, `[M b, ...]`.
            factor: 0-dimensional; for instance the loss scale over the global number of target tokens.

        Returns:
            Sums of cross-entropy and z-loss, float64 `[2]`; zeros on a rank without the last stage.
        """
        self._check_rows(batch)
        self._factor = factor
        self._sums.clear()
        self._training.step(target=self._target(batch), return_outputs=False, **batch)
        if not self.has_loss:
            return torch.zeros(2, dtype=torch.float64, device=self.context.device)
        # The first step begins with a pass that finds out the shapes.
        return torch.stack(self._sums[-self.num_microbatches :]).double().sum(dim=0)

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Cross-entropy of every token `[M b, t]`; None on a rank without the last stage."""
        self._check_rows(batch)
        outputs = self._evaluation.step(target=self._target(batch), **batch)
        if not self.has_loss:
            return None
        cross_entropy: Tensor = outputs[0]
        return cross_entropy

    def _target(self, batch: dict[str, Tensor]) -> Tensor:
        """torch passes a target to the loss; the last stage has read the labels already."""
        return next(iter(batch.values()))

    def _check_rows(self, batch: dict[str, Tensor]) -> None:
        for name, tensor in batch.items():
            assert tensor.shape[0] % self.num_microbatches == 0, (name, tensor.shape, self.num_microbatches)

    def _loss(self, losses: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """What is differentiated of a microbatch's cross-entropy and z-loss `[b, t]`; notes their sums."""
        sums = torch.stack([loss.sum() for loss in losses])
        self._sums.append(sums.detach())
        return sums.sum() * self._factor


def _no_deferred_work() -> Any:
    """A backward pass computes all gradients at once, also where the schedule would split it."""
    return lambda: None


class _Stage(PipelineStage):
    """torch's stage, able to run forward passes only under the schedules that put neighbouring stages on a rank."""

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Gradients for the stage before, when it is on this rank; none in a forward-only step."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take the gradients from the stage after, when it is on this rank; none in a forward-only step."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Let FSDP2 reduce the gradients of the step, if there are any."""
        if self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)
