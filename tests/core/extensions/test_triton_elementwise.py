"""Triton's kernels for norms, activations and the loss, in its interpreter."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron.core.compilation import compile_layers
from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.extensions import cpu_elementwise, elementwise, packages, torch_elementwise
from megatron.core.extensions import triton_elementwise as ours
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import initialize_parameters
from megatron.core.transformer.norm import build_norm
from tests.elementwise import (
    check_add_norm,
    check_compiled,
    check_gated,
    check_loss,
    check_norm,
    check_one_gradient_alone,
    check_recomputation,
    check_strides,
    draw,
)

pytest.importorskip("triton")
interpreted = pytest.mark.skipif("cpu" not in ours.DEVICES, reason="Triton's interpreter is off, as there is a GPU")

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT, BRAIN, HALF)
OPERATORS = torch.ops.megatron_t5
TRITON = ComputeConfig(norm_backend="triton", activation_backend="triton", cross_entropy_backend="triton")
TORCH = ComputeConfig(norm_backend="torch", activation_backend="torch", cross_entropy_backend="torch")
MODEL = ModelConfig(
    encoder_num_layers=1, decoder_num_layers=1, hidden_size=24, num_attention_heads=2, kv_channels=8,
    ffn_hidden_size=40, vocab_size=130,
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gated-gelu", "gated-silu"])
@pytest.mark.parametrize("shape", [(3, 5, 2 * 37), (2,), (1, 0), (0, 6), (3, 2 * 1000)])
def test_gated_activation(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    check_gated(ours, kind, dtype, shape, "cpu")


@interpreted
@pytest.mark.parametrize("kind", ["gated-gelu", "gated-silu"])
def test_gated_activation_at_the_ends(kind: str) -> None:
    gates = [0.0, 1e-30, 12.0, 100.0, 1e30, torch.inf, -12.0, -100.0, -1e30, -torch.inf, torch.nan]
    x = torch.tensor([part for gate in gates for part in (gate, 1.5)], requires_grad=True)
    results = []
    for module in (ours, cpu_elementwise):
        y = module.gated_activation(x, kind)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@interpreted
def test_gated_activation_of_many_units() -> None:
    """The first program of those for 2**30 units: gate and up are then 2**31 numbers."""
    kernels, options = ours._kernels(), {"GELU": False, "BLOCK": ours.UNITS_BLOCK}
    units, many = ours.UNITS_BLOCK, 2**30
    x = draw(2 * units).requires_grad_()
    expected = cpu_elementwise.gated_activation(x, "gated-silu")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    y, gradient = torch.full((units,), torch.nan), torch.full((2 * units,), torch.nan)
    kernels.gated[(1,)](x.detach(), y, many, **options)
    kernels.gated_gradient[(1,)](torch.ones(units), x.detach(), gradient, many, **options)
    torch.testing.assert_close((y, gradient), (expected.detach(), expected_gradient), rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize(("dtype", "output"), [(dtype, dtype) for dtype in DTYPES] + [(FLOAT, HALF), (FLOAT, BRAIN)])
@pytest.mark.parametrize("shape", [(5, 1), (2, 3, 5), (3, 1000), (0, 6)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, output: torch.dtype) -> None:
    check_norm(ours, shape, dtype, output, "cpu", epsilon=1e-3)


@interpreted
@pytest.mark.parametrize("width", [768, 9000])
def test_rms_norm_of_wide_rows(width: int) -> None:
    check_norm(ours, (6, width), FLOAT, BRAIN, "cpu", epsilon=1e-6)


@interpreted
def test_the_norm_rounds_as_torch_s_operations() -> None:
    """The weight multiplies in the input's precision. (In fp16: the interpreter does not round bf16 to nearest.)"""
    x, weight = draw(20, 768, dtype=HALF), draw(768, seed=1)
    found, expected = (module.rms_norm(x, weight, 1e-6, HALF) for module in (ours, torch_elementwise))
    assert (found == expected).float().mean() > 0.99


@interpreted
@pytest.mark.parametrize(("dtype", "output"), [(FLOAT, FLOAT), (BRAIN, BRAIN), (FLOAT, HALF)])
@pytest.mark.parametrize("width", [1, 70, 768])
def test_sum_and_norm(width: int, dtype: torch.dtype, output: torch.dtype) -> None:
    torch.manual_seed(0)
    check_add_norm(ours, width, dtype, output, "cpu")


@interpreted
def test_sum_and_norm_of_rows_that_registers_do_not_hold() -> None:
    torch.manual_seed(0)
    check_add_norm(ours, 9000, BRAIN, BRAIN, "cpu")


@interpreted
def test_one_gradient_alone() -> None:
    check_one_gradient_alone(ours)


@interpreted
def test_dropout_of_an_element_does_not_depend_on_another() -> None:
    torch.manual_seed(1)
    zeros, ones, weight = torch.zeros(64, 1026), torch.ones(64, 1026), torch.ones(1026)
    first, second = ((ours.add_rms_norm(zeros, ones, weight, 1e-6, p=0.5)[0] == 0).float() * 2 - 1 for _ in range(2))
    bound = 5 / first.numel() ** 0.5
    assert first.mean().abs() < bound and (first * second).mean().abs() < bound
    for rows, columns in [(0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (0, 4), (2, 0), (0, 128), (32, 64)]:
        assert (first * first.roll((rows, columns), (0, 1))).mean().abs() < bound, (rows, columns)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ours.add_rms_norm(zeros, ones, weight, 1e-6)
    assert torch.equal(torch.get_rng_state(), state)


@interpreted
def test_operands_may_have_any_strides() -> None:
    check_strides(ours)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", [1, 100, 4096, 5003])
def test_statistics_and_gradient_of_logits(words: int, dtype: torch.dtype) -> None:
    check_loss(ours, words, dtype, "cpu")


@interpreted
@pytest.mark.filterwarnings("ignore:divide by zero")  # a logarithm of 0 is -inf
def test_logits_that_are_not_finite() -> None:
    logits = torch.full((3, 5000), -torch.inf)
    logits[1, 4999], logits[2, 3] = 2.0, torch.nan
    log_z, label_logit = torch.empty(3), torch.empty(3)
    ours.softmax_statistics(logits, torch.tensor([0, 4999, 0]), log_z, label_logit)
    assert log_z[0] == -torch.inf and log_z[1] == 2.0 and log_z[2].isnan()
    assert label_logit[0] == -torch.inf and label_logit[1] == 2.0


def block(residual: Tensor, branch: Tensor, weight: Tensor, wide: Tensor, narrow: Tensor, p: float) -> Tensor:
    """All operators with a gradient, as a layer uses them."""
    total, normed = ours.add_rms_norm(residual, branch, weight, 1e-6, BRAIN, p)
    inner = ours.gated_activation(normed @ wide, "gated-gelu")
    same, normed = ours.rms_norm_beside(total + (inner @ narrow).float(), weight, 1e-6)
    return same + ours.rms_norm(normed, weight, 1e-6)


@interpreted
def test_recomputation_gives_equal_bits() -> None:
    check_recomputation(block)


@interpreted
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_compiled_graph_holds_the_operators(p: float) -> None:
    check_compiled(block, p, "aot_eager")


@interpreted
def test_operators_pass_torch_s_checks() -> None:
    x, seed = draw(3, 8), torch.tensor(7)
    norm = (x, torch.ones(8), 1e-6)
    labels, row = torch.tensor([0, 7, -1]), torch.ones(3)
    for operator, arguments in [
        (OPERATORS.triton_gated, (x, "gelu")),
        (OPERATORS.triton_gated_gradient, (draw(3, 4), x, "silu")),
        (OPERATORS.triton_rms_norm, (*norm, HALF)),
        (OPERATORS.triton_add_rms_norm, (x, *norm, HALF, 0.5, seed)),
        (OPERATORS.triton_rms_norm_gradient, (None, x.half(), *norm, 0.0, None)),
        (OPERATORS.triton_rms_norm_gradient, (x, x + 1, *norm, 0.5, seed)),
        (OPERATORS.triton_softmax_statistics, (x.clone(), labels, row.clone(), row.clone())),
        (OPERATORS.triton_logits_gradient_, (x.clone(), labels, row, row, row)),
    ]:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def model_results(compute: ComputeConfig, backend: str | None = None, **sizes: float) -> dict[str, Tensor]:
    """Loss and gradients of a small model."""
    model = T5Model(dataclasses.replace(MODEL, **sizes), compute, z_loss_weight=1e-2)
    initialize_parameters(model, seed=1)
    if backend is not None:
        compile_layers(list(model.blocks)[:1], backend)
    generator = torch.Generator().manual_seed(2)
    encoder, labels = (torch.randint(3, 130, (2, length), generator=generator) for length in (6, 4))
    labels[0, -2:] = -100
    torch.manual_seed(3)
    loss = model(encoder, labels.clamp(min=0).roll(1, 1), labels).loss.total[0]
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()}


def record(patch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched from now on."""
    launched: list[str] = []
    launch = ours._launch

    def recorded(kernel: object, *arguments: object, **options: object) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    patch.setattr(ours, "_launch", recorded)
    return launched


@interpreted
@pytest.mark.parametrize(
    ("precision", "activation"),
    [({}, "gated-gelu"), ({"bf16": True}, "gated-silu"), ({"fp16": True}, "gated-gelu")],
)
def test_a_model_computes_what_torch_computes(
    precision: dict[str, bool], activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model_results(dataclasses.replace(TORCH, **precision), activation_function=activation)
    launched = record(monkeypatch)
    found = model_results(dataclasses.replace(TRITON, **precision), activation_function=activation)
    # Two norms of the encoder layer, three of the decoder layer, and the last ones of both stacks.
    assert launched.count("rms_norm") == launched.count("rms_norm_gradient") == 7
    assert launched.count("gated") == launched.count("gated_gradient") == 2
    assert launched.count("softmax_statistics") == launched.count("logits_gradient") == 1
    bound = 6e-2 if precision.get("bf16") else 1e-2 if precision else 1e-5
    for name, value in expected.items():
        assert (found[name] - value).norm() <= bound * value.norm() + 1e-7, name


@interpreted
def test_a_compiled_layer_takes_the_named_kernels() -> None:
    torch.compiler.reset()
    expected = model_results(TORCH)
    found = model_results(dataclasses.replace(TRITON, compile=True), backend="aot_eager")
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name


@interpreted
def test_recomputation_of_a_model_drops_the_same() -> None:
    dropping = {"hidden_dropout": 0.3}
    expected = model_results(TRITON, **dropping)
    found = model_results(dataclasses.replace(TRITON, recompute_granularity="full"), **dropping)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_auto_is_the_kernels_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    single, half = torch.ones(2), torch.ones(2, dtype=HALF)
    chosen = elementwise.choose_norm(ComputeConfig())
    assert chosen.module(single) is cpu_elementwise and chosen.module(half) is torch_elementwise
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(elementwise, "installed", lambda package: True)
    for compute, norm_kernels in ((ComputeConfig(), 2), (ComputeConfig(compile=True), 1)):
        assert len(elementwise.choose_norm(compute).kernels) == norm_kernels
        assert len(elementwise.choose_activation(compute).kernels) == norm_kernels
    assert elementwise.choose_cross_entropy("auto").kernels == (cpu_elementwise, ours)
    monkeypatch.setattr(elementwise, "installed", lambda package: False)
    assert elementwise.choose_cross_entropy("auto").kernels == (cpu_elementwise,)


@pytest.mark.parametrize(
    ("flags", "dtype", "message"),
    [
        ({"norm_backend": "cpu"}, HALF, "--norm-backend cpu does not compute in float32 and float16 on cpu"),
        ({"activation_backend": "cpu"}, HALF, "--activation-backend cpu does not compute in float16 on cpu"),
        ({"activation_backend": "triton"}, FLOAT, "--activation-backend triton does not compute in float32 on cpu"),
        ({"cross_entropy_backend": "triton"}, FLOAT, "use --cross-entropy-backend auto"),
        ({"norm_backend": "apex"}, FLOAT, "--norm-backend apex needs a GPU"),
        ({"norm_backend": "transformer_engine"}, FLOAT, "--norm-backend transformer_engine needs a GPU"),
    ],
)
def test_what_cannot_compute_here_is_refused(
    flags: dict[str, str], dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "DEVICES", ("cuda",))
    with pytest.raises(UserError) as error:
        elementwise.check_elementwise(ComputeConfig(**flags), torch.device("cpu"), dtype)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda package: False)
    with pytest.raises(UserError, match="--norm-backend triton needs the package triton, which is not installed"):
        elementwise.check_elementwise(TRITON, torch.device("cpu"), FLOAT)


@pytest.mark.parametrize("backend", ["cpu", "triton", "apex"])
def test_layer_norm_is_refused_by_what_computes_none(backend: str) -> None:
    config = dataclasses.replace(MODEL, normalization="LayerNorm")
    with pytest.raises(UserError, match=f"--norm-backend {backend} computes RMSNorm, not --normalization LayerNorm"):
        build_norm(config, ComputeConfig(norm_backend=backend))
