"""What our Triton kernels need of a GPU, by compiling them, which needs none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
# Bytes of a program on A100 and on H100; a few spilled registers outside of loops cost nothing.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
SPILLED_BYTES = 64


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Rows of the benchmark."""
    output = folder / "rows.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks/kernel_resources.py"), "--output", str(output), *options]
    subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, check=True, capture_output=True)
    return [json.loads(line) for line in output.read_text().splitlines()]


def check(rows: list[dict[str, Any]]) -> None:
    """They fit, and use the matrix units of the architecture."""
    assert rows
    for row in rows:
        case = {key: row[key] for key in ("kernel", "capability", "dtype", "head_dim", "variant")}
        assert row["shared_bytes"] <= SHARED_BYTES[row["capability"]], case
        assert row["stack_bytes"] <= SPILLED_BYTES, case
        if row["dtype"] == "bf16" and row["tile"]:
            assert row["instructions"].get("HGMMA" if row["capability"] == 90 else "HMMA"), case
        assert not {"ATOM", "RED"} & set(row["instructions"]), case  # sums are in a fixed order


def test_common_shape_on_hopper(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--capability", "90", "--head-dim", "64", "--variant", "bias")
    assert len(rows) == 5
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_table_fits(capability: str, tmp_path: Path) -> None:
    check(
        compiled(
            tmp_path, "--capability", capability, "--head-dim", "64", "128", "--variant", "plain", "bias", "causal"
        )
    )


@pytest.mark.slow
def test_segments_and_dropout_fit_on_ampere(tmp_path: Path) -> None:
    """But for the bias's kernel, which computes near tiles only."""
    rows = compiled(tmp_path, "--capability", "80", "--head-dim", "64", "128", "--variant", "packed")
    check([row for row in rows if row["kernel"] != "attention_bias_gradient"])
