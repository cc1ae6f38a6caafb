"""Each optimizer against a plain reference, fused against unfused parameters, and sharded against whole."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron.core.config import OptimizerConfig, ParallelConfig
from megatron.core.optimizer import adamw_scale, build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import Init, ParamSpec, local_tensor, model_parameters
from tests.distributed import run_distributed

OPTIMIZERS = ["adamw", "adamw-scale", "adafactor"]
CPU = ParallelContext(torch.device("cpu"))


class Holder(nn.Module):
    """One parameter with its spec."""

    def __init__(self, value, matrices=1, block=1, weight_decay=True):
        super().__init__()
        self.weight = nn.Parameter(value.clone())
        init = Init("constant", (0.0,) * matrices)
        names = tuple(map(str, range(matrices)))
        self.parameter_specs = {"weight": ParamSpec(("x",) * value.ndim, init, names, block, weight_decay)}


class Model(nn.ModuleDict):
    """Holders by name; FSDP2 wants a module that has a forward."""

    def forward(self):
        raise NotImplementedError


# name: (rows, columns), logical matrices, block. Rows do not divide evenly among 2 or 4 ranks, shards cut blocks,
# some matrices are large enough for Adafactor to factor and some are not, and one has fewer rows than there are ranks.
SHAPES = {
    "qkv": ((3 * 130, 144), 3, 5),
    "gated": ((2 * 131, 129), 2, 1),
    "small": ((6, 7), 2, 3),
    "plain": ((133, 150), 1, 1),
    "norm": ((37,), 1, 1),
    "bias": ((12,), 3, 2),
    "row": ((1, 5), 1, 1),
}


def values(step, dtype):
    """Parameters (step 0) or the gradients of a step, of very different scales."""
    generator = torch.Generator().manual_seed(step)
    result = {}
    for number, (name, (shape, matrices, block)) in enumerate(SHAPES.items()):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        rows = torch.arange(shape[0]) // block % matrices
        scale = 10.0 ** (rows - number % 3) * (0.02 if step == 0 else 1.0)
        result[name] = (value * scale.view(-1, *[1] * (len(shape) - 1))).to(dtype)
    return result


def fused_model(dtype):
    parameters = values(0, dtype)
    return Model({name: Holder(parameters[name], m, block, name != "norm") for name, (_, m, block) in SHAPES.items()})


def split(name, tensor):
    """The logical matrices of a fused parameter."""
    _, matrices, block = SHAPES[name]
    rows = torch.arange(tensor.shape[0]) // block % matrices
    return [tensor[rows == matrix] for matrix in range(matrices)]


def config(optimizer):
    return OptimizerConfig(optimizer=optimizer, weight_decay=0.0 if optimizer == "adafactor" else 0.1)


def train(model, optimizer, gradients, steps=5):
    for step in range(1, steps + 1):
        for name, gradient in gradients(step).items():
            model[name].weight.grad = gradient
        optimizer.step(0.01)
        optimizer.zero_grad()


def reference(optimizer, parameter, gradients, decays, lr=0.01, weight_decay=0.1):
    """One logical matrix, written as in the papers, in the dtype of the parameter."""
    p = parameter.clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    row = column = None
    for t, g in enumerate(gradients, start=1):
        rms = p.square().mean().sqrt()
        if optimizer == "adafactor":
            beta = 1 - t**-0.8
            squares = g.square() + 1e-30
            if p.ndim == 2 and min(p.shape) >= 128:
                row = beta * (0 if row is None else row) + (1 - beta) * squares.mean(1)
                column = beta * (0 if column is None else column) + (1 - beta) * squares.mean(0)
                update = g / (row / row.mean()).sqrt()[:, None] / column.sqrt()[None, :]
            else:
                v = beta * v + (1 - beta) * squares
                update = g / v.sqrt()
            update = update / update.square().mean().sqrt().clamp(min=1.0)
            p = p - lr * rms.clamp(min=1e-3) * update
            continue
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g.square()
        eps = 1e-6 if optimizer == "adamw-scale" else 1e-8
        update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + eps)
        scale = rms.clamp(min=1e-3) if optimizer == "adamw-scale" else 1.0
        p = p - lr * weight_decay * decays * p - lr * scale * update
    return p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_divisor_of_the_gradients(optimizer, dtype):
    """Clipping and loss scale on the way; exact for a power of two."""
    results = []
    for factor in (1.0, 8.0):
        model = fused_model(dtype)
        built = build_optimizer(config(optimizer), model_parameters([model]), CPU)
        for step in range(1, 4):
            for name, gradient in values(step, dtype).items():
                model[name].weight.grad = gradient * factor
            built.step(0.01, None if factor == 1.0 else torch.tensor(factor, dtype=torch.float64))
        results.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(plain, divided) for plain, divided in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_the_reference_on_each_logical_matrix(optimizer, dtype):
    model = fused_model(dtype)
    train(model, build_optimizer(config(optimizer), model_parameters([model]), CPU), lambda step: values(step, dtype))
    gradients = [values(step, torch.float64) for step in range(1, 6)]
    for name, start in values(0, torch.float64).items():
        if optimizer == "adamw":  # has no notion of matrices; its reference is elementwise
            parts = zip([model[name].weight], [start], [[g[name] for g in gradients]], strict=True)
        else:
            per_step = [split(name, g[name]) for g in gradients]
            parts = zip(split(name, model[name].weight), split(name, start), zip(*per_step, strict=True), strict=True)
        for ours, before, grads in parts:
            expected = reference(optimizer, before, grads, name != "norm")
            error = (ours.double() - expected).norm() / (expected - before).norm()
            assert error < (1e-12 if dtype == torch.float64 else 1e-4), (name, error)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_equals_unfused(optimizer):
    fused = fused_model(torch.float32)
    parts = {name: split(name, parameter) for name, parameter in values(0, torch.float32).items()}
    unfused = Model(
        {
            f"{name}_{number}": Holder(part, weight_decay=name != "norm")
            for name in parts
            for number, part in enumerate(parts[name])
        }
    )
    train(
        fused,
        build_optimizer(config(optimizer), model_parameters([fused]), CPU),
        lambda step: values(step, torch.float32),
    )
    train(
        unfused,
        build_optimizer(config(optimizer), model_parameters([unfused]), CPU),
        lambda step: {
            f"{name}_{number}": part
            for name, gradient in values(step, torch.float32).items()
            for number, part in enumerate(split(name, gradient))
        },
    )
    for name in SHAPES:
        for number, part in enumerate(split(name, fused[name].weight)):
            other = unfused[f"{name}_{number}"].weight
            assert (part - other).norm() <= 1e-6 * other.norm(), name


def _sharded_steps(rank, optimizer):
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    model = fused_model(torch.float64)
    fully_shard(model, mesh=context.mesh["dp"])
    built = build_optimizer(config(optimizer), model_parameters([model]), context)

    def gradients(step):
        return {
            name: distribute_tensor(value, context.mesh["dp"], model[name].weight.placements)
            for name, value in values(step, torch.float64).items()
        }

    train(model, built, gradients)
    rows = {name: local_tensor(parameter.detach()).shape[0] for name, parameter in model.named_parameters()}
    for name, value in built.named_state().items():
        if isinstance(value, DTensor):  # the state lies where its parameter lies
            assert local_tensor(value).shape[0] == rows[name.split("/")[-1]], name
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in built.named_state().items()
    }
    return {name: model[name].weight.full_tensor().detach() for name in SHAPES}, state


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sharded_equals_whole(optimizer, world_size):
    model = fused_model(torch.float64)
    whole = build_optimizer(config(optimizer), model_parameters([model]), CPU)
    train(model, whole, lambda step: values(step, torch.float64))
    for parameters, state in run_distributed(_sharded_steps, world_size, optimizer):
        assert state.keys() == whole.named_state().keys()
        for name in SHAPES:
            torch.testing.assert_close(parameters[name], model[name].weight.detach(), rtol=1e-10, atol=0)
        for name, value in whole.named_state().items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_filled_in_place(optimizer):
    """Copying parameters and named state into a fresh optimizer continues the run bit for bit."""
    model = fused_model(torch.float32)
    first = build_optimizer(config(optimizer), model_parameters([model]), CPU)
    train(model, first, lambda step: values(step, torch.float32))
    other = copy.deepcopy(model)
    second = build_optimizer(config(optimizer), model_parameters([other]), CPU)
    for name, value in second.named_state().items():
        value.copy_(first.named_state()[name])
    for pair in ((model, first), (other, second)):
        train(*pair, lambda step: values(step + 5, torch.float32))
    for name in SHAPES:
        assert torch.equal(model[name].weight, other[name].weight)


def test_buckets_do_not_change_the_update(monkeypatch):
    results = []
    for limit in (0, 100):
        monkeypatch.setitem(adamw_scale.BUCKET_MIB, "cpu", limit)
        model = fused_model(torch.float32)
        built = build_optimizer(config("adamw-scale"), model_parameters([model]), CPU)
        train(model, built, lambda step: values(step, torch.float32))
        results.append((len(built.buckets), model))
    assert results[0][0] == len(SHAPES) and results[1][0] == 1
    for name in SHAPES:
        assert torch.equal(results[0][1][name].weight, results[1][1][name].weight)


def test_a_parameter_without_gradient_is_named():
    model = fused_model(torch.float32)
    with pytest.raises(AssertionError, match=r"qkv\.weight"):
        build_optimizer(config("adamw"), model_parameters([model]), CPU).step(0.1)
