"""The adapter to Transformer Engine: against the real package's sources, and against a double that computes on CPUs."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.config import ComputeConfig, ModelConfig, ParallelConfig
from megatron.core.errors import UserError
from megatron.core.extensions import fp8, packages, transformer_engine
from megatron.core.extensions.attention import AttentionOptions, AttentionRequest, choose_attention
from megatron.core.extensions.score_bias import ScoreBias, Segments
from megatron.core.extensions.unfused_attention import BACKEND as UNFUSED
from tests import transformer_engine_double as double
from tests.transformer_engine_double import Format

CPU = torch.device("cpu")


@pytest.fixture
def calls() -> Iterator[list[tuple[str, Any]]]:
    """The double in place of the package; what it was called for."""
    with double.on_cpu() as calls:
        yield calls


def compute(**options: Any) -> ComputeConfig:
    """With the package."""
    return ComputeConfig(transformer_impl="transformer_engine", **options)


# The real package's sources, where they are installed; nothing of them is imported.

SOURCES = {
    "Format": "common/recipe/__init__.py",
    "DelayedScaling": "common/recipe/__init__.py",
    "Float8CurrentScaling": "common/recipe/__init__.py",
    "MXFP8BlockScaling": "common/recipe/__init__.py",
    "Float8BlockScaling": "common/recipe/__init__.py",
    "autocast": "pytorch/quantization.py",
    "Linear": "pytorch/module/linear.py",
    "DotProductAttention": "pytorch/attention/dot_product_attention/dot_product_attention.py",
}


@pytest.fixture(scope="module")
def sources() -> Path:
    """Folder of the real package."""
    beside = Path(sys.prefix) / "transformer_engine_sources" / "transformer_engine"  # see tools/environment.sh
    if beside.exists():
        return beside
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("transformer_engine is not installed")
    return Path(spec.submodule_search_locations[0])


def definition(path: Path, name: str) -> ast.ClassDef:
    """The class of this name in a file."""
    nodes = ast.parse(path.read_text()).body
    return next(node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name)


def method(node: ast.ClassDef, name: str) -> dict[str, str | None]:
    """Parameters of a method and their defaults as text."""
    function = next(each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == name)
    names = [argument.arg for argument in function.args.args]
    defaults = [ast.unparse(default) for default in function.args.defaults]
    return dict(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))  # type: ignore[list-item]


def test_the_double_has_the_real_signatures(sources: Path) -> None:
    for name, file in SOURCES.items():
        node, stand_in = definition(sources / file, name), getattr(double, name)
        if name == "Format":
            real = {target.id for each in node.body if isinstance(each, ast.Assign) for target in each.targets}  # type: ignore[attr-defined]
            assert set(stand_in.__members__) <= real
            continue
        methods = ["__init__", "forward"] if issubclass(stand_in, torch.nn.Module) else ["__init__"]
        for each in methods:
            if each == "__init__" and "Scaling" in name:
                real_defaults: dict[str, str | None] = {
                    field.target.id: ast.unparse(field.value)  # type: ignore[attr-defined]
                    for field in node.body
                    if isinstance(field, ast.AnnAssign) and field.value is not None
                }
            else:
                real_defaults = method(node, each)
            parameters = inspect.signature(getattr(stand_in, each)).parameters
            given = {key: value.default for key, value in parameters.items() if key != "self"}
            for key, default in given.items():
                assert key in real_defaults, f"{name}.{each} has no {key}"
                if default is not inspect.Parameter.empty:
                    expected = str(default) if isinstance(default, Format) else repr(default)
                    assert real_defaults[key] == expected, f"{name}.{each}: {key}={real_defaults[key]}"
    linear = list(method(definition(sources / SOURCES["Linear"], "Linear"), "__init__"))
    assert linear[1:3] == ["in_features", "out_features"]
    forward = list(method(definition(sources / SOURCES["DotProductAttention"], "DotProductAttention"), "forward"))
    assert forward[1:4] == ["query_layer", "key_layer", "value_layer"]


def test_the_real_package_exports_the_names(sources: Path) -> None:
    exported = (sources / "pytorch/__init__.py").read_text()
    for name in double.MODULES["transformer_engine.pytorch"]:
        assert f"import {name}\n" in exported, name
    questions = ast.parse((sources / "pytorch/quantization.py").read_text()).body
    asked = {node.name: node.args for node in questions if isinstance(node, ast.FunctionDef)}
    for name in ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available"):
        assert [argument.arg for argument in asked[name].args] == ["return_reason"]
    assert "TE_DType = {" in (sources / "pytorch/constants.py").read_text()
    # Of the compiled functions, how the package itself calls them.
    for file, names in {
        "rmsnorm": ("rmsnorm_fwd", "rmsnorm_bwd"),
        "layer_norm": ("layernorm_fwd", "layernorm_bwd"),
    }.items():
        tree = ast.parse((sources / f"pytorch/ops/basic/{file}.py").read_text())
        found = {
            node.func.id: len(node.args)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords
        }
        for name in names:
            assert found[name] == len(inspect.signature(getattr(double, name)).parameters), name


# Linear layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_that_of_our_own_weight(calls: list[Any], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight, bias = torch.nn.Parameter(torch.randn(6, 5)), torch.nn.Parameter(torch.randn(6))
    x = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    product = transformer_engine.LinearProduct()
    result = product(x, weight, bias.to(dtype))
    expected = F.linear(x, weight.to(dtype), bias.to(dtype))
    torch.testing.assert_close(result, expected)
    weighting = torch.randn_like(result)
    gradients = torch.autograd.grad(result, (x, weight, bias), weighting)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, (x, weight, bias), weighting), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted)
    assert [name for name, _ in calls] == ["linear"]


@pytest.mark.parametrize(("name", "multiple"), [("tensorwise", 16), ("blockwise", 16), ("mxfp8", 32)])
def test_fp8_rows_are_padded_to_what_the_recipe_takes(calls: list[Any], name: str, multiple: int) -> None:
    recipe = transformer_engine.Recipe(compute(bf16=True, fp8_format="hybrid", fp8_recipe=name))
    product = transformer_engine.LinearProduct(recipe, fp8=True)
    torch.manual_seed(2)
    x = torch.randn(3, 7, 32, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(48, 32))
    result = product(x, weight)
    ((_, (shape, used, _)),) = calls
    assert shape == (-(-21 // multiple) * multiple, 32) and used.fp8_format is Format.HYBRID
    assert result.shape == (3, 7, 48)
    error = (result - F.linear(x, weight)).norm() / result.norm()
    assert 1e-3 < error < 0.1
    (gradient,) = torch.autograd.grad(result.square().sum(), weight)
    assert (gradient - 2 * F.linear(x, weight).flatten(0, 1).T @ x.flatten(0, 1)).norm() / gradient.norm() < 0.2


def test_fp8_weights_are_kept_within_a_step(calls: list[Any]) -> None:
    recipe = transformer_engine.Recipe(compute(bf16=True, fp8_format="e4m3"))
    product = transformer_engine.LinearProduct(recipe, fp8=True)
    x, weight = torch.randn(16, 16), torch.nn.Parameter(torch.randn(16, 16))

    def firsts() -> list[bool | None]:
        found = [first for _, (_, _, first) in calls]
        calls.clear()
        return found

    product(x, weight)
    assert firsts() == [None]  # nobody says when a step begins
    for _ in range(2):
        product.begin_step()
        results = [product(x, weight) for _ in range(3)]
        with torch.no_grad():
            results.append(product(x, weight))
        assert firsts() == [True, False, False, None]
        assert all(torch.equal(result, results[0]) for result in results)
        with torch.no_grad():
            weight.mul_(-2)


def test_delayed_scaling_has_a_region_a_pass(calls: list[Any]) -> None:
    recipe = transformer_engine.Recipe(compute(bf16=True, fp8_format="hybrid", fp8_recipe="delayed", fp8_margin=1))
    products = [transformer_engine.LinearProduct(recipe, fp8=in_fp8) for in_fp8 in (True, False, True)]
    weight = torch.nn.Parameter(torch.randn(16, 16))

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for product in products:
                x = product(x, weight)
            return x

    model = Model()
    transformer_engine.PassRegion(recipe).attach(model)
    model(torch.randn(16, 16))
    assert [name for name, _ in calls] == ["linear"] * 3 + ["update"]
    used = [entry[1] for name, entry in calls if name == "linear"]
    assert used[1] is None and used[0] is used[2]
    assert used[0].margin == 1 and not used[0].reduce_amax  # there is no group
    calls.clear()
    with torch.no_grad():
        model(torch.randn(16, 16))
    assert [name for name, _ in calls] == ["linear"] * 3


# Norms


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("dtype", "output"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_norms(calls: list[Any], kind: str, dtype: torch.dtype, output: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 3, 10, dtype=dtype).transpose(0, 1).requires_grad_()
    parameters = [torch.nn.Parameter(torch.randn(10)) for _ in range(1 if kind == "rms" else 2)]
    if kind == "rms":
        result = transformer_engine.rms_norm(x, *parameters, 1e-6, output)
        expected = F.rms_norm(x, (10,), parameters[0], 1e-6).to(output)
    else:
        result = transformer_engine.layer_norm(x, *parameters, 1e-6, output)
        expected = F.layer_norm(x, (10,), *parameters, 1e-6).to(output)
    torch.testing.assert_close(result, expected)
    weighting = torch.randn(10, dtype=output).expand(result.shape)  # not contiguous
    inputs = (x, *parameters)
    expected_gradients = torch.autograd.grad(expected, inputs, weighting)
    for found, wanted in zip(torch.autograd.grad(result, inputs, weighting), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted)


# Attention

OPTIONS = AttentionOptions(0.3, 0.0, False, 0, F.dropout, nullcontext)
SEGMENTS = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2]], dtype=torch.int32)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("bias", "queries"),
    [
        ({}, 6),
        ({}, 4),
        ({"causal": True}, 6),
        ({"diagonals": True}, 6),
        ({"diagonals": True, "causal": True}, 6),
        ({"diagonals": True, "causal": True, "segments": Segments(SEGMENTS, SEGMENTS)}, 6),
        ({"segments": Segments(None, SEGMENTS)}, 4),
    ],
)
def test_attention(calls: list[Any], bias: dict[str, Any], queries: int, recompute: bool) -> None:
    torch.manual_seed(4)
    shapes = ((2, queries, 3, 8), (2, 6, 3, 8), (2, 6, 3, 8))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    if "diagonals" in bias:
        inputs.append(torch.randn(3, queries + 5, requires_grad=True))
        bias = {**bias, "diagonals": inputs[-1]}
    weighting = torch.randn(shapes[0])
    given = ScoreBias(queries, 6, **bias)
    request = AttentionRequest(CPU, torch.float32, 8, has_diagonals=len(inputs) == 4)
    backend = choose_attention("transformer_engine", request)
    results = []
    for each in (backend, UNFUSED):
        prepared = each.prepare(given._replace(backend=each.name), torch.float32, CPU)
        result = each.attend(*inputs[:3], prepared, OPTIONS._replace(recompute=recompute))
        results.append((result, *torch.autograd.grad(result, inputs, weighting)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    kind = "self" if queries == 6 else "cross"
    has_matrix = len(inputs) == 4 or given.segments is not None
    assert set(calls) == {("attention", (kind, given.causal, has_matrix))}


def test_attention_of_fused_projections_and_a_bias_of_the_layers_own(calls: list[Any]) -> None:
    torch.manual_seed(5)
    fused, diagonals = torch.randn(2, 6, 3, 3, 8), torch.randn(3, 11)
    results = []
    for backend in (transformer_engine.BACKEND, UNFUSED):
        prepared = backend.prepare(ScoreBias(6, 6, segments=Segments(SEGMENTS, SEGMENTS)), torch.float32, CPU)
        results.append(backend.attend(fused, None, None, prepared._replace(diagonals=diagonals), OPTIONS))
    torch.testing.assert_close(*results)
    fused = torch.randn(2, 6, 3, 2, 8)
    query = torch.randn(2, 4, 3, 8)
    results = [
        backend.attend(query, fused, None, ScoreBias(4, 6), OPTIONS)
        for backend in (transformer_engine.BACKEND, UNFUSED)
    ]
    torch.testing.assert_close(*results)
    assert choose_attention("transformer_engine", AttentionRequest(CPU, torch.float32, 8)).name == "transformer_engine"
    with pytest.raises(UserError, match="does not go with --compile"):
        choose_attention("transformer_engine", AttentionRequest(CPU, torch.float32, 8, compiled=True))


# What is refused


REFUSED = [
    ({"compile": True}, {}, "--compile does not go with"),
    ({"gradient_accumulation_fusion": True}, {}, "--gradient-accumulation-fusion does not"),
    ({}, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"}, "--pipeline-schedule zbv does not go"),
    ({"bf16": True, "fp8_format": "e4m3", "fp8_wgrad": False}, {}, "--no-fp8-wgrad does not go"),
    (
        {"bf16": True, "fp8_format": "e4m3", "fp8_recipe": "delayed", "recompute_granularity": "full"}, {},
        "--recompute-granularity full does not go",
    ),
    (
        {"bf16": True, "fp8_format": "e4m3", "fp8_recipe": "delayed", "cuda_graphs": True}, {},
        "--cuda-graphs does not go",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "layout", "message"), REFUSED)
def test_what_it_cannot_do_is_refused(
    calls: list[Any], options: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        transformer_engine.check(compute(**options), ParallelConfig(**layout), CPU)


def test_a_recipe_that_the_package_does_not_have_here(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = compute(bf16=True, fp8_format="e4m3", fp8_recipe="mxfp8")
    transformer_engine.check(options, ParallelConfig(), CPU)
    monkeypatch.setattr(double, "UNAVAILABLE", {"mxfp8"})
    with pytest.raises(UserError, match="--fp8-recipe mxfp8 is not to be had here: Device compute capability"):
        transformer_engine.check(options, ParallelConfig(), CPU)


def test_a_run_without_gpus_is_refused(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "DEVICES", ("cuda",))
    with pytest.raises(UserError, match="computes on cuda, and this run is on cpu; use --transformer-impl local"):
        transformer_engine.check(compute(), ParallelConfig(), CPU)
    with pytest.raises(UserError, match="--norm-backend transformer_engine needs a GPU"):
        transformer_engine.check_norm(CPU, compiled=False)


def test_the_package_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    double.forget()
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    settings = compute()  # as checkpoints and dry runs have them, which need no package
    assert settings.norm_backend == "transformer_engine"
    with pytest.raises(UserError, match="transformer_engine needs the package transformer_engine, which is not inst"):
        transformer_engine.check_package(settings)
    transformer_engine.check_package(ComputeConfig())
    double.forget()


@pytest.mark.parametrize(
    ("distributions", "reason"),
    [
        ((), "its core library (transformer-engine-cu12 or transformer-engine-cu13) and its extension for torch"),
        (("transformer-engine-cu13",), "which is installed without its extension for torch (transformer-engine-torch)"),
        (("transformer-engine-cu13", "transformer-engine-torch"), "cannot be imported: libcudart"),
    ],
)
def test_the_missing_part_is_named(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, distributions: tuple[str, ...], reason: str
) -> None:
    def version(name: str) -> str:
        if name not in distributions:
            raise transformer_engine.metadata.PackageNotFoundError(name)
        return "2.20.2"

    def fail(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    transformer_engine.problem.cache_clear()
    monkeypatch.setattr(transformer_engine.metadata, "version", version)
    monkeypatch.setattr(transformer_engine, "import_module", fail)
    with pytest.raises(UserError) as error:
        transformer_engine.check(compute(), ParallelConfig(), CPU)
    assert reason in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="--attention-backend transformer_engine needs the package"):
        choose_attention("transformer_engine", AttentionRequest(CPU, torch.float32, 8))


def test_fp8_needs_widths_that_every_rank_can_multiply(calls: list[Any]) -> None:
    model = ModelConfig(
        encoder_num_layers=1, hidden_size=64, num_attention_heads=4, kv_channels=8, ffn_hidden_size=96, vocab_size=64
    )
    fp8.check_fp8(compute(bf16=True, fp8_format="e4m3"), model, 2, CPU)
    with pytest.raises(
        UserError, match="--num-attention-heads 4 x --kv-channels 8 over --tensor-model-parallel-size 4"
    ):
        fp8.check_fp8(compute(bf16=True, fp8_format="e4m3"), model, 4, CPU)
    with pytest.raises(UserError, match="is not a multiple of 32"):
        fp8.check_fp8(compute(bf16=True, fp8_format="e4m3", fp8_recipe="mxfp8"), model, 2, CPU)
