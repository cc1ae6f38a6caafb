"""The benchmark of attention: its contenders compute the same, and its rows and tables come out, failures included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

# The scripts import each other by bare names.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from attention_contenders import BUCKETS, Problem, Shape, errors, make_diagonals, make_inputs
from attention_table import markdown

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, for its interpreter")


def run(folder: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """Rows and tables of the script in Triton's interpreter."""
    output = folder / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks/attention.py"), "--device", "cpu", "--tiny", "--rounds", "1"]
    result = subprocess.run(
        [*command, "--output", str(output), *options],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [json.loads(line) for line in output.read_text().splitlines()], result.stdout


@pytest.mark.parametrize("causal", [False, True])
def test_errors_are_of_the_bucket_table(causal: bool) -> None:
    shape = Shape(2, 3, 24, 8, causal, torch.float32)
    diagonals = make_diagonals(shape, CPU)
    problem = Problem("sdpa", shape, [make_inputs(shape, CPU, 0)], diagonals)
    found = errors(problem, diagonals)
    assert list(found) == ["output", "query", "key", "value", "bias"] and max(found.values()) < 1e-5
    gradients = [torch.ones(3, 47), torch.ones(1, 3, 24, 24)]
    tables = [problem.table_gradient(gradient) for gradient in gradients]
    assert [float(table.sum()) for table in tables] == [3 * 47, 3 * 24 * 24] and tables[0].shape == (3, BUCKETS)


def test_flops_count_half_if_causal() -> None:
    assert Shape(2, 3, 24, 8, False).flops(backward=False) == 4 * 2 * 3 * 24 * 24 * 8
    assert Shape(2, 3, 24, 8, True).flops(backward=True) == 7 * 2 * 3 * 24 * 24 * 8


@needs_triton
def test_rows_and_tables(tmp_path: Path) -> None:
    rows, printed = run(tmp_path, "--contenders", "triton", "sdpa", "flex")
    timed = [row for row in rows if "ms" in row]
    passes = ("forward", "forward_backward")
    assert [(row["pass"], row["contender"]) for row in timed] == list(product(passes, ("triton", "sdpa")))
    assert all(error < 1e-5 for row in timed for error in row["error"].values())
    # FlexAttention has no backward pass on CPUs, and the others go on.
    failed = [row for row in rows if "error_message" in row]
    assert [row["contender"] for row in failed] == ["flex"] and "does not support backward" in printed
    assert "| 16, 20, causal |" in printed and markdown(rows) in printed


@needs_triton
def test_variants(tmp_path: Path) -> None:
    rows, printed = run(tmp_path, "--variants")
    assert all("ms" in row for row in rows)
    kernels = [row["kernel"] for row in rows if row["of_table"]]
    assert kernels == ["forward", "queries", "keys", "bias"] and len(rows) > len(kernels)
    assert all(f"| {kernel} | 16, 20 |" in printed for kernel in kernels)
