"""Norms, gated activations and the loss on one GPU: Triton's kernels beside torch, torch.compile, apex and TE.

Each operation is timed alone, forward and backward apart, on tensors that no cache holds (a buffer larger than the last
cache is written between calls), contenders in turns, medians of the GPU's own times. `gb_per_s` counts what an
operation must read and write, not what an implementation does; `share_of_copy` is that beside a copy of a large tensor
in the same run. Before that, results are compared with torch's in float32; a contender that computes something else
ends the run.

    python benchmarks/elementwise.py --output benchmarks/results/elementwise.jsonl
    TRITON_INTERPRET=1 python benchmarks/elementwise.py --device cpu --tiny      that all of it runs, anywhere
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from report import publish
from torch import Tensor

from megatron.core.extensions import apex, cpu_elementwise, torch_elementwise, transformer_engine, triton_elementwise
from megatron.core.extensions.packages import installed

EPSILON = 1e-6
FLUSHED_BYTES = 256 << 20
# Rows, hidden size, feed-forward units, rows of logits, vocabulary: T5 v1.1 base and XXL; mT5's vocabulary.
SIZES = {
    "base": (32768, 768, 2048, 8192, 32128),
    "xxl": (8192, 4096, 10240, 8192, 32128),
    "mt5-base": (32768, 768, 2048, 1024, 250112),
}
TINY = {"tiny": (4, 40, 24, 3, 50)}
Function = Callable[..., Any]


@dataclass
class Operation:
    """What is timed.

    Attributes:
        name: Of the operation and its direction.
        moved_bytes: What it must read and write.
        calls: By contender: a call of it, and what it gives for a comparison, or nothing where that is random.
    """

    name: str
    moved_bytes: int
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Tensor] | None]]


def compiled(function: Function) -> Function:
    """A function by torch.compile, for fixed shapes."""
    return torch.compile(function, dynamic=False)


def kernels(device: torch.device) -> dict[str, Any]:
    """Our modules of kernels that run on the device."""
    modules = {"cpu": cpu_elementwise, "triton": triton_elementwise}
    return {
        name: module
        for name, module in modules.items()
        if module.supports(torch.empty(0, device=device)) and (name != "triton" or installed("triton"))
    }


def packages(device: torch.device) -> dict[str, Any]:
    """Modules of NVIDIA's packages that are installed."""
    if device.type != "cuda":
        return {}
    found: dict[str, Any] = {"apex": apex} if installed("fused_layer_norm_cuda") else {}
    return found | ({"transformer_engine": transformer_engine} if transformer_engine.problem() is None else {})


def eager_add_norm(residual: Tensor, branch: Tensor, weight: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Sum, dropout and norm by torch."""
    total = residual + (F.dropout(branch, p) if p else branch)
    return total, torch_elementwise.rms_norm(total, weight, EPSILON, total.dtype)


def eager_gradient(logits: Tensor, labels: Tensor, log_z: Tensor, label_scale: Tensor, softmax_scale: Tensor) -> None:
    """The gradient of logits by torch, all rows at once, as torch.compile fuses it."""
    onehot = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    softmax = (logits.float() - log_z[:, None]).exp() * softmax_scale[:, None]
    logits.copy_(softmax - torch.where(onehot, label_scale[:, None], 0.0))


def both_directions(
    name: str, functions: dict[str, Function], inputs: list[Tensor], moved: tuple[int, int], compares: bool = True
) -> list[Operation]:
    """Forward and backward of functions with the same inputs and outputs."""
    forward = Operation(f"{name} forward", moved[0], {})
    backward = Operation(f"{name} backward", moved[1], {})
    for contender, function in functions.items():
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # The norm's input, which `beside` returns, and sums have gradients of their own.
        gradients = [torch.ones_like(output) * 0.5 for output in outputs]

        def differentiate(outputs: Any = outputs, gradients: Any = gradients) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

        def call(function: Function = function) -> Any:
            return function(*inputs)

        def result(outputs: Any = outputs) -> Tensor:
            return outputs[-1].detach()

        def gradient(differentiate: Any = differentiate) -> Tensor:
            return differentiate()[0]

        forward.calls[contender] = (call, result if compares else None)
        backward.calls[contender] = (differentiate, gradient if compares else None)
    return [forward, backward]


def norm_operations(
    rows: int, hidden: int, dtype: torch.dtype, device: torch.device, compiles: bool
) -> list[Operation]:
    """Norm, and sum and norm without and with dropout."""
    x, branch = (torch.randn(rows, hidden, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.rand(hidden, device=device).requires_grad_()
    size = x.nbytes

    def of(module: Any) -> Function:
        return lambda x, weight: module.rms_norm(x, weight, EPSILON, dtype)

    def sum_of(module: Any, p: float) -> Function:
        return lambda x, branch, weight: module.add_rms_norm(x, branch, weight, EPSILON, dtype, p)

    ours = kernels(device)
    norms = {name: of(module) for name, module in (ours | packages(device)).items()}
    norms["torch eager"] = of(torch_elementwise)
    if compiles:
        norms["torch compiled"] = compiled(of(torch_elementwise))
    operations = both_directions("rms_norm", norms, [x, weight], (2 * size, 3 * size))
    for p in (0.0, 0.1):

        def eager(x: Tensor, branch: Tensor, weight: Tensor, p: float = p) -> tuple[Tensor, Tensor]:
            return eager_add_norm(x, branch, weight, p)

        sums = {name: sum_of(module, p) for name, module in ours.items()} | {"torch eager": eager}
        if compiles:
            sums["torch compiled"] = compiled(eager)
        name = "dropout_add_rms_norm" if p else "add_rms_norm"
        # Backward: both gradients and the sum are read, the gradients of residual and, with dropout, branch written.
        moved = (4 * size, (5 if p else 4) * size)
        operations += both_directions(name, sums, [x, branch, weight], moved, compares=p == 0.0)
    return operations


def gated_operations(
    rows: int, units: int, dtype: torch.dtype, device: torch.device, compiles: bool
) -> list[Operation]:
    """Gated GELU."""
    x = torch.randn(rows, 2 * units, device=device, dtype=dtype, requires_grad=True)

    def of(module: Any) -> Function:
        return lambda x: module.gated_activation(x, "gated-gelu")

    functions = {name: of(module) for name, module in kernels(device).items()}
    functions["torch eager"] = of(torch_elementwise)
    if compiles:

        def strided(x: Tensor) -> Tensor:
            gate, up = x.unflatten(-1, (-1, 2)).unbind(-1)
            return F.gelu(gate, approximate="tanh") * up

        functions["torch compiled"] = compiled(strided)
    return both_directions("gated_gelu", functions, [x], (3 * x.nbytes // 2, 5 * x.nbytes // 2))


def loss_operations(rows: int, words: int, dtype: torch.dtype, device: torch.device, compiles: bool) -> list[Operation]:
    """Statistics of logits, and the gradient in their place."""
    logits = torch.randn(rows, words, device=device, dtype=dtype)
    labels = torch.randint(words, (rows,), device=device)
    log_z, label_logit = torch.empty(2, rows, device=device).unbind()
    ones = torch.ones(rows, device=device)
    exact = logits.float().logsumexp(-1)
    statistics_of = Operation("softmax_statistics", logits.nbytes, {})
    gradient_of = Operation("logits_gradient", 2 * logits.nbytes, {})

    def add(name: str, statistics: Function, gradient: Function) -> None:
        def call() -> Tensor:
            statistics(logits, labels, log_z, label_logit)
            return log_z

        # Timed in place again and again: the numbers do not matter, and do not grow with a scale below 1.
        def scaled() -> None:
            gradient(logits, labels, exact, 0.1 * ones, 0.1 * ones)

        def compared() -> Tensor:
            copy = torch.linspace(-4, 4, words, device=device, dtype=dtype).repeat(rows, 1)
            gradient(copy, labels, copy.float().logsumexp(-1), ones, ones)
            return copy

        statistics_of.calls[name] = (call, lambda: call().clone())
        gradient_of.calls[name] = (scaled, compared)

    for name, module in kernels(device).items():
        add(name, module.softmax_statistics, module.logits_gradient_)
    add("torch eager", torch_elementwise.softmax_statistics, torch_elementwise.logits_gradient_)
    if compiles:

        def both(logits: Tensor, labels: Tensor, log_z: Tensor, label_logit: Tensor) -> None:
            log_z.copy_(logits.float().logsumexp(-1))
            label_logit.copy_(logits.gather(1, labels[:, None]).squeeze(1))

        add("torch compiled", compiled(both), compiled(eager_gradient))
    return [statistics_of, gradient_of]


def compare(operation: Operation, dtype: torch.dtype) -> None:
    """End the run where a contender's numbers differ from eager torch's by more than rounding."""
    reference = operation.calls["torch eager"][1]
    if reference is None:
        return
    expected = reference().float()
    for name, (_, result) in operation.calls.items():
        assert result is not None
        difference = float((result().float() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not difference < (1e-4 if dtype == torch.float32 else 1e-2):
            raise SystemExit(f"{operation.name}: {name} differs by {difference:.2g} from torch")


def mark(device: torch.device) -> Any:
    """This moment: an event among the GPU's work, or the host's clock in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def times_ms(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Medians of the calls, which take turns, each time in another order."""
    names = list(calls)
    flushed = torch.empty(FLUSHED_BYTES if device.type == "cuda" else 8, dtype=torch.uint8, device=device)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for number in range(-2, rounds):  # the first two are not counted
        for name in names[number % len(names) :] + names[: number % len(names)]:
            flushed.fill_(number % 7)
            start = mark(device)
            calls[name]()
            end = mark(device)
            if number >= 0:
                events[name].append((start, end))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return {name: statistics.median(start.elapsed_time(end) for start, end in e) for name, e in events.items()}
    return {name: statistics.median(1e3 * (end - start) for start, end in e) for name, e in events.items()}


def copy_gb_per_s(device: torch.device, count: int, rounds: int) -> float:
    """Bytes read and written by a copy of a large tensor."""
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e-6 * count / times_ms({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]


def main() -> None:
    """Time each operation of each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32", "float16"], default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device, rounds = torch.device(options.device), 2 if options.tiny else options.rounds
    copy = copy_gb_per_s(device, 1 << 16 if options.tiny else 1 << 30, rounds)
    rows: list[dict[str, Any]] = []
    for size, (tokens, hidden, units, logit_rows, words) in (
        TINY if options.tiny else {name: SIZES[name] for name in options.sizes}
    ).items():
        for dtype in (getattr(torch, name) for name in options.dtypes):
            compiles = device.type == "cuda"
            groups: list[tuple[Function, int, int]] = [
                (norm_operations, tokens, hidden), (gated_operations, tokens, units),
                (loss_operations, logit_rows, words),
            ]  # fmt: skip
            for make, number, width in groups:
                for operation in make(number, width, dtype, device, compiles):
                    compare(operation, dtype)
                    times = times_ms({name: calls[0] for name, calls in operation.calls.items()}, device, rounds)
                    for name, spent in times.items():
                        rate = 1e-6 * operation.moved_bytes / spent
                        row = {"operation": operation.name, "size": size, "rows": number, "width": width}
                        row |= {"dtype": str(dtype).removeprefix("torch."), "contender": name, "ms": round(spent, 4)}
                        rows.append(row | {"gb_per_s": round(rate, 1), "share_of_copy": round(rate / copy, 3)})
                        print(rows[-1], file=sys.stderr)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    publish(rows, options.output, "elementwise", torch=torch.__version__, device=name, copy_gb_per_s=round(copy, 1))


if __name__ == "__main__":
    main()
