"""The benchmark of a GPU's step: it runs, contenders that fail cost their own row, and losses are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The scripts import each other by bare names.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_step import CONTENDERS, Budget, against_aims, agree, chosen, differences, markdown
from step_contender import Case

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("peers", [[], pytest.param(["Hugging Face SDPA"], marks=pytest.mark.slow)])
def test_it_runs_without_a_gpu(tmp_path: Path, peers: list[str]) -> None:
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), "--device", "cpu", "--tiny", "--rounds", "1"]
    command += ["--steps", "1", "--threads", "1", "--preset", "t5-v1_1-base", "--output", str(output)]
    command += ["--contenders", "ours", "ours compiled, flex", *peers]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = {row["contender"]: row for row in map(json.loads, output.read_text(encoding="utf-8").splitlines())}
    assert set(rows) == {"ours", "ours compiled, flex", *peers}
    assert "--attention-backend" in rows["ours compiled, flex"]["failed"]  # nothing for CPUs
    for name in ("ours", *peers):
        assert rows[name]["losses_agree"] and rows[name]["step_ms"] > 0 and rows[name]["microbatches"] == 2
    assert "best of ours is ours" in done.stdout


def test_losses_are_compared_by_the_arithmetic() -> None:
    found = differences([10.02, 9.02, 8.1], [10.0, 9.0, 8.0])
    assert found == pytest.approx([2e-3, 2.2e-3, 1.25e-2], rel=1e-1)
    assert agree(found, "fp8") and not agree(found, "bf16")
    assert agree([1e-4, 5e-3], "bf16") and not agree([1e-4, float("nan")], "bf16")


def test_contenders_are_chosen_by_name_or_part() -> None:
    assert chosen(["ours"]) == ["ours"]
    assert chosen([""]) == list(CONTENDERS)
    assert chosen(["fp8"]) == [name for name in CONTENDERS if "fp8" in name]


def test_the_step_stays_the_same_with_other_rows() -> None:
    base = Case("t5-v1_1-xl", "bf16", 8, 512, 114, threads=1, code="ours", microbatches=8)
    cases = [contender.of(base) for contender in CONTENDERS.values()]
    assert {case.step_rows for case in cases} == {64}
    assert {case.rows for case in cases} == {4, 8, 16}


def test_no_contender_begins_late() -> None:
    assert not Budget(None).is_spent() and not Budget(2.0).is_spent() and Budget(0.5).is_spent()
    budget = Budget(2.0)
    budget.took(300.0)
    assert budget.is_spent()


def _row(contender: str, code: str, speed: float, **fields: Any) -> dict[str, Any]:
    row = {
        "preset": "t5-v1_1-xl", "contender": contender, "code": code, "microbatches": 8, "batch": [8, 512, 114],
        "trains_differently": False, "fp8": False, "step_ms": 1e3 / speed, "share_of_floor": 0.5, "mfu": speed / 2e5,
        "tokens_per_s": speed, "tflops": 500.0, "peak_memory_gib": 60.0, "losses_agree": True,
        "loss_differences": [0.0],
    }  # fmt: skip
    return row | fields


def test_what_is_wanted_stands_beside_what_there_is() -> None:
    rows = [
        _row("ours compiled", "ours", 110000.0), _row("Hugging Face SDPA", "theirs", 55000.0),
        _row("Hugging Face bf16 weights compiled", "theirs", 1e6, trains_differently=True),
        _row("ours fp8 torchao compiled", "ours", 132000.0, fp8=True),
    ]  # fmt: skip
    text = against_aims("t5-v1_1-xl", rows)
    assert "MFU 55.0% (aim 55%)" in text and "2.00 x Hugging Face SDPA (aim 1.5)" in text
    assert "ours fp8 torchao compiled 1.20 x bf16 (aim 1.25)" in text
    rows[0] |= {"losses_agree": False, "loss_differences": [0.5]}
    assert against_aims("t5-v1_1-xl", rows) == "" and "differ: [0.5]" in markdown(rows)
    failed = {key: rows[1][key] for key in ("preset", "contender", "microbatches", "batch", "trains_differently")}
    assert "out of memory" in markdown([failed | {"failed": "out of memory"}])
