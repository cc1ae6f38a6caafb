"""One cast of fp32 weights a step and fp32 weight gradients, on CPUs in place of GPUs: what autograd alone computes."""

import shlex
from functools import partial

import pytest
import torch
from torch import nn

from megatron.core.compilation import compile_layers
from megatron.core.datasets.loader import TensorBatch
from megatron.core.extensions import apex, gpu_linear, gradient_accumulation
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor
from megatron.core.tensor_parallel import Linear
from megatron.training import model_setup
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain_in
from tests import apex_double
from tests.distributed import run_distributed
from tests.training.test_pretrain import TINY, rows

CPU = torch.device("cpu")
MODEL = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 32 --num-attention-heads 4 --kv-channels 8 "
    "--ffn-hidden-size 64 --vocab-size 96 --micro-batch-size 2 --data-parallel-sharding-strategy no_shard"
)
MICROBATCHES = 3
TOLERANCE = 0.01  # of a gradient that is rounded to bf16 once more


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    use(True, monkeypatch)


def use(copies: bool, patch: pytest.MonkeyPatch) -> None:
    """Let layers on CPUs have 16-bit copies of their weights, or not."""
    patch.setattr(gpu_linear, "DEVICES", ("cuda", "cpu") if copies else ("cuda",))


def build(flags: str, copies: bool) -> model_setup.DistributedModel:
    config = parse_args([*MODEL, *flags.split()]).config
    context = ParallelContext.create(config.parallel, CPU)
    plan = model_setup.plan_stages(config, context, 21, 9, MICROBATCHES)
    with pytest.MonkeyPatch.context() as patch:
        use(copies, patch)
        patch.setattr(model_setup, "compile_layers", partial(compile_layers, backend="aot_eager"))
        return model_setup.DistributedModel(config, context, plan, MICROBATCHES)


def casts(model: model_setup.DistributedModel) -> list[torch.Tensor | None]:
    return [each.cast for stage in model.stages for each in stage.modules() if isinstance(each, Linear)]


def batch_of(model: model_setup.DistributedModel) -> TensorBatch:
    generator = torch.Generator().manual_seed(model.context.dp_rank)
    lengths = (21, 9, 9)
    return TensorBatch(*(torch.randint(3, 96, (2 * MICROBATCHES, n), generator=generator) for n in lengths))


def gradients(model: model_setup.DistributedModel) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of this rank."""
    batch = batch_of(model)
    model.seed_dropout(0)
    sums = model.forward_backward(batch, torch.tensor(1.0 / batch.labels.numel()))
    model.finish_gradients()
    found = {p.name: local_tensor(p.parameter.grad).clone() for p in model.parameters}
    for p in model.parameters:
        p.parameter.grad = None
    return float(sums.sum()), found


def evaluate(model: model_setup.DistributedModel) -> torch.Tensor | None:
    """Losses of the tokens, on the rank that has them."""
    model.train_mode(False)
    losses = model.token_losses(batch_of(model))
    model.train_mode(True)
    return losses


def compare(flags: str) -> None:
    """Two steps, between which the weights change: forward passes have the same bits, gradients all but."""
    models = [build(flags, copies) for copies in (False, True)]
    assert not any(cast is not None for cast in casts(models[0]))
    assert casts(models[1]) and all(cast is not None for cast in casts(models[1]))
    assert [p.name for p in models[0].parameters] == [p.name for p in models[1].parameters]
    for stages in zip(*(model.stages for model in models), strict=True):
        assert stages[0].state_dict().keys() == stages[1].state_dict().keys()
    for _ in range(2):
        (loss, expected), (other_loss, found) = map(gradients, models)
        assert other_loss == loss
        for name, gradient in expected.items():
            assert found[name].dtype == torch.float32
            assert (found[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name
        with torch.no_grad():
            for model in models:
                for p in model.parameters:
                    local_tensor(p.parameter.detach()).sub_(0.1 * expected[p.name])
        validation, other = map(evaluate, models)
        assert (validation is None and other is None) or torch.equal(validation, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_product(dtype: torch.dtype, with_bias: bool) -> None:
    """The weight's gradient is exact but for fp32; the others are those of autograd."""
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(24, 40)), torch.randn(3, 50, 40, dtype=dtype).requires_grad_()
    bias = torch.randn(24, dtype=dtype).requires_grad_() if with_bias else None
    gradient = torch.randn(3, 50, 24, dtype=dtype)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    plain = nn.functional.linear(x, weight.to(dtype), bias)
    ours = gpu_linear.linear(x, weight, bias, weight.detach().to(dtype))
    assert torch.equal(ours, plain)
    expected, found = (torch.autograd.grad(y, inputs, gradient) for y in (plain, ours))
    exact = gradient.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()
    torch.testing.assert_close(found[1], exact.float(), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(found[:1] + found[2:], expected[:1] + expected[2:], strict=True))
    torch.library.opcheck(torch.ops.megatron_t5.float_weight_gradient.default, (gradient, x.detach()))


def test_autograd_takes_the_gradient_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def weight_gradient(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        result = torch.ops.megatron_t5.float_weight_gradient(gradient, x)
        made.append(result.data_ptr())
        return result

    monkeypatch.setattr(gpu_linear, "weight_gradient", weight_gradient)
    weight, x = nn.Parameter(torch.randn(24, 40)), torch.randn(5, 40, dtype=torch.bfloat16)
    for _ in range(2):  # the second is added to the first
        gpu_linear.linear(x, weight, None, weight.detach().bfloat16()).sum().backward()
        assert weight.grad is not None and weight.grad.data_ptr() == made[0]


@pytest.mark.parametrize(
    "flags",
    [
        "--bf16",
        "--fp16 --add-bias-linear --hidden-dropout 0.1",
        "--bf16 --recompute-granularity full",
        "--bf16 --recompute-granularity selective --attention-backend unfused",
    ],
)
def test_steps(flags: str) -> None:
    compare(flags)


def compare_all(rank: int, flags: list[str]) -> None:
    for each in flags:
        compare(each)


def test_layouts() -> None:
    """Tensor parallelism, replicas, and pipelines whose backward passes are whole and split."""
    pipeline = "--bf16 --pipeline-model-parallel-size 2 --pipeline-schedule"
    tensor = "--bf16 --tensor-model-parallel-size 2"
    flags = [tensor, f"{tensor} --sequence-parallel --add-bias-linear", "--bf16", f"{pipeline} 1f1b", f"{pipeline} zbv"]
    run_distributed(compare_all, 2, flags)


def count_casts(rank: int, flags: str) -> int:
    return sum(cast is not None for cast in casts(build(flags, True)))


def test_none_where_weights_are_gathered_or_fp32() -> None:
    assert run_distributed(count_casts, 2, "--bf16 --data-parallel-sharding-strategy optim_grads") == [0, 0]
    assert not any(cast is not None for cast in casts(build("", True)))


@pytest.mark.parametrize(
    "flags", ["--bf16", pytest.param("--bf16 --recompute-granularity full", marks=pytest.mark.slow)]
)
def test_compiled(flags: str) -> None:
    """Two classes of layers, in training and in evaluation: four graphs, as each layer gives its copy to the code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = build(flags, True), build(f"{flags} --compile", True)
    (loss, expected), (other_loss, found) = map(gradients, (eager, compiled))
    assert other_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name
    torch.testing.assert_close(evaluate(compiled), evaluate(eager), rtol=0.02, atol=0.02)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def test_gradient_accumulation_takes_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    apex_double.install(monkeypatch.setitem, monkeypatch.setattr)
    monkeypatch.setattr(apex, "DEVICES", ("cpu",))
    monkeypatch.setattr(gradient_accumulation, "check", lambda *_: None)
    fused = build("--bf16 --gradient-accumulation-fusion", True)
    assert all(cast is not None for cast in casts(fused))
    (loss, expected), (other_loss, found) = map(gradients, (build("--bf16", True), fused))
    assert other_loss == loss
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_bit_for_bit(byte_dataset, tmp_path) -> None:
    """A run in two parts has the losses of one in a piece, evaluations too; and nearly those without copies."""
    common = [*TINY, "--data-path", str(byte_dataset), "--bf16", "--micro-batch-size", "2", "--global-batch-size", "4"]
    common += ["--eval-interval", "2", "--eval-iters", "1", "--lr-decay-iters", "4"]

    def run(name: str, iterations: int, *flags: str) -> None:
        metrics = ["--metrics-file", str(tmp_path / name), "--train-iters", str(iterations)]
        assert pretrain_in(ParallelContext(CPU), parse_args([*common, *metrics, *flags]).config) == 0

    save = ["--save", str(tmp_path / "save"), "--save-interval", "2"]
    run("whole", 4)
    run("parts", 2, *save)
    run("parts", 4, *save)
    with pytest.MonkeyPatch.context() as patch:
        use(False, patch)
        run("plain", 4)
    for key in ("lm_loss", "grad_norm", "validation_lm_loss"):
        whole, parts, plain = (rows(tmp_path / name, key) for name in ("whole", "parts", "plain"))
        assert parts == whole
        assert whole == pytest.approx(plain, rel=0.02)
