"""The elementwise Triton kernels compile for a GPU without one: no spilled registers, and the widest loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kernels_compile_well(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compiled_elementwise"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {
        "gated", "gated_gradient", "rms_norm", "rms_norm_gradient", "softmax_statistics", "logits_gradient",
    }  # fmt: skip
    for row in rows:
        assert row["stack_bytes"] == 0 and row["widest_load_bits"] == 128, row
