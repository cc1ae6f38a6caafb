"""The benchmark of the elementwise kernels runs, and its contenders compute the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_operation_has_a_row_of_every_contender(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "elementwise.py"), "--device", "cpu", "--tiny"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([*command, "--dtypes", "float32", "--output", str(output)], check=True, env=environment)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["contender"] for row in rows} == {"cpu", "triton", "torch eager"}
    assert len(rows) == 3 * 10 and len({row["operation"] for row in rows}) == 10
    assert all(row["ms"] > 0 and row["gb_per_s"] >= 0 for row in rows)
