"""torch's pipeline schedules drive every level of data parallelism, which then reduces gradients once a step."""

import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from megatron.core.config import ComputeConfig, ParallelConfig
from megatron.core.distributed import DataParallel, data_parallel
from megatron.core.parallel_state import ParallelContext
from tests.collectives import CountCollectives
from tests.distributed import run_distributed

WIDTH, BATCH, MICROBATCHES = 6, 16, 4
LOOPED = {"interleaved": ScheduleInterleaved1F1B, "interleaved-zb": ScheduleInterleavedZeroBubble}
V_SHAPED = {"zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}
SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
LEVELS = ["no_shard", "optim", "optim_grads", "optim_grads_params"]
# In the backward pass in two parts, torch looks up the parameters' graph nodes when ZeRO-3 has released them, and loses
# gradients: without an error under DualPipeV.
LOSES_GRADIENTS = {(name, "optim_grads_params") for name in ("interleaved-zb", "zbv", "dualpipev")}
CASES = [
    (name, level) for name in (*SINGLE, *LOOPED, *V_SHAPED) for level in LEVELS if (name, level) not in LOSES_GRADIENTS
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, 3)
        self.outer = nn.Linear(3, WIDTH)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def build(num_stages):
    torch.manual_seed(0)
    return [Stage() for _ in range(num_stages)]


def batch(step):
    return torch.randn(2, BATCH, WIDTH, generator=torch.Generator().manual_seed(step)).unbind()


def loss(found, wanted):
    return (found - wanted).square().sum()


def gradients(stages):
    return {
        f"{number}.{name}": p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for number, stage in stages.items()
        for name, p in stage.named_parameters()
    }


def _pipeline(context, schedule_name, level):
    """Gradients of the second step and its data-parallel collectives."""
    rank, ranks = context.pp_rank, context.pp_size
    number = 2 * ranks - 1 - rank if schedule_name in V_SHAPED else rank + ranks
    numbers = [rank] if schedule_name in SINGLE else [rank, number]
    num_stages = ranks * len(numbers)
    stages = {n: stage for n, stage in enumerate(build(num_stages)) if n in numbers}
    parallel = [DataParallel(s, context, ComputeConfig(), s.layers, level) for s in stages.values()]
    runtime = [
        PipelineStage(stages[n], n, num_stages, torch.device("cpu"), group=context.pp_group) for n in numbers
    ]  # fmt: skip
    schedule = {**SINGLE, **LOOPED, **V_SHAPED}[schedule_name](
        runtime[0] if schedule_name in SINGLE else runtime, MICROBATCHES, loss_fn=loss, scale_grads=False
    )
    for step in range(2):
        inputs, wanted = (half[context.dp_rank :: context.dp_size] for half in batch(step))
        for stage in stages.values():
            stage.zero_grad()
        with CountCollectives() as count:
            last = {"target": wanted, "losses": []} if num_stages - 1 in numbers else {}
            schedule.step(*([inputs] if 0 in numbers else []), **last)
            for stage_parallel in parallel:
                stage_parallel.reduce_gradients()
    names = ("allreduce_", "_allgather_base_", "_reduce_scatter_base_")
    return gradients(stages), [count.calls[name] // len(numbers) for name in names]


def _rank(rank):
    context = ParallelContext.create(ParallelConfig(pipeline_model_parallel_size=2), torch.device("cpu"))
    data_parallel.MIN_UNIT_MIB = 0  # each block is a unit
    return [_pipeline(context, *case) for case in CASES]


def test_gradients_and_collectives_under_each_schedule():
    expected = {}
    for num_stages in (2, 4):
        stages = build(num_stages)
        x, wanted = batch(1)
        for stage in stages:
            x = stage(x)
        loss(x, wanted).backward()
        expected[num_stages] = gradients(dict(enumerate(stages)))
    units = 3
    for found in run_distributed(_rank, 4):
        for (schedule, level), (of_stages, (all_reduces, gathers, scatters)) in zip(CASES, found, strict=True):
            for name, gradient in of_stages.items():
                whole = expected[2 if schedule in SINGLE else 4][name]
                assert (gradient - whole).norm() < 2e-6 * whole.norm(), (schedule, level, name)
            reductions = {"no_shard": (1, 0), "optim": (0, 1)}.get(level, (0, units))
            assert (all_reduces, scatters) == reductions, (schedule, level)
            if level != "optim_grads_params":
                assert gathers == scatters, (schedule, level)
