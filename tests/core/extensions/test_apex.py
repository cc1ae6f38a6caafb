"""The adapters of apex, computed by a double on the CPU, against torch's own; what they call against apex's sources."""

import ast
import importlib.util
import inspect
import itertools
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron.core.config import ComputeConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron.core.distributed import DataParallel
from megatron.core.errors import UserError
from megatron.core.extensions import apex, gradient_accumulation
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_sharding import shard_t5
from megatron.core.optimizer import build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import initialize_parameters, local_tensor, model_parameters
from megatron.core.tensor_parallel import TensorParallel
from megatron.core.tensor_parallel.layers import Linear
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain_in
from tests import apex_double
from tests.core.optimizer import test_optimizers as cases
from tests.distributed import run_distributed
from tests.training.test_pretrain import TINY, rows

CPU = ParallelContext(torch.device("cpu"))

# What is called, with the parameters that it has in apex's C++ sources.
BINDINGS = {
    "csrc/multi_tensor_adam.cu": {
        ("amp_C", "multi_tensor_adam_capturable", "multi_tensor_adam_capturable_cuda"): (
            "chunk_size noop_flag tensor_lists lr beta1 beta2 epsilon step mode bias_correction weight_decay inv_scale"
        )
    },
    "csrc/layer_norm_cuda.cpp": {
        ("fused_layer_norm_cuda", "rms_forward_affine", "rms_norm_affine"): "input normalized_shape gamma epsilon",
        ("fused_layer_norm_cuda", "rms_backward_affine", "rms_norm_gradient_affine"): (
            "dout invvar input_or_output normalized_shape gamma epsilon memory_efficient"
        ),
    },
    "csrc/megatron/fused_weight_gradient_dense.cpp": {
        ("fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp32_cuda_stub"): (
            "input_2d d_output_2d d_weight"
        )
    },
}
APEX_FLAGS = ["--optimizer-backend", "apex", "--norm-backend", "apex"]
NORM = "input weight normalized_shape eps memory_efficient"  # of fused_rms_norm_affine


@pytest.fixture
def double(monkeypatch):
    apex_double.install(monkeypatch.setitem, monkeypatch.setattr)


def test_the_double_has_the_parameters_of_the_bindings():
    for functions in BINDINGS.values():
        for (module, name, _), parameters in functions.items():
            function = getattr(apex_double.modules()[module], name)
            assert list(inspect.signature(function).parameters) == parameters.split()
    assert list(inspect.signature(apex_double.fused_rms_norm_affine).parameters) == NORM.split()


@pytest.mark.skipif("APEX_SOURCE" not in os.environ, reason="APEX_SOURCE does not name a checkout of apex")
def test_the_bindings_are_those_of_the_sources():
    source = Path(os.environ["APEX_SOURCE"])
    texts = {path: (source / path).read_text() for path in BINDINGS}
    bound = "".join(texts.values()) + (source / "csrc/amp_C_frontend.cpp").read_text()
    for path, functions in BINDINGS.items():
        for (_, name, implementation), parameters in functions.items():
            assert re.search(rf'm\.def\("{name}",\s*&{implementation},', bound)
            arguments = re.search(rf"\b{implementation}\((.*?)\)\s*[;{{]", texts[path], re.S).group(1)
            arguments = re.sub(r"<[^<>]*<[^<>]*>>|<[^<>]*>", "", arguments)
            assert [argument.split()[-1].lstrip("&") for argument in arguments.split(",")] == parameters.split()


@pytest.mark.skipif(importlib.util.find_spec("apex") is None, reason="apex is not installed")
def test_the_norm_of_the_package():
    folder = Path(importlib.util.find_spec("apex").origin).parent
    tree = ast.parse((folder / "normalization/fused_layer_norm.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert [argument.arg for argument in functions["fused_rms_norm_affine"].args.args] == NORM.split()
    chunk = (folder / "multi_tensor_apply/__init__.py").read_text()
    assert "MultiTensorApply(2048 * 32)" in chunk and apex.CHUNK_SIZE == 2048 * 32


# Adam


def optimizers(name):
    """The same model with torch's kernel and with apex's."""
    for backend in ("torch", "apex"):
        model = cases.fused_model(torch.float32)
        config = OptimizerConfig(optimizer=name, optimizer_backend=backend, weight_decay=0.1)
        yield model, build_optimizer(config, model_parameters([model]), CPU)


@pytest.mark.parametrize("name", ["adamw", "adamw-scale"])
def test_adam(double, name):
    """With a divisor, and a step in between that is skipped although its gradients are not finite."""
    states = []
    for model, optimizer in optimizers(name):
        for step in range(1, 7):
            for parameter, gradient in cases.values(step, torch.float32).items():
                model[parameter].weight.grad = gradient * 3.0
            skip = torch.tensor(step == 4)
            if step == 4:
                model["plain"].weight.grad[0, 0] = torch.nan
            optimizer.step(0.01, torch.tensor(3.0), skip)
            optimizer.zero_grad()
        states.append({**{key: value.detach() for key, value in model.state_dict().items()}, **optimizer.named_state()})
    theirs, ours = states
    assert theirs.keys() == ours.keys() and theirs["optimizer/step"] == ours["optimizer/step"] == 5
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6 * value.abs().max().item())


def test_a_run(double, byte_dataset, tmp_path):
    """All of apex by flags, several microbatches a step: the same losses as torch's."""
    runs = {"torch": [], "apex": [*APEX_FLAGS, "--gradient-accumulation-fusion"]}
    for name, flags in runs.items():
        arguments = [*TINY, "--data-path", str(byte_dataset), "--train-iters", "4", "--eval-iters", "0", *flags]
        arguments += ["--micro-batch-size", "2", "--global-batch-size", "4", "--metrics-file", str(tmp_path / name)]
        assert pretrain_in(CPU, parse_args(arguments).config) == 0
    assert rows(tmp_path / "apex") == pytest.approx(rows(tmp_path / "torch"), rel=1e-4)


def test_no_adafactor(double):
    model = cases.fused_model(torch.float32)
    config = OptimizerConfig(optimizer="adafactor", optimizer_backend="apex")
    with pytest.raises(UserError, match="--optimizer-backend apex has no adafactor"):
        build_optimizer(config, model_parameters([model]), CPU)


# RMSNorm


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_rms_norm(double, dtype, result):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 24, dtype=dtype).requires_grad_(), torch.randn(24).requires_grad_()
    gradient = torch.randn(3, 5, 24, dtype=result)
    y = apex.rms_norm(x, weight, 1e-6, result)
    gradients = torch.autograd.grad(y, (x, weight), gradient)
    exact = F.rms_norm(x.double(), (24,), eps=1e-6) * weight.double()
    exact_gradients = torch.autograd.grad(exact, (x, weight), gradient.double())
    assert y.dtype == result
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
    for value, expected in zip((y, *gradients), (exact, *exact_gradients), strict=True):
        bound = max(tolerance[dtype], tolerance[value.dtype], tolerance[result] if value is y else 0)
        torch.testing.assert_close(value.double(), expected.double(), rtol=bound, atol=bound)


# Weight gradients

MODEL = ModelConfig(
    encoder_num_layers=2, decoder_num_layers=2, hidden_size=32, num_attention_heads=2, kv_channels=16,
    ffn_hidden_size=64, vocab_size=64, make_vocab_size_divisible_by=1,
)  # fmt: skip


def gradients(fused, compute, context=None, parallel=None, data_parallel=False):
    """This rank's gradients of 3 microbatches, of which data-parallel ranks share the rows."""
    with torch.device("meta"):
        model = T5Model(MODEL, compute, z_loss_weight=1e-4, tensor_parallel=parallel)
    if context is not None:
        shard_t5(model, context)
    replicas = DataParallel(model, context, compute, model.blocks, "no_shard") if data_parallel else None
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=3)
    places = set()  # of the gradients of the blocks' linear layers after each microbatch
    layers = [each for each in itertools.chain(*(b.modules() for b in model.blocks)) if isinstance(each, Linear)]
    if fused:
        for layer in layers:
            layer.product = gradient_accumulation.accumulating_linear(partial(getattr, layer, "weight"))
    words = torch.randint(1, 64, (6, 21), generator=torch.Generator().manual_seed(5))
    for number, part in enumerate(words.split(2)):
        if replicas is not None:
            part = part[context.dp_rank :: context.dp_size]
            replicas.set_gradient_sync(number == 2)
        model(part[:, :11], part[:, 11:20], part[:, 12:]).loss.total.sum().backward()
        places |= {(index, local_tensor(each.weight.grad).data_ptr()) for index, each in enumerate(layers)}
    if replicas is not None:
        replicas.reduce_gradients()
    if fused and context is None:
        assert len(places) == len(layers)  # no copies
    return {name: local_tensor(p.grad) for name, p in model.named_parameters()}


def assert_same(values, expected, tolerance):
    for name, value in expected.items():
        assert values[name].dtype == torch.float32
        assert ((values[name] - value).norm() / value.norm()).item() < tolerance, name


@pytest.fixture(params=["apex", "torch"])
def kernel(request, monkeypatch):
    """Which product it is; torch's exists for GPUs only."""
    if request.param == "apex":
        apex_double.install(monkeypatch.setitem, monkeypatch.setattr)
        yield
        return
    library = torch.library.Library("aten", "IMPL")

    def mm(left, right, out_dtype):
        return left.to(out_dtype) @ right.to(out_dtype)

    def addmm_out(total, left, right, out_dtype, *, beta=1, alpha=1, out):
        assert out.data_ptr() == total.data_ptr() and beta == alpha == 1
        return out.add_(mm(left, right, out_dtype))

    library.impl("mm.dtype", mm, "CPU")
    library.impl("addmm.dtype_out", addmm_out, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("granularity", [None, "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_accumulated_weight_gradients(bf16, granularity):
    compute = ComputeConfig(bf16=bf16, recompute_granularity=granularity)
    assert_same(gradients(True, compute), gradients(False, compute), 1e-2 if bf16 else 1e-5)


def layout(rank, tensor_ranks, bf16):
    apex_double.install()
    config, compute = ParallelConfig(tensor_model_parallel_size=tensor_ranks), ComputeConfig(bf16=bf16)
    context = ParallelContext.create(config, torch.device("cpu"))
    arguments = compute, context, TensorParallel.of(context, config), tensor_ranks == 1
    assert_same(gradients(True, *arguments), gradients(False, *arguments), 1e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_accumulated_weight_gradients_on_two_ranks(tensor_ranks):
    """Replicas sum them while the backward pass goes on; parts of a divided weight are DTensors."""
    run_distributed(layout, 2, tensor_ranks, False)


@pytest.mark.parametrize(
    ("options", "gathers", "message"),
    [
        ({"compile": True}, False, "does not go with --compile"),
        ({"fp8_format": "hybrid", "bf16": True}, False, "does not go with --fp8-format"),
        ({"cuda_graphs": True}, False, "does not go with --cuda-graphs"),
        ({}, True, "does not go with --data-parallel-sharding-strategy other than no_shard"),
        ({}, False, "needs a GPU, and this run is on cpu; remove it"),
    ],
)
def test_refusals_of_accumulation(options, gathers, message):
    with pytest.raises(UserError, match=f"--gradient-accumulation-fusion {message}"):
        gradient_accumulation.check(ComputeConfig(**options), torch.device("cpu"), gathers)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (apex.check_adam, "--optimizer-backend apex needs NVIDIA's apex, of which amp_C is not installed; use"),
        (apex.check_norm, "--norm-backend apex needs NVIDIA's apex, of which fused_layer_norm_cuda is not installed"),
    ],
)
def test_without_apex(monkeypatch, check, message):
    monkeypatch.setattr(apex, "installed", lambda package: package == "apex")
    with pytest.raises(UserError, match=message) as raised:
        check(torch.device("cuda"))
    assert "APEX_CUDA_EXT=1" in str(raised.value) and "\n" not in str(raised.value)
