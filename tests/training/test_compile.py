"""--compile: whole layers, once for all of a class, in every layout, with the losses of eager layers."""

from __future__ import annotations

import os
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from megatron.core.compilation import compile_layers
from megatron.core.datasets.loader import TensorBatch
from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.training import backends, model_setup
from megatron.training.arguments import parse_args
from tests.distributed import run_distributed

VOCABULARY, ENCODER_LENGTH, DECODER_LENGTH, MICROBATCHES = 96, 37, 12, 4
MODEL = shlex.split(
    "--hidden-size 32 --num-attention-heads 4 --kv-channels 8 --ffn-hidden-size 64 --encoder-seq-length 37 "
    f"--vocab-size {VOCABULARY} --micro-batch-size 2"
)
DEEP, SHALLOW = (shlex.split(f"--encoder-num-layers {n} --decoder-num-layers {n}") for n in (3, 1))
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
LAYOUTS = {
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "TP2, plain operators": (2, f"--tensor-model-parallel-size 2 --attention-backend unfused {DROPOUT}"),
    "TP2 SP": (2, f"--tensor-model-parallel-size 2 --sequence-parallel {DROPOUT}"),
    "TP2 SP, bf16": (2, "--tensor-model-parallel-size 2 --sequence-parallel --bf16"),
    "TP2 SP, UMT5": (2, "--tensor-model-parallel-size 2 --sequence-parallel --relative-attention-bias-per-layer"),
    "DP2 no_shard": (2, "--data-parallel-sharding-strategy no_shard"),
    "DP2 optim": (2, "--data-parallel-sharding-strategy optim"),
    "DP2 optim_grads": (2, "--data-parallel-sharding-strategy optim_grads --bf16"),
    "DP2 optim_grads_params": (2, "--data-parallel-sharding-strategy optim_grads_params"),
    "PP2 interleaved": (2, "--pipeline-model-parallel-size 2 --pipeline-schedule interleaved"),
    "TP2 SP, PP2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--pipeline-schedule interleaved",
    ),
    "recompute full": (2, f"--tensor-model-parallel-size 2 --recompute-granularity full {DROPOUT}"),
    "recompute selective": (2, f"--tensor-model-parallel-size 2 --recompute-granularity selective {DROPOUT}"),
    "recompute full, DP2": (2, "--recompute-granularity full --data-parallel-sharding-strategy optim_grads_params"),
    "recompute full, PP2": (2, "--recompute-granularity full --pipeline-model-parallel-size 2 --bf16"),
}


def train(rank: int, flags: list[str], backend: str | None, steps: int) -> tuple[list[float], list[int]]:
    """Training and validation loss of each step, and how many graphs have been compiled after each.

    Training is on microbatches, validation on other shapes, without gradients and dropout.
    """
    counters.clear()
    torch._dynamo.reset()
    config = parse_args([*MODEL, *flags, *(["--compile"] if backend else [])]).config
    context = ParallelContext.create(config.parallel, torch.device("cpu"))
    plan = model_setup.plan_stages(config, context, ENCODER_LENGTH, DECODER_LENGTH, MICROBATCHES)
    with pytest.MonkeyPatch.context() as patch:
        if backend is not None:
            patch.setattr(model_setup, "compile_layers", partial(compile_layers, backend=backend))
        model = model_setup.DistributedModel(config, context, plan, MICROBATCHES)
    optimizer = torch.optim.SGD([parameter.parameter for parameter in model.parameters], lr=0.05)
    generator = torch.Generator().manual_seed(3)
    lengths = (ENCODER_LENGTH, DECODER_LENGTH, DECODER_LENGTH)
    batch = TensorBatch(*(torch.randint(3, VOCABULARY, (8, length), generator=generator) for length in lengths))
    losses, graphs = [], []
    for step in range(steps):
        model.seed_dropout(step)
        sums = model.forward_backward(batch, torch.tensor(1.0 / batch.labels.numel()))
        assert sums is not None
        model.finish_gradients()
        optimizer.step()
        optimizer.zero_grad()
        model.train_mode(False)
        validation = model.token_losses(batch)
        model.train_mode(True)
        losses += [float(sums.sum()), 0.0 if validation is None else float(validation.sum())]
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs


def eager_and_compiled(
    rank: int, flags: list[str], backend: str, steps: int = 3
) -> tuple[list[float], list[float], list[int]]:
    """Losses without and with compilation, and the graphs of the latter."""
    eager, _ = train(rank, flags, None, steps)
    return eager, *train(rank, flags, backend, steps)


def test_layers_compile_once_and_draw_the_same_masks() -> None:
    """Two classes of layers, in training and in validation: four graphs, however many layers, and no more later.

    A graph break would be an error. Tensor-parallel ranks draw different masks where activations are divided.
    """
    flags = [*DEEP, *shlex.split(f"--tensor-model-parallel-size 2 {DROPOUT}")]
    for eager, compiled, graphs in run_distributed(eager_and_compiled, 2, flags, "aot_eager", timeout=280.0):
        assert graphs == [4, 4, 4]
        assert compiled == pytest.approx(eager, rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_compile(layout: str) -> None:
    world_size, flags = LAYOUTS[layout]
    ranks = run_distributed(eager_and_compiled, world_size, [*DEEP, *shlex.split(flags)], "aot_eager", timeout=600.0)
    for eager, compiled, graphs in ranks:
        assert graphs == [graphs[0]] * 3 and graphs[0] <= 4
        assert compiled == pytest.approx(eager, rel=1e-3 if "bf16" in flags else 1e-5)


def with_cache(rank: int, flags: list[str], folder: Path) -> tuple[list[float], list[float], int, int]:
    """Losses without and with compilation for the processor, and how often code was found in the cache and was not."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    eager, compiled, _ = eager_and_compiled(rank, flags, "inductor", 1)
    return eager, compiled, counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, ""),
        pytest.param(2, "--tensor-model-parallel-size 2 --sequence-parallel", marks=pytest.mark.slow),
        pytest.param(2, "--pipeline-model-parallel-size 2 --recompute-granularity full", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900)
def test_the_second_run_finds_compiled_code(tmp_path: Path, world_size: int, flags: str) -> None:
    arguments = [*SHALLOW, *shlex.split(flags)], tmp_path
    first = run_distributed(with_cache, world_size, *arguments, timeout=600.0)
    second = run_distributed(with_cache, world_size, *arguments, timeout=600.0)
    for eager, compiled, hits, misses in (*first, *second):
        assert compiled == pytest.approx(eager, rel=1e-5)
        assert hits + misses >= 2
    assert all(misses > 0 for *_, misses in first)
    assert all(misses == 0 for *_, misses in second)


def test_masks_inside_of_torchs_attention_are_refused() -> None:
    flags = "--tensor-model-parallel-size 2 --attention-dropout 0.1 --attention-backend sdpa --compile"
    config = parse_args([*MODEL, *SHALLOW, *shlex.split(flags)]).config
    with pytest.raises(UserError, match="only beside --sequence-parallel; use"):
        backends.check_attention(config, torch.device("cpu"))
