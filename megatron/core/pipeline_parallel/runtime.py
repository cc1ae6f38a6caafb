"""Steps of a pipeline: runs the stages of this rank under the schedules of `torch.distributed.pipelining`.

M microbatches a step, b rows each, t decoder length. Every pipeline rank is given the whole batch; what stages pass on
are hidden states only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from megatron.core.parallel_state import ParallelContext
from megatron.core.pipeline_parallel.schedules import SCHEDULES, build_schedule
from megatron.core.tensor_parallel import TensorParallel
from megatron.core.tensor_parallel.weight_gradients import DeferredWeightGradients


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


class StageModule(Protocol):
    """A module that takes what the stage before returned, and the whole microbatch as keyword arguments.

    It returns what the next stage takes; the last one the losses (a tuple as `TokenLoss`).
    """

    tensor_parallel: TensorParallel

    def messages(self, **microbatch: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Shapes and dtypes of what it takes and returns, as tensors on the meta device."""


class Pipeline:
    """The stages of this rank, and one step of all ranks over all microbatches.

    All pipeline ranks call the methods together, with the same batch. Gradients are sums: they are accumulated on the
    stage modules in fp32 and never divided. FSDP2 reduces them over the data-parallel ranks after the last backward
    pass of a stage; replicas are for `DataParallel.reduce_gradients` to sum afterwards.

    Args:
        modules: The stages of this rank, ascending, on the context's device: `StageModule`s.
        plan: The stages of all ranks and the schedule.
        context: The layout; with more than one pipeline rank.
        num_microbatches: Microbatches a step, M.
    """

    def __init__(
        self, modules: Sequence[nn.Module], plan: Plan, context: ParallelContext, num_microbatches: int
    ) -> None:
        self.modules = modules
        self.plan = plan
        self.context = context
        self.num_microbatches = num_microbatches
        self.indices = plan.stages_of(context.pp_rank)
        assert len(self.indices) == len(modules) and context.pp_size > 1
        self.has_loss = self.indices[-1] == len(plan.stages) - 1
        self._deferred: DeferredWeightGradients | None = None
        if SCHEDULES[plan.schedule].splits_backward:
            self._deferred = DeferredWeightGradients()
            for module in modules:
                cast(StageModule, module).tensor_parallel.linear = self._deferred.linear
        # torch's schedule and its stages, by what is run and the shapes of the batch
        self._schedules: dict[tuple[object, ...], tuple[Any, list[_Stage]]] = {}
        self._factor = torch.ones(())
        self._sums: list[Tensor] = []

    def forward_backward(self, batch: Mapping[str, Tensor], factor: Tensor) -> Tensor:
        """Gradients of `factor` x the summed loss of a step, added to those of the stages' parameters.

        Args:
            batch: Keyword arguments of the stages for all microbatches, `[M b, ...]` each.
            factor: 0-dimensional; for instance the loss scale over the global number of target tokens.

        Returns:
            Sums of cross-entropy and z-loss, float64 `[2]`; zeros on a rank without the last stage.
        """
        self._factor = factor
        self._sums.clear()
        self._run(batch, self._loss)
        if not self.has_loss:
            return torch.zeros(2, dtype=torch.float64, device=self.context.device)
        return torch.stack(self._sums).double().sum(dim=0)

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Cross-entropy of every token `[M b, t]`; None on a rank without the last stage."""
        outputs = self._run(batch, None)
        return outputs[0] if self.has_loss else None

    def _run(self, batch: Mapping[str, Tensor], loss_fn: Callable[..., Tensor] | None) -> Any:
        """A step; without a loss function forward passes only, of which the last stage's outputs are returned."""
        key = (loss_fn is None, *((name, tensor.shape) for name, tensor in batch.items()))
        if key not in self._schedules:
            for name, tensor in batch.items():
                assert len(tensor) % self.num_microbatches == 0, (name, tensor.shape, self.num_microbatches)
            self._schedules[key] = self._build(batch, loss_fn)
        # The loss needs no target, the last stage reads the labels; but torch does not go without one.
        target = next(iter(batch.values()))
        schedule, stages = self._schedules[key]
        outputs = schedule.step(target=target, return_outputs=loss_fn is None, **batch)
        if loss_fn is None:  # backward passes let go of what a step keeps, but there were none
            for stage in stages:
                stage.clear_runtime_states()
        return outputs

    def _build(self, batch: Mapping[str, Tensor], loss_fn: Callable[..., Tensor] | None) -> tuple[Any, list[_Stage]]:
        """torch's schedule for batches of these shapes, and its stages."""
        microbatch = {name: tensor[: len(tensor) // self.num_microbatches] for name, tensor in batch.items()}
        stages = []
        for module, index in zip(self.modules, self.indices, strict=True):
            messages = cast(StageModule, module).messages(**microbatch)
            stages.append(_Stage(module, index, len(self.plan.stages), self.context, messages, self._deferred))
        return build_schedule(self.plan.schedule, stages, self.num_microbatches, loss_fn), stages

    def _loss(self, losses: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        """What is differentiated of a microbatch's losses (`TokenLoss`); notes the sums of its two terms."""
        cross_entropy, z_loss, total = losses
        self._sums.append(torch.stack([cross_entropy.sum(), z_loss.sum()]))
        return total[0] * self._factor


class _Stage(PipelineStage):
    """torch's stage with a split backward pass of our own, less memory, and forward-only steps under every schedule.

    torch allocates what a stage receives for all microbatches of a step; here that lives from when it is asked for to
    the end of the backward pass that uses it.

    Args:
        module: The stage.
        index: Its place in the pipeline.
        num_stages: Stages of the pipeline.
        context: The layout.
        messages: What it takes and what it returns, on the meta device; then torch need not find out by a pass over the
            whole pipeline.
        deferred: What the stage's linear layers put off; None when backward passes are not split.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        num_stages: int,
        context: ParallelContext,
        messages: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
        deferred: DeferredWeightGradients | None,
    ) -> None:
        self._received, self._returned = messages
        super().__init__(
            module,
            index,
            num_stages,
            context.device,
            input_args=self._received,
            output_args=self._returned,
            group=context.pp_group,
            dw_builder=None if deferred is None else lambda: self._weight_gradients(deferred.take()),
        )

    def _prepare_forward_infra(self, *args: Any, **options: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **options)
        for received in self.args_recv_info.values():
            _release(received)
        return result

    def _prepare_backward_infra(self, *args: Any, **options: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **options)
        for received in self.grad_recv_info.values():
            _release(received)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """How to receive a microbatch's input."""
        for info, meta in zip(self.args_recv_info[fwd_chunk_id], self._received, strict=True):
            info.buffer = torch.empty_like(meta, device=self.device, requires_grad=self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """How to receive the gradients of a microbatch's output."""
        if self.has_backward and not self.is_last:
            for info, meta in zip(self.grad_recv_info[bwd_chunk_id], self._returned, strict=True):
                info.buffer = torch.empty_like(meta, device=self.device, requires_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        """The forward pass of a microbatch; in a forward-only step, its input is not kept."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **options)
        if not self.has_backward:
            _release(self.args_recv_info[fwd_chunk_id])
            self.fwd_cache[fwd_chunk_id] = (self.fwd_cache[fwd_chunk_id][0], [])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> None:
        """The backward pass of a microbatch, or its first part; nothing in a forward-only step."""
        super().backward_one_chunk(bwd_chunk_id, *args, **options)
        if self.has_backward:
            _release(self.args_recv_info[bwd_chunk_id])
            _release(self.grad_recv_info[bwd_chunk_id])

    def _weight_gradients(self, compute: Callable[[], None]) -> Callable[[], None]:
        """The second part of a backward pass."""

        def run() -> None:
            compute()
            for group in _fsdp_groups(self.submod):
                group.post_backward()  # adds the gradients, which have the compute dtype, to those in fp32

        return run

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


def _release(received: Sequence[Any]) -> None:
    """Let go of received tensors."""
    for info in received:
        info.buffer = torch.empty(0, device="meta")


def _fsdp_groups(module: nn.Module) -> list[Any]:
    """What FSDP2 gathers and reduces together; torch's own pipeline stages reach for it in the same way."""
    if not isinstance(module, FSDPModule):
        return []
    groups: list[Any] = []
    for state in module._get_fsdp_state()._state_ctx.all_states:
        one = getattr(state, "_fsdp_param_group", None)  # of torch 2.11 and 2.12
        groups += getattr(state, "_fsdp_param_groups", [] if one is None else [one])
    return groups
