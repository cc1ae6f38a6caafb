"""Data parallelism of every level over parameters that tensor parallelism has divided: the steps of one process."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from megatron.core.config import ComputeConfig, OptimizerConfig, ParallelConfig
from megatron.core.distributed import (
    DataParallel,
    data_parallel,
    global_grad_norm,
    gradient_divisor,
    sum_replicated_gradients_,
)
from megatron.core.optimizer import build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import (
    Init,
    ModelParameter,
    ParamSpec,
    counted_here,
    initialize_parameters,
    local_tensor,
    model_parameters,
    shard_parameters,
)
from tests.collectives import CountCollectives
from tests.distributed import run_distributed

CPU = ParallelContext(torch.device("cpu"))
WIDTH, INNER, LENGTH, BATCH, STEPS = 7, 10, 4, 8, 3
STRATEGIES = ["no_shard", "optim", "optim_grads", "optim_grads_params"]


class _AllReduce(torch.autograd.Function):
    """Sum over a group in the forward pass, in the backward pass, or in neither."""

    @staticmethod
    def forward(ctx, x, group, forward, backward):
        ctx.group, ctx.backward = group, backward
        x = x.clone()
        if forward and group is not None:
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        if ctx.backward and ctx.group is not None:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None, None, None


class Block(nn.Module):
    """Gated feed-forward block, column- then row-parallel, after a scale that every rank holds.

    With `split`, each tensor-parallel rank scales its own positions only, as under sequence parallelism.
    """

    def __init__(self, context, split):
        super().__init__()
        self.context, self.split = context, split
        self.scale = nn.Parameter(torch.empty(WIDTH))
        self.wi = nn.Parameter(torch.empty(2 * INNER, WIDTH))
        self.wo = nn.Parameter(torch.empty(WIDTH, INNER))
        self.parameter_specs = {
            "scale": ParamSpec(("embed",), Init("constant", (1.0,)), weight_decay=False),
            "wi": ParamSpec(("mlp", "embed"), Init("normal", (0.3, 0.5)), ("gate", "up")),
            "wo": ParamSpec(("embed", "mlp"), Init("normal", (0.4,))),
        }

    def forward(self, x):  # [b, s, h]
        group, rank, size = self.context.tp_group, self.context.tp_rank, self.context.tp_size
        scale = local_tensor(self.scale)
        if self.split:
            own = torch.zeros(LENGTH, 1)
            own[rank * LENGTH // size : (rank + 1) * LENGTH // size] = 1.0
            scaled = _AllReduce.apply(x * own * scale, group, True, False)
            scaled = _AllReduce.apply(scaled, group, False, True)
        else:
            scaled = _AllReduce.apply(x * scale, group, False, True)
        gate, up = F.linear(scaled, local_tensor(self.wi)).unflatten(-1, (-1, 2)).unbind(-1)  # [b, s, f']
        down = F.linear(torch.tanh(gate) * up, local_tensor(self.wo))
        if not self.split:
            return x + _AllReduce.apply(down, group, True, False)
        # A rank's gradient of the output is that of its own positions.
        return _AllReduce.apply(x * own, group, True, False) + _AllReduce.apply(down, group, True, True)


class Model(nn.Module):
    def __init__(self, context, split=False):
        super().__init__()
        self.layers = nn.ModuleList(Block(context, split) for _ in range(3))
        self.head = nn.Parameter(torch.empty(3, WIDTH))
        self.parameter_specs = {"head": ParamSpec(("classes", "embed"), Init("normal", (1.0,)))}
        self.context, self.split = context, split

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        if not self.split:
            return F.linear(x, local_tensor(self.head))
        rank, size = self.context.tp_rank, self.context.tp_size
        part = x[:, rank * LENGTH // size : (rank + 1) * LENGTH // size]
        return F.linear(part, local_tensor(self.head))


def train(context, strategy, split, optimizer_name, microbatches=2):
    """Gradient norms, whole parameters and whole gradients of the first step."""
    with torch.device("meta"):
        model = Model(context, split)
    if context.tp_size > 1:
        shard_parameters(model, context.mesh["tp"], {"mlp"})
    parallel = DataParallel(model, context, ComputeConfig(), model.layers, strategy)
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=1)
    parameters = model_parameters([model])
    optimizer = build_optimizer(OptimizerConfig(optimizer=optimizer_name), parameters, context)
    norms, gradients = [], {}
    for step in range(STEPS):
        batch = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(step))
        mine = batch[context.dp_rank :: context.dp_size].chunk(microbatches)
        for number, rows in enumerate(mine):
            parallel.set_gradient_sync(number == microbatches - 1)
            ((model(rows) - 1).square().sum() / BATCH).backward()
        parallel.reduce_gradients()
        if split:
            with CountCollectives() as count:
                sum_replicated_gradients_(parameters, context)
            assert count.calls == ({"allreduce_": 1} if context.tp_size > 1 else {})
        with CountCollectives() as count:
            norm = global_grad_norm(parameters, context)
        assert count.calls == ({"allreduce_": 1} if context.world_size > 1 else {})
        if step == 0:
            gradients = {p.name: whole(p.parameter.grad) for p in parameters}
        optimizer.step(0.05, gradient_divisor(norm, 1.0))
        optimizer.zero_grad()
        norms.append(norm.item())
    named = zip(optimizer.names, optimizer.parameters, strict=True)
    return norms, gradients, {name: whole(parameter.detach()) for name, parameter in named}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _rank(rank, cases):
    context = ParallelContext.create(ParallelConfig(tensor_model_parallel_size=2), torch.device("cpu"))
    data_parallel.MIN_UNIT_MIB = 0  # each block is a unit
    return [train(context, *case) for case in cases]


def test_dp_2_x_tp_2_trains_as_one():
    cases = [(strategy, split, "adamw-scale") for strategy in STRATEGIES for split in (False, True)]
    cases += [("optim", False, "adafactor"), ("no_shard", False, "adafactor")]
    alone = {name: train(CPU, None, False, name) for name in ("adamw-scale", "adafactor")}
    ranks = run_distributed(_rank, 4, cases)
    for found in ranks:
        for case, first, (norms, gradients, parameters) in zip(cases, ranks[0], found, strict=True):
            expected_norms, expected_gradients, expected = alone[case[2]]
            assert norms == first[0], case  # the same bits on every rank
            assert norms == pytest.approx(expected_norms, rel=1e-5), case
            for name, value in expected.items():
                error = (gradients[name] - expected_gradients[name]).norm() / expected_gradients[name].norm()
                assert error < 1e-6, (case, name, error)
                assert (parameters[name] - value).norm() < 1e-6 * value.norm(), (case, name)
                assert torch.equal(parameters[name], first[2][name]), (case, name)


def _norm_of_one_bad_gradient(rank, bad_rank):
    """A replicated gradient that is not finite on one rank, where it does not count."""
    context = ParallelContext.create(ParallelConfig(tensor_model_parallel_size=2), torch.device("cpu"))
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, math.inf if rank == bad_rank else 4.0])
    found = ModelParameter("p", parameter, ParamSpec(("x",), Init("constant", (0.0,))))
    assert counted_here(parameter, context) == (rank == 0)
    return global_grad_norm([found], context).item()


def test_a_gradient_that_is_not_finite_anywhere_shows_everywhere():
    assert run_distributed(_norm_of_one_bad_gradient, 2, None) == [5.0, 5.0]
    for bad_rank in (0, 1):
        assert not any(map(math.isfinite, run_distributed(_norm_of_one_bad_gradient, 2, bad_rank)))
