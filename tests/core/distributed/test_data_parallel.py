"""Data parallelism trains the same model as one process, for every sharding strategy."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron.core.config import ComputeConfig, OptimizerConfig, ParallelConfig
from megatron.core.distributed import DataParallel, data_parallel, global_grad_norm, gradient_divisor
from megatron.core.distributed.data_parallel import group_blocks
from megatron.core.optimizer import build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import Init, ModelParameter, ParamSpec, initialize_parameters, model_parameters
from tests.collectives import CountCollectives
from tests.distributed import run_distributed

CPU = ParallelContext(torch.device("cpu"))
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH, BATCH, STEPS = 7, 8, 4  # the width does not divide by the ranks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.empty(WIDTH))
        self.parameter_specs = {
            "weight": ParamSpec(("mlp", "embed"), Init("normal", (0.3, 0.5)), ("gate", "up")),
            "scale": ParamSpec(("embed",), Init("constant", (1.0,)), weight_decay=False),
        }

    def forward(self, x):
        gate, up = (x @ self.weight.T).unflatten(-1, (-1, 2)).unbind(-1)
        return x + torch.tanh(gate) * up * self.scale


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Parameter(torch.empty(1, WIDTH))
        self.parameter_specs = {"head": ParamSpec(("vocab", "embed"), Init("normal", (1.0,)))}

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x @ self.head.T


def train(context, strategy, microbatches, precision="fp32"):
    """Losses, gradient norms and final parameters; rank r computes rows r, r + ranks, ... of each batch."""
    with torch.device("meta"):
        model = Model()
    parallel = DataParallel(
        model, context, ComputeConfig(**({precision: True} if precision in LOW else {})), model.layers, strategy
    )
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=1)
    parameters = model_parameters([model])
    optimizer = build_optimizer(OptimizerConfig(optimizer="adamw-scale", weight_decay=0.1), parameters, context)
    losses, norms = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(BATCH, WIDTH, generator=generator)
        mine = batch[context.dp_rank :: context.dp_size].chunk(microbatches)
        total = torch.zeros(())
        for number, rows in enumerate(mine):
            parallel.set_gradient_sync(number == microbatches - 1)
            loss = (model(rows.to(LOW.get(precision))).float() - 1).square().sum() / BATCH
            loss.backward()
            total += loss.detach()
        parallel.reduce_gradients()
        if context.dp_size > 1:
            torch.distributed.all_reduce(total)
        norm = global_grad_norm(parameters, context)
        divisor = gradient_divisor(norm, 1.0)
        optimizer.step(0.05, divisor)
        optimizer.zero_grad()
        losses.append(total.item())
        norms.append(norm.item())
    with torch.no_grad():  # the parameters are shards again after a forward without backward
        model(batch.to(LOW.get(precision)))
    parallel.reshard()
    assert strategy in (None, "no_shard") or all(isinstance(p, DTensor) for p in model.parameters())
    values = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in zip(optimizer.names, optimizer.parameters, strict=True)
    }
    sharded = all(isinstance(p, DTensor) for p in optimizer.parameters)
    return losses, norms, values, sharded


def _rank(rank, strategies, microbatches, precision="fp32"):
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    return [train(context, strategy, microbatches, precision) for strategy in strategies]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_two_ranks_train_as_one(microbatches):
    losses, norms, parameters, _ = train(CPU, None, 1)
    strategies = [None, "no_shard", "optim", "optim_grads", "optim_grads_params"]
    for found in run_distributed(_rank, 2, strategies, microbatches):
        for strategy, (other_losses, other_norms, other_parameters, sharded) in zip(strategies, found, strict=True):
            assert sharded == (strategy not in (None, "no_shard"))
            assert other_losses == pytest.approx(losses, rel=1e-5)
            assert other_norms == pytest.approx(norms, rel=1e-5)
            for name, value in parameters.items():
                torch.testing.assert_close(other_parameters[name], value, rtol=1e-4, atol=1e-6)


def clipped_gradients(context, strategy):
    """Norm of the gradients before the optimizer divides them, and after."""
    model = Model()
    parallel = DataParallel(model, context, ComputeConfig(), model.layers, strategy)
    initialize_parameters(model, seed=1)
    parameters = model_parameters([model])
    optimizer = build_optimizer(OptimizerConfig(optimizer="adamw"), parameters, context)
    parallel.set_gradient_sync(True)
    model(torch.ones(2, WIDTH)).sum().backward()
    parallel.reduce_gradients()
    norm = global_grad_norm(parameters, context)
    optimizer.step(0.1, gradient_divisor(norm, 0.01))
    return norm.item(), global_grad_norm(parameters, context).item()


def _clipping_rank(rank):
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    return [clipped_gradients(context, strategy) for strategy in ("no_shard", "optim", "optim_grads_params")]


def test_clipped_gradients_have_the_norm_that_was_asked_for():
    """On CPUs torch's AdamW leaves behind the gradients that it used."""
    for before, after in [
        clipped_gradients(CPU, None),
        *(pair for found in run_distributed(_clipping_rank, 2) for pair in found),
    ]:
        assert before > 1 and after == pytest.approx(0.01, rel=1e-4)


def _collectives(rank, microbatches):
    """Of the forward and backward passes of the second step, by strategy: calls and bytes by operator."""
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    data_parallel.MIN_UNIT_MIB = 0  # each block is a unit
    counts = {}
    for strategy in ("no_shard", "optim", "optim_grads", "optim_grads_params"):
        model = Model()
        parallel = DataParallel(model, context, ComputeConfig(), model.layers, strategy)
        initialize_parameters(model, seed=1)
        for _ in range(2):
            with CountCollectives() as count:
                for number in range(microbatches):
                    parallel.set_gradient_sync(number == microbatches - 1)
                    model(torch.ones(2, WIDTH)).sum().backward()
                parallel.reduce_gradients()
        counts[strategy] = dict(count.calls), dict(count.nbytes)
    return counts


@pytest.mark.parametrize("microbatches", [1, 3])
def test_collectives_of_a_step(microbatches):
    """Gradients are reduced once a step, whatever the microbatches; parameters gathered once, but for ZeRO-3.

    It gathers those of blocks for each pass of each microbatch, what is outside them once a microbatch.
    """
    units, gather, scatter = 4, "_allgather_base_", "_reduce_scatter_base_"
    nbytes = 4 * 3 * (2 * WIDTH * WIDTH + WIDTH + WIDTH % 2) + 4 * 2 * WIDTH  # odd rows and the head's one are padded
    for counts in run_distributed(_collectives, 2, microbatches):
        assert counts["no_shard"] == ({"allreduce_": 1}, {"allreduce_": 4 * (3 * (2 * WIDTH + 1) + 1) * WIDTH})
        assert counts["optim"] == ({gather: 1, scatter: 1}, {gather: nbytes, scatter: nbytes})
        assert counts["optim_grads"] == ({gather: units, scatter: units}, {gather: nbytes, scatter: nbytes})
        head = 4 * 2 * WIDTH
        assert counts["optim_grads_params"] == (
            {gather: microbatches * (2 * (units - 1) + 1), scatter: units},
            {gather: microbatches * (2 * (nbytes - head) + head), scatter: nbytes},
        )


@pytest.mark.parametrize("precision", LOW)
def test_low_precision_shards_keep_fp32_masters(precision):
    losses, _, parameters, _ = train(CPU, None, 1)
    for found in run_distributed(_rank, 2, ["optim", "optim_grads"], 2, precision):
        for other_losses, _, other_parameters, _ in found:
            assert other_losses == pytest.approx(losses, rel=0.05)
            assert other_losses != losses
            for name, value in parameters.items():
                assert other_parameters[name].dtype == torch.float32
                assert not torch.equal(other_parameters[name], other_parameters[name].to(LOW[precision]).float())
                torch.testing.assert_close(other_parameters[name], value, rtol=0.1, atol=0.05)


def with_gradients(*gradients, is_copy=False):
    """Parameters that have these gradients."""
    found = []
    for gradient in gradients:
        spec = ParamSpec(("x",) * gradient.ndim, Init("constant", (0.0,)))
        found.append(ModelParameter("p", nn.Parameter(torch.zeros_like(gradient)), spec, is_copy=is_copy))
        found[-1].parameter.grad = gradient
    return found


def test_norm_and_clipping_of_plain_gradients():
    parameters = with_gradients(torch.tensor([1.0, 2.0, 2.0]), torch.full((2, 2), 2.0))
    parameters += with_gradients(torch.full((9,), 7.0), is_copy=True)  # counted where its owner is
    norm = global_grad_norm(parameters, CPU)
    assert norm.item() == 5.0
    assert gradient_divisor(norm, 10.0) is None and gradient_divisor(norm, 0.0) is None
    assert gradient_divisor(norm, 0.5).item() == pytest.approx(10.0, rel=1e-5)
    assert global_grad_norm([], CPU).item() == 0.0


@pytest.mark.parametrize(("max_norm", "factor"), [(0.0, 1.0), (10.0, 1.0), (2.5, 0.5)])
def test_the_loss_scale_is_taken_out_while_clipping(max_norm, factor):
    parameters = with_gradients(torch.tensor([3.0, 4.0]) * 2.0**20)
    norm = global_grad_norm(parameters, CPU, 2.0**20)
    assert norm.item() == 5.0
    assert gradient_divisor(norm, max_norm, 2.0**20).item() == pytest.approx(2.0**20 / factor, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norm_shows_what_is_not_finite(value):
    assert not math.isfinite(global_grad_norm(with_gradients(torch.tensor([1.0, value])), CPU).item())
    good, losses = with_gradients(torch.tensor([3.0, 4.0])), torch.tensor([1.0, 7.0], dtype=torch.float64)
    assert global_grad_norm(good, CPU, loss_sums=losses).item() == 5.0
    losses[1] = value
    assert not math.isfinite(global_grad_norm(good, CPU, loss_sums=losses).item())


def test_small_blocks_share_a_unit():
    blocks = [nn.Linear(10, 10, bias=False) for _ in range(5)]  # 400 bytes each
    assert [len(group) for group in group_blocks(blocks, 400)] == [1, 1, 1, 1, 1]
    assert [len(group) for group in group_blocks(blocks, 401)] == [2, 3]
    assert [len(group) for group in group_blocks(blocks, 10_000)] == [5]
    assert group_blocks([], 1) == []
