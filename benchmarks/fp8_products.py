"""Linear products of T5 v1.1 XL's blocks, forward and backward, in bf16 and FP8; and the sum of weight gradients.

FP8 by torchao (tensorwise scales as `--fp8-format` has them, and row by row, which this project has no flag for) and by
Transformer Engine where it is installed. All start from fp32 weights and make fp32 gradients, as in training: casts are
part of the time, but for `bf16, cast before`, whose weights are cast once a step, as those of whole parameters on GPUs.
Contenders of a product take turns, each turn timed by CUDA events; the row has the median and its ratio to compiled
bf16 of the same turns, and the error of the result and the weight's gradient against fp32.

`accumulation` rows add a weight gradient to what earlier microbatches have left in fp32: a bf16 product that is cast
and added (what autograd does), a product with an fp32 result that is added, torch's `addmm` with an fp32 result, apex's
kernel.

    python benchmarks/fp8_products.py --output gpu-results/fp8_products.jsonl
    python benchmarks/fp8_products.py --device cpu --tiny          that it runs: FP8 is emulated there
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_timing import elapsed_ms
from report import Rows
from torch import Tensor

from megatron.core.config import ComputeConfig
from megatron.core.extensions import packages, transformer_engine
from megatron.core.tensor_parallel.products import linear as bf16_linear
from megatron.core.tensor_parallel.products import weight_gradient

# Input and output features: d_model 2048, 32 heads of 64, d_ff 5120.
PRODUCTS = {
    "query, key and value": (2048, 6144),
    "attention output": (2048, 2048),
    "gate and up": (2048, 10240),
    "down": (5120, 2048),
}
TINY = {"tiny": (32, 48)}
BASELINE = "bf16 compiled"
TURN_MS = 20.0


@dataclass
class Operands:
    """Of one product: `x` `[r, i]` and `gradient` `[r, o]` in bf16, fp32 `weight` `[o, i]`."""

    x: Tensor
    weight: Tensor
    gradient: Tensor

    @classmethod
    def drawn(cls, rows: int, inputs: int, outputs: int, device: torch.device) -> Operands:
        """Random ones of the scales that they have in training."""
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        x = normal(rows, inputs).bfloat16().requires_grad_()
        weight = (normal(outputs, inputs) * inputs**-0.5).requires_grad_()
        return cls(x, weight, (normal(rows, outputs) * 1e-3).bfloat16())


def products(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Linear functions by contender."""
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    found: dict[str, Callable[..., Tensor]] = {BASELINE: compiled(bf16_linear), "bf16": bf16_linear}
    found["bf16, cast before"] = cast_before()
    if packages.installed("torchao"):
        found |= {f"{name} compiled": compiled(function) for name, function in torchao_products(device).items()}
        found["torchao e4m3"] = torchao_products(device)["torchao e4m3"]
    if device.type == "cuda" and packages.installed("transformer_engine") and transformer_engine.problem() is None:
        flags = {"transformer_impl": "transformer_engine", "fp8_recipe": "tensorwise"}
        for fp8_format in ("e4m3", "hybrid"):
            compute = ComputeConfig(bf16=True, fp8_format=fp8_format, **flags)  # type: ignore[arg-type]
            recipe = transformer_engine.Recipe(compute)
            found[f"Transformer Engine {fp8_format}"] = transformer_engine.LinearProduct(recipe, fp8=True)
    return found


def cast_before() -> Callable[..., Tensor]:
    """For one weight, which its first call casts."""
    casts: list[Tensor] = []

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        if not casts:
            casts.append(weight.detach().to(x.dtype))
        return bf16_linear(x, weight, None, casts[0])

    return linear


def torchao_products(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Those of torchao, not compiled."""
    from torchao.float8.config import Float8LinearConfig

    from megatron.core.extensions import torchao_fp8

    found, emulate = {}, device.type != "cuda"
    for fp8_format in ("e4m3", "hybrid"):
        compute = ComputeConfig(bf16=True, fp8_format=fp8_format)  # type: ignore[arg-type]
        found[f"torchao {fp8_format}"] = torchao_fp8.product(compute, emulate=emulate)
    compute = ComputeConfig(bf16=True, fp8_format="hybrid", fp8_wgrad=False)
    found["torchao hybrid, bf16 weight gradients"] = torchao_fp8.product(compute, emulate=emulate)
    if device.type == "cuda":
        for recipe in ("rowwise", "rowwise_with_gw_hp"):
            found[f"torchao {recipe}"] = torchao_fp8.linear_with(Float8LinearConfig.from_recipe_name(recipe))
    return found


def pass_of(function: Callable[..., Tensor], operands: Operands) -> Callable[[], None]:
    """A forward and backward pass."""

    def run() -> None:
        operands.x.grad = operands.weight.grad = None
        function(operands.x, operands.weight).backward(operands.gradient)

    return run


def accumulations(operands: Operands) -> dict[str, Callable[[], None]]:
    """Ways to add the weight's gradient to an fp32 sum, by contender."""
    x, gradient, total = operands.x.detach(), operands.gradient, torch.zeros_like(operands.weight).detach()

    def cast_and_add() -> None:
        total.add_(gradient.T @ x)

    def product_and_add() -> None:
        total.add_(weight_gradient(gradient, x, torch.float32))

    def addmm() -> None:
        torch.addmm(total, gradient.T, x, out_dtype=torch.float32, out=total)

    found = {"bf16, cast, added": cast_and_add}
    if x.is_cuda:
        found["fp32, added"] = product_and_add
        found["torch.addmm to fp32"] = addmm
        if packages.installed("fused_weight_gradient_mlp_cuda"):
            import fused_weight_gradient_mlp_cuda as kernels

            found["apex"] = partial(kernels.wgrad_gemm_accum_fp32, x, gradient, total)
    return found


def turns(runs: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of a run in each turn, by contender; those that fail have none, and say why."""
    repeats = {name: count for name, run in runs.items() if (count := _repeats(name, run, device))}
    times: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(rounds):
        for name, count in repeats.items():
            times[name].append(elapsed_ms(runs[name], count, device) / count)
    return times


def _repeats(name: str, run: Callable[[], None], device: torch.device) -> int:
    """How many runs a turn takes, after warming up; 0: it cannot run, which costs no other its row."""
    try:
        for _ in range(2):  # the first compiles
            once = elapsed_ms(run, 1, device)
    except Exception as error:
        print(f"{name} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
        return 0
    return max(1, round(TURN_MS / once)) if device.type == "cuda" else 1


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Of the whole tensor."""
    return round(((value.float() - exact).norm() / exact.norm()).item(), 5)


def errors(function: Callable[..., Tensor], operands: Operands) -> dict[str, float]:
    """Of the result and of the weight's gradient, against fp32."""
    operands.x.grad = operands.weight.grad = None
    result = function(operands.x, operands.weight)
    result.backward(operands.gradient)
    x, weight, gradient = operands.x.detach().float(), operands.weight.detach(), operands.gradient.float()
    assert operands.weight.grad is not None
    return {
        "error": relative_error(result.detach(), x @ weight.T),
        "weight_gradient_error": relative_error(operands.weight.grad, gradient.T @ x),
    }


def timed_rows(
    kind: str, runs: dict[str, Callable[[], None]], baseline: str, flops: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each contender that runs."""
    times = turns(runs, rounds, device)
    rows = []
    for name, values in times.items():
        ratios = [own / base for own, base in zip(values, times.get(baseline, values), strict=True)]
        milliseconds = statistics.median(values)
        rows.append({
            "kind": kind,
            "contender": name,
            "ms": round(milliseconds, 4),
            "ratio_to_bf16": round(statistics.median(ratios), 4),
            "tflops_per_s": round(flops / milliseconds / 1e9, 2),
        })  # fmt: skip
    return rows


def measure(arguments: argparse.Namespace) -> None:
    """Print the rows of all products as they come, and append them to the output."""
    device = torch.device(arguments.device)
    shapes, tokens = (TINY, 64) if arguments.tiny else (PRODUCTS, arguments.tokens)
    common = {"benchmark": "fp8_products", "torch": torch.__version__}
    common["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    published = Rows(arguments.output, common, append=True)
    for name, (inputs, outputs) in shapes.items():
        torch.compiler.reset()  # all contenders of a shape fit into what is kept of a function's compiled variants
        operands, functions = Operands.drawn(tokens, inputs, outputs, device), products(device)
        flops = 2 * tokens * inputs * outputs
        runs = {each: pass_of(function, operands) for each, function in functions.items()}
        rows = timed_rows("product", runs, BASELINE, 3 * flops, arguments.rounds, device)
        for row in rows:
            row |= errors(functions[row["contender"]], operands)
        sums = accumulations(operands)
        rows += timed_rows("accumulation", sums, next(iter(sums)), flops, arguments.rounds, device)
        setting = {"product": name, "tokens": tokens, "inputs": inputs, "outputs": outputs}
        for row in rows:
            published.add(setting | row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="one small product")
    parser.add_argument("--tokens", type=int, default=16384, help="rows of a product")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--output", type=Path, help="append the rows to this file")
    measure(parser.parse_args())
