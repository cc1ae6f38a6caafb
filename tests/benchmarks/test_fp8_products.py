"""The benchmark of linear products in FP8 runs, and says how far each contender is from fp32."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

# The scripts import each other by bare names.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from fp8_products import BASELINE, measure, timed_rows

from megatron.core.extensions import packages


def test_it_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # which takes longer than all the rest
    output = tmp_path / "rows.jsonl"
    measure(Namespace(device="cpu", tiny=True, tokens=64, rounds=2, output=output))
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    by_name = {row["contender"]: row for row in rows if row["kind"] == "product"}
    assert by_name[BASELINE]["ratio_to_bf16"] == 1.0 and by_name[BASELINE]["error"] < 0.01
    assert by_name["bf16, cast before"]["weight_gradient_error"] < 1e-5
    assert any(row["kind"] == "accumulation" for row in rows)
    if packages.installed("torchao"):
        assert 0.01 < by_name["torchao hybrid compiled"]["error"] < 0.06
        assert by_name["torchao hybrid, bf16 weight gradients compiled"]["weight_gradient_error"] < 0.01


def test_a_contender_that_fails_costs_its_own_row(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise RuntimeError("no kernel")

    runs = {"works": lambda: None, "fails": fails}
    rows = timed_rows("product", runs, "works", 1, 2, torch.device("cpu"))
    assert [row["contender"] for row in rows] == ["works"]
    assert "fails failed: RuntimeError: no kernel" in capsys.readouterr().out
