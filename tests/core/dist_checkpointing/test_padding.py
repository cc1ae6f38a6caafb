"""Checkpoints of parameters that are padded to divide among ranks hold no padding."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from megatron.core.config import OptimizerConfig, ParallelConfig
from megatron.core.dist_checkpointing import latest_checkpoint, load_checkpoint, read_manifest, save_checkpoint
from megatron.core.optimizer import build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import Init, ParamSpec, initialize_parameters, model_parameters, shard_parameters
from megatron.training.checkpointing import training_tensors
from tests.distributed import run_distributed

CPU = ParallelContext(torch.device("cpu"))
# name: shape, axes ("split" is divided over tp), logical matrices. Adafactor factors some and others not; of "few" the
# last of three tensor-parallel ranks holds nothing but padding.
SHAPES = {
    "gated": ((2 * 130, 129), ("split", "x"), 2),
    "small_gated": ((2 * 5, 3), ("split", "x"), 2),
    "o": ((131, 130), ("x", "split"), 1),
    "small_o": ((2, 5), ("x", "split"), 1),
    "few": ((4, 3), ("split", "x"), 1),
    "few_columns": ((5, 4), ("x", "split"), 1),
    "bias": ((2 * 5,), ("split",), 2),
    "norm": ((7,), ("x",), 1),
}


class Holder(nn.Module):
    """A parameter for each of `SHAPES`, padded to divide by `ranks`; FSDP2 wants a module that has a forward."""

    def __init__(self, ranks):
        super().__init__()
        self.parameter_specs = {}
        for name, (shape, axes, matrices) in SHAPES.items():
            whole = [
                -(-size // (matrices * ranks)) * matrices * ranks if axis == "split" else size
                for size, axis in zip(shape, axes, strict=True)
            ]
            self.register_parameter(name, nn.Parameter(torch.empty(whole)))
            init = Init("normal", tuple(range(1, matrices + 1)))
            names = tuple(map(str, range(matrices)))
            self.parameter_specs[name] = ParamSpec(axes, init, names, valid_shape=shape)

    def forward(self):
        raise NotImplementedError


def build(context, fsdp, optimizer):
    with torch.device("meta"):
        model = Holder(context.tp_size)
    if context.tp_size > 1:
        shard_parameters(model, context.mesh["tp"], {"split"})
    if fsdp:
        fully_shard(model, mesh=context.mesh["dp"])
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=2)
    return model, build_optimizer(OptimizerConfig(optimizer=optimizer), model_parameters([model]), context)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _there_and_back(rank, source, target):
    context = ParallelContext.create(ParallelConfig(tensor_model_parallel_size=3), torch.device("cpu"))
    for optimizer in ("adamw", "adafactor"):
        expected = alone(optimizer)[1].named_state()
        for fsdp in (False, True):
            model, built = build(context, fsdp, optimizer)
            initial = dict(build(CPU, False, optimizer)[0].named_parameters())
            for name, parameter in model.named_parameters():
                index = tuple(map(slice, SHAPES[name][0]))
                found = whole(parameter.detach()).clone()
                assert torch.equal(found[index], initial[name]), name
                found[index] = 0.0
                assert found.eq(0.0).all(), name
            load_checkpoint(latest_checkpoint(source / optimizer), training_tensors(built))
            for name, tensor in built.named_state().items():
                found = whole(tensor).clone()
                index = tuple(map(slice, expected[name].shape))
                assert torch.equal(found[index], expected[name]), name
                found[index] = 0.0
                assert found.eq(0.0).all(), name
            save_checkpoint(target / optimizer / str(fsdp), 2, training_tensors(built), {}, context)


def alone(optimizer):
    """After one step in one process."""
    model, built = build(CPU, False, optimizer)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    built.step(0.01)
    return model, built


def test_saved_by_one_loaded_and_saved_padded(tmp_path):
    """On 3 tensor-parallel x 2 data-parallel ranks, replicated and sharded."""
    source, target = tmp_path / "source", tmp_path / "target"
    for optimizer in ("adamw", "adafactor"):
        save_checkpoint(source / optimizer, 1, training_tensors(alone(optimizer)[1]), {}, CPU)
    run_distributed(_there_and_back, 6, source, target)
    for optimizer in ("adamw", "adafactor"):
        expected = training_tensors(alone(optimizer)[1])
        first = read_manifest(latest_checkpoint(source / optimizer))["tensors"]
        for fsdp in (False, True):
            path = latest_checkpoint(target / optimizer / str(fsdp))
            entries = read_manifest(path)["tensors"]
            assert {name: e["shape"] for name, e in entries.items()} == {n: e["shape"] for n, e in first.items()}
            loaded = {name: torch.full_like(tensor, -1.0) for name, tensor in expected.items()}
            load_checkpoint(path, loaded)
            for name, tensor in expected.items():
                assert torch.equal(loaded[name], tensor), name
