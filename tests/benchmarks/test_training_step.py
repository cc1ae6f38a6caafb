"""The benchmark of the training step: its floor is the step, its turns are fair, and its table says who wins."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.config import ModelConfig
from megatron.core.models.T5.t5_flops import training_flops_per_sequence
from megatron.core.models.T5.t5_presets import PRESETS

# The scripts import each other by bare names.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from step_contender import Case
from step_floor import Floor, attention, linear, step_products
from step_processes import rotated
from step_table import markdown
from train_step import check_losses, compared

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "encoder_num_layers": 2, "decoder_num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "kv_channels": 6,
    "ffn_hidden_size": 40, "vocab_size": 200,
}  # fmt: skip


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_floor_is_the_products_of_a_step(preset: str) -> None:
    config = ModelConfig(**PRESETS[preset])  # type: ignore[arg-type]
    flops = sum(product.flops for product in step_products(config, 3, 65, 23))
    assert flops == 3 * training_flops_per_sequence(config, 65, 23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_computes(dtype: torch.dtype) -> None:
    products = step_products(ModelConfig(**TINY), 2, 9, 5)
    floor = Floor(products, dtype, torch.device("cpu"))
    floor.step()
    assert len(floor.calls) == len(products)
    for product, (_, left, right, result) in zip(products, floor.calls, strict=True):
        assert left.shape[-2:] == (product.m, product.k) and right.shape[-2:] == (product.k, product.n)
        assert result.shape[-2:] == (product.m, product.n)


def test_products_are_those_of_autograd() -> None:
    """Sizes of what autograd multiplies for a linear layer and for attention."""
    sizes: list[tuple[int, ...]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                left, right = args[0].shape, args[1].shape
                sizes.append((left[0] if len(left) == 3 else 1, left[-2], left[-1], right[-1]))
            return function(*args, **(kwargs or {}))

    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((7, 5), (3, 5)))
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in ((2, 7, 5), (2, 11, 5), (2, 11, 5)))
    with Recorder():
        (x @ weight.T).sum().backward()
        torch.bmm(torch.bmm(query, key.mT).softmax(-1), value).sum().backward()

    def transposable(size: tuple[int, ...]) -> tuple[int, ...]:
        """Autograd may compute the transposed result."""
        batch, m, k, n = size
        return (batch, min(m, n), k, max(m, n))

    ours = [(p.batch, p.m, p.k, p.n) for p in [*linear(7, 5, 3), *attention(2, 7, 11, 5)]]
    assert sorted(map(transposable, sizes)) == sorted(map(transposable, ours))


def test_rotated_is_fair() -> None:
    names = ["a", "b", "c"]
    orders = [rotated(names, number) for number in range(6)]
    assert [order[0] for order in orders[:3]] == names
    for place in range(3):
        assert sorted(order[place] for order in orders) == sorted(names * 2)
    assert {(one, two) for order in orders for one, two in pairwise(order)} == {
        (one, two) for one in names for two in names if one != two
    }


def test_losses_that_differ_end_it() -> None:
    case = Case("t5-v1_1-small", "fp32", 8, 512, 114, threads=2, code="theirs")
    check_losses("theirs", case, [10.00005, 9.0005, 8.0], [10.0, 9.0, 8.0])
    with pytest.raises(SystemExit, match="before step 1 the loss of theirs"):
        check_losses("theirs", case, [10.001, 9.0, 8.0], [10.0, 9.0, 8.0])
    with pytest.raises(SystemExit, match="before step 3"):
        check_losses("theirs", case, [10.0, 9.0, float("nan")], [10.0, 9.0, 8.0])


def _row(contender: str, share: float, code: str, pure: bool = False) -> dict[str, Any]:
    return {
        "preset": "t5-v1_1-small", "precision": "bf16", "contender": contender, "code": code,
        "trains_differently": pure, "share_of_floor": share, "step_ms": 1000 / share, "tokens_per_s": 5000 * share,
    }  # fmt: skip


def test_the_table_says_who_wins() -> None:
    rows = [_row("floor", 1.0, "floor"), _row("ours", 0.8, "ours"), _row("Hugging Face eager", 0.5, "theirs")]
    assert {row["best_of_theirs"] for row in compared(rows)} == {"Hugging Face eager"}
    table = markdown(rows)
    assert "**0.80**" in table and "1.60" in table and "wins" not in table
    pure = _row("Hugging Face bf16 weights", 0.9, "theirs", pure=True)
    assert "Hugging Face bf16 weights is faster" in markdown([*rows, pure])
    table = markdown([*rows, _row("Hugging Face compiled", 0.85, "theirs")])
    assert "0.94, **Hugging Face compiled wins**" in table and "**0.85**" in table


@pytest.mark.slow
def test_both_sides_train_alike(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--preset", "t5-v1_1-small"]
    command += ["--contenders", "ours", "Hugging Face SDPA", "--batch", "1", "64", "16", "--rounds", "1"]
    subprocess.run([*command, "--output", str(output)], check=True)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["floor", "ours", "Hugging Face SDPA"] * 2


def test_the_readmes_tables_are_those_of_the_results() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("train_step", "train_step_loop"):
        lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert markdown([json.loads(line) for line in lines]) in page, f"{name}: README shows something else"
