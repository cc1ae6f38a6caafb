"""The table at the end of the UL2 example."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples/ul2/losses.py"


def test_losses_by_denoiser(tmp_path: Path) -> None:
    evaluations: list[dict[str, float | None]] = [
        {"iteration": 1, "lm_loss": 9.0},
        {
            "iteration": 1,
            "validation_lm_loss": 7.0,
            "validation_lm_loss/span-3-0.15": 6.5,
            "validation_noise_lm_loss": 8,
        },
        {"iteration": 20, "validation_lm_loss": 5.0, "validation_lm_loss/prefix-0.25": None},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    shown = subprocess.run([sys.executable, PROGRAM, path], capture_output=True, text=True, check=True).stdout
    assert [line.split() for line in shown.splitlines()] == [
        ["step", "1", "20"], ["all", "7.000", "5.000"], ["span-3-0.15", "6.500", "-"], ["prefix-0.25", "-", "-"],
    ]  # fmt: skip
    missing = subprocess.run([sys.executable, PROGRAM, tmp_path / "no"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
