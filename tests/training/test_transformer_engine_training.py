"""Whole runs with Transformer Engine's layers, by a double that computes on CPUs, train as with the local ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.core.config import ModelConfig, ParallelConfig
from megatron.core.models.T5.t5_pipeline import SCHEDULES, choose_plan
from tests import transformer_engine_double as double
from tests.distributed import run_distributed
from tests.layouts.comparison import LIMITS, difference, metrics, one_thread, train, train_here
from tests.layouts.layout import Layout

STEPS = 3
ENGINE = ["--transformer-impl", "transformer_engine", "--attention-backend", "transformer_engine"]
FP8 = ["--transformer-impl", "transformer_engine", "--fp8-format", "hybrid"]


def train_with_double(rank: int, runs: Sequence[list[str]]) -> tuple[list[str | None], list[tuple[str, Any]]]:
    """`train_here` with the double in place of the package, and what that was called for."""
    with double.on_cpu() as calls, one_thread():
        return train_here(rank, runs), [(name, details) for name, details in calls if name != "update"]


def engine(layout: Layout, *runs: list[str]) -> list[tuple[str, Any]]:
    """Train with each of the flags; the calls of the first rank."""
    if layout.world_size == 1:
        ranks = [train_with_double(0, runs)]
    else:
        ranks = run_distributed(train_with_double, layout.world_size, runs)
    assert [outcomes for outcomes, _ in ranks] == [[None] * len(runs)] * layout.world_size
    return ranks[0][1]


def flags(layout: Layout, data: Path, save: Path, *more: str, steps: int = STEPS) -> list[str]:
    """Of a run."""
    common = (
        f"--data-path {data} --train-iters {steps} --lr-decay-iters 6 --eval-iters 1 --eval-interval 3 --save {save}"
    )
    return [*layout.flags, *common.split(), *more]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(tp=2), marks=pytest.mark.slow),
        Layout(tp=2, sp=True, recompute="full", variant="Megatron's"),
        Layout(dp=2, sharding="optim_grads_params"),
        Layout(pp=2),
        Layout(recompute="selective", variant="UMT5"),
        Layout(precision="fp16"),
    ],
)
def test_layouts_train_as_the_local_layers(byte_dataset: Path, tmp_path: Path, layout: Layout) -> None:
    local, other = tmp_path / "local", tmp_path / "engine"
    with one_thread():
        assert train(1, [flags(layout.reference, byte_dataset, local)]) == [None]
    calls = engine(layout, flags(layout, byte_dataset, other, *ENGINE))
    assert {name for name, _ in calls} >= {"linear", "attention"}
    found = difference(other, local)  # of tensors with the same names
    loss, parameter = LIMITS[layout.precision]
    # Biases start from zero and have taken three steps: of those, rounding is a larger part.
    assert max(found.loss, found.validation_loss) < 2 * loss and found.parameter < 5 * parameter, found


def test_runs_go_on_with_the_other_implementation(byte_dataset: Path, tmp_path: Path) -> None:
    """Saved with the local layers and continued with the package's, and the other way round."""
    layout = Layout()

    def run(name: str, *more: str, steps: int) -> list[str]:
        return flags(layout, byte_dataset, tmp_path / name, *more, steps=steps)

    with one_thread():
        assert train(1, [run("whole", steps=6), run("local", steps=3)]) == [None, None]
        loaded = [*ENGINE, "--load", str(tmp_path / "local")]
        engine(layout, run("engine", *ENGINE, steps=3), run("from-local", *loaded, steps=6))
        assert train(1, [run("from-engine", "--load", str(tmp_path / "engine"), steps=6)]) == [None]
    expected = metrics(tmp_path / "whole", "lm_loss")
    for name in ("from-local", "from-engine"):
        found = metrics(tmp_path / name, "lm_loss")
        assert sorted(found) == [4, 5, 6]
        assert found == pytest.approx({step: expected[step] for step in found}, rel=2e-6)


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        (Layout(precision="bf16"), ["--first-last-layers-bf16"]),
        (Layout(precision="bf16", recompute="full"), []),
        (Layout(precision="bf16", tp=2, sp=True), ["--fp8-recipe", "delayed"]),
        (Layout(precision="bf16", dp=2, sharding="optim_grads_params"), ["--fp8-recipe", "delayed"]),
        pytest.param(Layout(precision="bf16", pp=2), ["--fp8-recipe", "blockwise"], marks=pytest.mark.slow),
    ],
)
def test_fp8_is_near_bf16_and_covers_the_linear_layers(
    byte_dataset: Path, tmp_path: Path, layout: Layout, more: list[str]
) -> None:
    near, rounded = tmp_path / "bf16", tmp_path / "fp8"
    with one_thread():
        assert train(1, [flags(layout.reference, byte_dataset, near)]) == [None]
    calls = engine(layout, flags(layout, byte_dataset, rounded, *FP8, *more))
    expected, found = metrics(near, "lm_loss"), metrics(rounded, "lm_loss")
    assert found == pytest.approx(expected, rel=0.02) and found != expected
    linear = [details for name, details in calls if name == "linear"]
    in_fp8 = [recipe is not None for _, recipe, _ in linear]
    if "--first-last-layers-bf16" in more:  # 3 encoder layers of 4 products, 5 decoder layers of 7
        assert sum(in_fp8) / len(in_fp8) == (1 * 4 + 3 * 7) / (3 * 4 + 5 * 7)
    else:
        assert all(in_fp8)
    firsts = {first for _, _, first in linear}
    # Weights are rounded once a step, but where they are released after each use. None: evaluation.
    assert firsts == ({None} if layout.dp > 1 else {True, False, None})


@pytest.mark.parametrize("own_products", [False, True])
def test_automatic_schedules_leave_no_weight_gradients_to_put_off(own_products: bool) -> None:
    model = ModelConfig(
        encoder_num_layers=6, hidden_size=32, num_attention_heads=4, vocab_size=384, activation_function="relu"
    )
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    plan = choose_plan(model, parallel, 512, 114, num_microbatches=8, own_products=own_products)
    assert SCHEDULES[plan.schedule].splits_backward != own_products


def test_mistakes_are_told_in_one_line(byte_dataset: Path, tmp_path: Path) -> None:
    runs = [
        (["--transformer-impl", "transformer_engine", "--compile"], "--compile does not go with --transformer-impl"),
        (["--norm-backend", "transformer_engine", "--compile"], "--norm-backend transformer_engine does not go with"),
        ([*FP8, "--fp16"], "needs --bf16"),
        (
            [*FP8, "--bf16", "--fp8-recipe", "delayed", "--check-determinism-interval", "2"],
            "--check-determinism-interval does not go with --fp8-recipe delayed",
        ),
        ([*FP8, "--bf16", "--kv-channels", "6"], "--kv-channels 6"),
    ]
    given = [flags(Layout(), byte_dataset, tmp_path / str(i), *more) for i, (more, _) in enumerate(runs)]
    outcomes, _ = train_with_double(0, given)
    for outcome, (_, message) in zip(outcomes, runs, strict=True):
        assert outcome is not None and message in outcome and "\n" not in outcome
