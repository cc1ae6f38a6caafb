"""Every optimizer takes the step of one process when parameters are divided over tp, or over dp and tp."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from megatron.core.config import OptimizerConfig, ParallelConfig
from megatron.core.optimizer import build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import (
    Init,
    ModelParameter,
    ParamSpec,
    local_slice,
    local_tensor,
    model_parameters,
    shard_parameters,
)
from tests.distributed import run_distributed

CPU = ParallelContext(torch.device("cpu"))
STEPS = 4
OPTIMIZERS = ["adamw", "adamw-scale", "adafactor"]
# name: shape, axes ("split" is divided over tp), logical matrices, block, rows or columns of padding under tp. Shards
# cut blocks, FSDP2's are uneven, some are empty, and matrices lie on both sides of the size from which Adafactor
# factors, with padding too.
SHAPES = {
    "qkv": ((3 * 130, 144), ("split", "x"), 3, 5, 0),
    "gated": ((2 * 134, 129), ("split", "x"), 2, 1, 0),
    "padded_gated": ((2 * 133, 129), ("split", "x"), 2, 1, 2),
    "small_gated": ((2 * 127, 129), ("split", "x"), 2, 1, 2),
    "o": ((131, 260), ("x", "split"), 1, 1, 0),
    "padded_o": ((131, 259), ("x", "split"), 1, 1, 1),
    "small_o": ((5, 8), ("x", "split"), 1, 1, 0),
    "thin_o": ((130, 127), ("x", "split"), 1, 1, 1),
    "vocab": ((133, 150), ("split", "x"), 1, 1, 3),
    "positions": ((130, 128), ("x", "x"), 1, 1, 0),
    "table": ((9, 4), ("x", "split"), 1, 1, 0),
    "norm": ((37,), ("x",), 1, 1, 0),
    "bias": ((12,), ("split",), 3, 2, 0),
    "padded_bias": ((10,), ("split",), 2, 1, 2),
}


class Holder(nn.Module):
    """One parameter with its spec."""

    def __init__(self, name, shape, spec):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float64))
        self.parameter_specs = {"weight": spec}


class Model(nn.ModuleDict):
    """Holders by name; FSDP2 wants a module that has a forward."""

    def forward(self):
        raise NotImplementedError


def values(step):
    """Parameters (step 0) or the gradients of a step, of very different scales."""
    generator = torch.Generator().manual_seed(step)
    result = {}
    for number, (name, (shape, _, matrices, block, _)) in enumerate(SHAPES.items()):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        rows = torch.arange(shape[0]) // block % matrices
        scale = 10.0 ** (rows - number % 3) * (0.02 if step == 0 else 1.0)
        result[name] = value * scale.view(-1, *[1] * (len(shape) - 1))
    return result


def unfuse(tensors):
    """The logical matrices of fused parameters, by name and number."""
    result = {}
    for name, tensor in tensors.items():
        _, _, matrices, block, _ = SHAPES[name]
        of_row = torch.arange(tensor.shape[0]) // block % matrices
        result |= {f"{name}_{matrix}": tensor[of_row == matrix] for matrix in range(matrices)}
    return result


def build(padded, fused):
    """The model on the meta device."""
    model = Model()
    with torch.device("meta"):
        for name, (shape, axes, matrices, block, padding) in SHAPES.items():
            parts = 1 if fused else matrices
            valid = (shape[0] // parts, *shape[1:])
            names = tuple(map(str, range(matrices // parts)))
            spec = ParamSpec(
                axes, Init("constant", (0.0,) * len(names)), names, block if fused else 1, name != "norm", valid
            )
            more = padding // parts if padded else 0
            whole = tuple(size + more * (axis == "split") for size, axis in zip(valid, axes, strict=True))
            for number in range(parts):
                model[name if fused else f"{name}_{number}"] = Holder(name, whole, spec)
    return model


def leading(value):
    """Index of the part of a padded tensor that `value` has."""
    return tuple(slice(size) for size in value.shape)


def part(value, parameter):
    """This rank's part of a whole value, which lacks the padding of the parameter."""
    padded = value.new_zeros(parameter.shape)
    padded[leading(value)] = value
    for dim in range(value.ndim):
        padded = padded.narrow(dim, *local_slice(parameter, dim))
    return padded


def as_gradient(value, parameter):
    local = part(value, parameter).contiguous()
    if value.ndim == 2:
        local = local.T.contiguous().T  # a backward pass may leave any layout
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def train(model, context, optimizer, fused):
    """Parameters and state after a few steps."""
    model.to_empty(device="cpu")
    values_of = values if fused else (lambda step: unfuse(values(step)))
    with torch.no_grad():
        for name, value in values_of(0).items():
            local_tensor(model[name].weight).copy_(part(value, model[name].weight))
    config = OptimizerConfig(optimizer=optimizer, weight_decay=0.0 if optimizer == "adafactor" else 0.1)
    built = build_optimizer(config, model_parameters([model]), context)
    for step in range(1, STEPS + 1):
        for name, gradient in values_of(step).items():
            model[name].weight.grad = as_gradient(gradient, model[name].weight)
        built.step(0.01)
        built.zero_grad()
    found = {f"parameter/{n}": p for n, p in zip(built.names, built.parameters, strict=True)} | built.named_state()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in found.items()}


def _rank(rank, fsdp, cases):
    context = ParallelContext.create(ParallelConfig(tensor_model_parallel_size=2), torch.device("cpu"))
    found = []
    for optimizer, fused in cases:
        model = build(padded=True, fused=fused)
        shard_parameters(model, context.mesh["tp"], {"split"})
        if fsdp:
            fully_shard(model, mesh=context.mesh["dp"])
        found.append(train(model, context, optimizer, fused))
    return found


@pytest.mark.parametrize("fsdp", [False, True])
def test_dp_2_x_tp_2_equals_whole(fsdp):
    cases = [(optimizer, fused) for optimizer in OPTIMIZERS for fused in (True, False)]
    alone = [train(build(padded=False, fused=fused), CPU, optimizer, fused) for optimizer, fused in cases]
    ranks = run_distributed(_rank, 4, fsdp, cases)
    for found in ranks:
        for case, expected, tensors, first in zip(cases, alone, found, ranks[0], strict=True):
            assert tensors.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(tensors[name], first[name]), (case, name)  # whole tensors are so on every rank
                padding = tensors[name].clone()
                padding[leading(value)] = 0.0
                assert padding.abs().max() <= (1e-20 if "moment" in name else 0.0), (case, name)
                found_value = tensors[name][leading(value)]
                torch.testing.assert_close(found_value, value, rtol=1e-10, atol=0, msg=f"{case} {name}")
    for optimizer in OPTIMIZERS:  # fused and unfused
        fused, unfused = (ranks[0][cases.index((optimizer, choice))] for choice in (True, False))
        whole = {name: fused[f"parameter/{name}.weight"][tuple(map(slice, SHAPES[name][0]))] for name in SHAPES}
        for name, value in unfuse(whole).items():
            found_value = unfused[f"parameter/{name}.weight"][leading(value)]
            torch.testing.assert_close(found_value, value, rtol=1e-10, atol=0)


class _Holding(nn.Module):
    """A stage that holds an embedding, and something of its own that moves it within the buffers."""

    def __init__(self, rows):
        super().__init__()
        self.parameter_specs = {
            "embedding": ParamSpec(("x", "x"), Init("normal", (1.0,))),
            "own": ParamSpec(("x", "x"), Init("normal", (1.0,))),
        }
        self.own = nn.Parameter(torch.ones(rows, 130))
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(140, 130, generator=generator))


def held(module, stage, is_copy):
    return [
        ModelParameter(f"{stage}.own", module.own, module.parameter_specs["own"]),
        ModelParameter("embedding", module.embedding, module.parameter_specs["embedding"], True, is_copy),
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_copies_take_the_owners_scales(optimizer):
    """The hook is given the sums of each shared parameter by name; copies on one rank take the first one's."""
    handed = []

    def twice_what_it_is(totals):
        handed.append({name: total.shape for name, total in totals.items()})
        for total in totals.values():
            total.mul_(2)

    stages = [_Holding(3), _Holding(150)]
    parameters = [*held(stages[0], 0, False), *held(stages[1], 1, True)]
    built = build_optimizer(OptimizerConfig(optimizer=optimizer), parameters, CPU, twice_what_it_is)
    alone = _Holding(3)
    plain = build_optimizer(OptimizerConfig(optimizer=optimizer), held(alone, 0, False), CPU)
    for step in range(2):
        gradient = torch.randn(140, 130, generator=torch.Generator().manual_seed(step))
        for stage in (*stages, alone):
            stage.own.grad, stage.embedding.grad = torch.ones_like(stage.own), gradient.clone()
        built.step(0.01)
        plain.step(0.01)
    assert torch.equal(stages[0].embedding, stages[1].embedding)
    assert torch.equal(stages[0].own, alone.own)
    assert torch.equal(stages[0].embedding, alone.embedding) == (optimizer == "adamw")
    sizes = {"adamw": [], "adamw-scale": [1], "adafactor": [1 + 130, 1]}[optimizer]
    assert handed == [{"embedding": torch.Size([size])} for size in sizes] * 2
    state = built.named_state()
    assert len([name for name in state if "embedding" in name]) == len(built.parameter_state(1))
    assert not any("embedding" in name for name in _as_copy(optimizer).named_state(owned_only=True))
    with torch.no_grad():
        stages[0].embedding.add_(1.0)
        for tensor in built.parameter_state(1).values():
            tensor.add_(1.0)
    built.refresh_copies()
    assert torch.equal(stages[0].embedding, stages[1].embedding)
    for kind, tensor in built.parameter_state(1).items():
        assert torch.equal(tensor, built.parameter_state(3)[kind])


def _as_copy(optimizer):
    return build_optimizer(OptimizerConfig(optimizer=optimizer), held(_Holding(3), 1, True), CPU)
