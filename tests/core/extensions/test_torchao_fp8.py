"""FP8 products by torchao, emulated on the CPU, against fp32 and bf16; and which runs FP8 is refused for."""

import itertools
import sys
from functools import partial

import pytest
import torch

from megatron.core.compilation import compile_layers
from megatron.core.config import ComputeConfig, ModelConfig, ParallelConfig
from megatron.core.distributed import DataParallel
from megatron.core.errors import UserError
from megatron.core.extensions import fp8, packages, torchao_fp8
from megatron.core.extensions.fp8 import check_fp8
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_sharding import shard_t5
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import initialize_parameters, local_tensor
from megatron.core.tensor_parallel import TensorParallel
from megatron.core.tensor_parallel.layers import Linear
from megatron.training import linear_products, model_setup
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain_in
from tests.distributed import run_distributed
from tests.training.test_pretrain import TINY, rows

needs_torchao = pytest.mark.skipif(not packages.installed("torchao"), reason="torchao is not installed")
SIZES = {"num_attention_heads": 2, "kv_channels": 16, "vocab_size": 64, "make_vocab_size_divisible_by": 1}
MODEL = ModelConfig(encoder_num_layers=2, decoder_num_layers=2, hidden_size=32, ffn_hidden_size=64, **SIZES)


def compute_config(**options):
    return ComputeConfig(**{"bf16": True, "fp8_format": "hybrid", **options})


def error(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


@needs_torchao
@pytest.mark.parametrize("wgrad", [True, False])
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
def test_a_product_and_its_gradients(fp8_format, wgrad):
    """3 x 37 rows, which is not a multiple of 16."""
    torch.manual_seed(0)
    x = torch.randn(3, 37, 64).bfloat16().requires_grad_()
    weight, bias = torch.randn(48, 64).requires_grad_(), torch.randn(48).bfloat16().requires_grad_()
    gradient = torch.randn(3, 37, 48).bfloat16()
    product = torchao_fp8.product(compute_config(fp8_format=fp8_format, fp8_wgrad=wgrad), emulate=True)
    result = product(x, weight, bias)
    result.backward(gradient)
    exact = x.double() @ weight.double().T + bias.double()
    rows = gradient.flatten(0, 1)
    assert result.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert error(result, exact) < 0.05
    least = 0.03 if fp8_format == "e4m3" else 0.04  # E5M2 has a bit less
    assert least < error(x.grad, gradient.double() @ weight.double()) < 2 * least
    weight_error = error(weight.grad, rows.double().T @ x.flatten(0, 1).double())
    assert least < weight_error < 2 * least if wgrad else weight_error < 0.005
    assert error(bias.grad, rows.double().sum(0)) < 0.005


def build(compute, context=None, parallel=None, strategy=None):
    """A small model with FP8 products in its blocks, and its data-parallel half."""
    with torch.device("meta"):
        model = T5Model(MODEL, compute, z_loss_weight=1e-4, tensor_parallel=parallel)
    if context is not None:
        shard_t5(model, context)
    if compute.fp8_format is not None:
        product = torchao_fp8.product(compute, emulate=True)
        for module in itertools.chain.from_iterable(block.modules() for block in model.blocks):
            if isinstance(module, Linear):
                module.product = product
    if compute.compile:
        compile_layers(model.blocks, backend="aot_eager")
    data_parallel = None if strategy is None else DataParallel(model, context, compute, model.blocks, strategy)
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=3)
    return model, data_parallel


def losses(model, data_parallel=None, steps=8, rank=0, ranks=1):
    """Training losses of always the same rows, with torch's Adam, and the gradients of the first step."""
    words = torch.randint(1, 64, (4, 21), generator=torch.Generator().manual_seed(5))[rank::ranks]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    values, first = [], {}
    for _ in range(steps):
        total = model(words[:, :11], words[:, 11:20], words[:, 12:]).loss.total.sum() / (4 * 9)
        total.backward()
        if data_parallel is not None:
            data_parallel.reduce_gradients()
        if not first:
            first = {name: local_tensor(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        values.append(total.item())
    return values, first


@needs_torchao
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
def test_a_model_learns_as_in_bf16(fp8_format):
    plain, plain_gradients = losses(build(ComputeConfig(bf16=True))[0])
    values, gradients = losses(build(compute_config(fp8_format=fp8_format))[0])
    assert values != plain and values[-1] < 0.85 * values[0]
    assert values == pytest.approx(plain, rel=0.03)
    worst = max(error(gradients[name], plain_gradients[name]) for name in gradients)
    assert 0.02 < worst < 0.35


@needs_torchao
def test_recomputed_and_compiled():
    """Recomputation changes nothing; the compiler takes the layers whole, and changes roundings at most."""
    values, gradients = losses(build(compute_config())[0], steps=2)
    recomputed, recomputed_gradients = losses(build(compute_config(recompute_granularity="full"))[0], steps=2)
    assert recomputed == values
    assert all(torch.equal(gradients[name], recomputed_gradients[name]) for name in gradients)
    compiled, _ = losses(build(compute_config(compile=True))[0], steps=2)
    assert compiled == pytest.approx(values, rel=2e-3)


def divided(rank, sequence_parallel):
    """Losses on two tensor-parallel ranks."""
    layout = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    context = ParallelContext.create(layout, torch.device("cpu"))
    return losses(build(compute_config(), context, TensorParallel.of(context, layout))[0])[0]


def sharded(rank, strategy):
    """Losses summed over two data-parallel ranks."""
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    values, _ = losses(*build(compute_config(), context, None, strategy), rank=rank, ranks=2)
    total = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return total.tolist()


@needs_torchao
@pytest.mark.parametrize(
    ("layout", "option"),
    [(divided, False), (divided, True), (sharded, "no_shard"), (sharded, "optim_grads_params")],
)
def test_layouts(layout, option):
    """Scales are those of what each rank has, so that rounding differs, and nothing else."""
    alone, _ = losses(build(compute_config())[0])
    for values in run_distributed(layout, 2, option):
        assert values == pytest.approx(alone, rel=0.03)


@needs_torchao
def test_a_run(byte_dataset, tmp_path, monkeypatch):
    """By flags: the first and last layer of each stack stay in bf16, and so does all that is no block."""
    taking_part = []

    def install(stages, config, context):
        linear_products.install_products(stages, config, context)
        modules = stages[0].named_modules()
        taking_part[:] = [name for name, each in modules if isinstance(each, Linear) and each.product is not None]

    monkeypatch.setattr(model_setup, "install_products", install)
    monkeypatch.setattr(fp8, "_check_device", lambda compute, device: None)
    monkeypatch.setattr(torchao_fp8, "product", partial(torchao_fp8.product, emulate=True))
    sizes = ["--encoder-num-layers", "3", "--kv-channels", "16", "--ffn-hidden-size", "32"]
    found = []
    for flags in ([], ["--fp8-format", "hybrid", "--first-last-layers-bf16"]):
        metrics = tmp_path / f"{len(found)}.jsonl"
        arguments = [*TINY, *sizes, "--data-path", str(byte_dataset), "--train-iters", "4", "--eval-iters", "0"]
        config = parse_args([*arguments, "--bf16", "--metrics-file", str(metrics), *flags]).config
        assert pretrain_in(ParallelContext(CPU), config) == 0
        found.append(rows(metrics))
    assert {name.rsplit(".", 2)[0] for name in taking_part} == {"encoder.layers.1"}
    assert found[1] != found[0] and found[1] == pytest.approx(found[0], rel=0.03)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "model", "ranks", "message"),
    [
        ({"bf16": False}, {}, 1, "--fp8-format hybrid needs --bf16"),
        ({"fp8_recipe": "mxfp8"}, {}, 1, "--fp8-recipe mxfp8 needs --transformer-impl transformer_engine"),
        ({"fp8_margin": 1}, {}, 1, "--fp8-margin needs --fp8-recipe delayed"),
        ({"fp8_format": None, "fp8_amax_history_len": 16}, {}, 1, "--fp8-amax-history-len needs --fp8-format"),
        ({"fp8_format": None, "fp8_recipe": "delayed"}, {}, 1, "--fp8-recipe needs --fp8-format"),
        ({"fp8_format": None, "fp8_wgrad": False}, {}, 1, "--no-fp8-wgrad needs --fp8-format"),
        ({"fp8_format": None, "first_last_layers_bf16": True}, {}, 1, "--first-last-layers-bf16 needs --fp8-format"),
        ({}, {"hidden_size": 40}, 1, "--hidden-size 40 is not a multiple of 16"),
        ({}, {"kv_channels": 12}, 1, "--num-attention-heads 2 x --kv-channels 12 is not a multiple of 16"),
        ({}, {}, 4, "--num-attention-heads 2 x --kv-channels 16 over --tensor-model-parallel-size 4, 8 a rank, is not"),
        ({}, {"ffn_hidden_size": 100}, 2, "--ffn-hidden-size 100 over --tensor-model-parallel-size 2, 50 a rank, is"),
        ({}, {}, 1, "needs a GPU of compute capability 8.9 or higher, and this run is on cpu"),
    ],
)
def test_refusals(options, model, ranks, message):
    sizes = {"encoder_num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, **SIZES, **model}
    with pytest.raises(UserError, match=message) as raised:
        check_fp8(compute_config(**options), ModelConfig(**sizes), ranks, CPU)
    assert "\n" not in str(raised.value)


@needs_torchao
def test_another_release_of_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8.float8_training_tensor", None)
    with pytest.raises(UserError, match=r"--fp8-format hybrid needs a release of torchao such as 0\.18 \(import of"):
        torchao_fp8.check(compute_config())


def test_gpus_without_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8\.9 or higher, and this one has 8\.0"):
        check_fp8(compute_config(), MODEL, 1, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_fp8(compute_config(), MODEL, 1, torch.device("cuda"))


def test_without_torchao(monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda package: False)
    with pytest.raises(UserError, match="--fp8-format hybrid needs the package torchao, which is not installed"):
        torchao_fp8.check(compute_config())
