"""Training steps traced on a GPU that is not there: no tensor is on the host or goes there, and no number is read."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tests import fake_gpu

TRITON = "--norm-backend triton --activation-backend triton --cross-entropy-backend triton"
TORCH = "--attention-backend sdpa --norm-backend torch --activation-backend torch --cross-entropy-backend torch"
VARIANTS = {
    "bf16": f"{TORCH} --bf16",
    "bf16, segments": f"{TORCH} --bf16",
    "fp32": f"{TORCH} --attention-backend unfused",
    "fp16": f"{TORCH} --fp16 --recompute-granularity selective",
    "full recomputation": f"{TORCH} --bf16 --recompute-granularity full",
    "dropout": f"{TORCH} --bf16 --hidden-dropout 0.1 --attention-dropout 0.1",
    "tied": f"{TORCH} --share-embeddings-and-output-weights --add-bias-linear --activation-function relu",
    "rotary": f"{TORCH} --bf16 --position-embedding-type rope --normalization LayerNorm",
}
WITH_TRITON = {
    "Triton, bf16": f"--bf16 --attention-backend triton {TRITON}",
    "Triton, fp32": f"--attention-backend triton --relative-attention-bias-per-layer {TRITON}",
    "Triton, segments": f"--bf16 --attention-backend triton {TRITON}",
    "auto": "--bf16",
}
MODEL = (
    "--encoder-num-layers 2 --hidden-size 64 --num-attention-heads 4 --kv-channels 16 --vocab-size 384 "
    "--micro-batch-size 2 --global-batch-size 4 --optimizer adamw"
)


def _without_modes(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` as torch.compile wants it: it finds out by itself that tensors are fake."""
    with unset_fake_temporarily():
        return function(*arguments)


def _build(flags: str, mode: FakeTensorMode) -> tuple[Any, Any, Any]:
    """Configuration, context and model, whose parameters say that they are on the GPU."""
    from megatron.core import compilation
    from megatron.core.parallel_state import ParallelContext
    from megatron.training import model_setup
    from megatron.training.arguments import parse_args
    from megatron.training.backends import check_backends

    def to_empty(module: nn.Module, device: torch.device) -> nn.Module:
        with mode:
            for each in module.modules():
                for name, parameter in list(each.named_parameters(recurse=False)):
                    setattr(each, name, nn.Parameter(torch.empty(tuple(parameter.shape), device=device)))
        return module

    def check(*arguments: Any) -> None:
        with mode:  # it makes an empty tensor
            check_backends(*arguments)

    def compile_layers(layers: Iterable[nn.Module]) -> None:
        layers = list(layers)
        compilation.compile_layers(layers, backend="aot_eager")
        for layer in layers:
            layer.forward = partial(_without_modes, layer.forward)

    config = parse_args([*MODEL.split(), *flags.split()]).config
    context = ParallelContext(torch.device("cuda", 0))
    replaced = {
        "initialize_parameters": mock.DEFAULT, "check_backends": check, "compile_layers": compile_layers
    }  # fmt: skip
    with mock.patch.multiple(model_setup, **replaced), mock.patch.object(nn.Module, "to_empty", to_empty):
        return config, context, model_setup.DistributedModel(config, context, None, num_microbatches=2)


def trace_step(flags: str, has_segments: bool) -> None:
    """Forward and backward pass of two microbatches, norm, clipping and update, as the trainer makes them."""
    from megatron.core.datasets.loader import TensorBatch
    from megatron.core.distributed import global_grad_norm, gradient_divisor
    from megatron.core.optimizer import build_optimizer

    mode = FakeTensorMode()
    config, context, model = _build(flags, mode)
    # torch.compile goes along with no mode but its own.
    no_copies = nullcontext() if config.compute.compile else fake_gpu.NoCopies()
    with mode, no_copies:
        optimizer = build_optimizer(config.optimizer, model.parameters, context)
        encoder, decoder = (torch.ones(4, length, dtype=torch.int32, device="cuda") for length in (48, 20))
        batch = TensorBatch(encoder, decoder, decoder, *((encoder, decoder) if has_segments else ()))
        factor = 1.0 / (batch.labels >= 0).sum()
        model.seed_dropout(0)
        sums = model.forward_backward(batch, factor)
        assert sums.device == context.device
        model.finish_gradients()
        norm = global_grad_norm(model.parameters, context, 1.0, sums)
        optimizer.step(1e-2, gradient_divisor(norm, 1.0), skip=norm.isfinite().logical_not())
        assert norm.device == context.device
        assert all(p.parameter.grad.device == context.device for p in model.parameters)
        optimizer.zero_grad()


def _failure(name: str, flags: str, has_segments: bool) -> str:
    try:
        trace_step(flags, has_segments)
    except Exception as error:
        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        ours = [place for place in places if "/megatron/" in place]
        return f"{name}: {type(error).__name__} {error} at {' '.join(ours[-2:])}\n"
    return ""


def trace_steps(*variants: str) -> None:
    """Print a line for each that fails, with where."""
    with mock.patch.object(torch.cuda, "get_device_capability", lambda *device: (9, 0)):
        for variant in variants:
            name, _, flags = variant.partition("=")
            print(_failure(name, flags, has_segments="segments" in name), end="")


@pytest.mark.slow
def test_compiled_steps_stay_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the graphs that inductor would get."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    names = ["bf16", "tied", *(["Triton, bf16", "auto"] if find_spec("triton") else [])]
    variants = [f"{name}={(VARIANTS | WITH_TRITON)[name]} --compile" for name in names]
    assert fake_gpu.run(fake_gpu.build(tmp_path), trace_steps, *variants) == ""


def test_steps_stay_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    variants = VARIANTS | (WITH_TRITON if find_spec("triton") else {})
    library = fake_gpu.build(tmp_path)
    assert fake_gpu.run(library, trace_steps, *(f"{name}={flags}" for name, flags in variants.items())) == ""
