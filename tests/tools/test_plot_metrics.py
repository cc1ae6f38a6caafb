"""`tools/plot_metrics.py` as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
TOOL = Path(__file__).parents[2] / "tools/plot_metrics.py"
ROWS = b"""{"iteration": 1, "lm_loss": 6.0}
{"iteration": 2, "lm_loss": null}
{"iteration": 2, "validation_lm_loss": 5.0}
"""


def plot(metrics: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--output", str(output), str(metrics)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_picture_of_a_run_that_still_writes(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(ROWS + b'{"iteration": 3, "lm_l')
    result = plot(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        (None, "loss.png", "No such file"),
        (b"\xe5\xff\n", "loss.png", "is not a metrics file"),
        (b"[1]\n", "loss.png", "is not a metrics file"),
        (b"", "loss.png", "holds no losses yet"),
        (ROWS, "nowhere/loss.png", "No such file"),
        (ROWS, "loss.xyz", "not supported"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, content: bytes | None, output: str, message: str) -> None:
    if content is not None:
        (tmp_path / "m.jsonl").write_bytes(content)
    result = plot(tmp_path / "m.jsonl", tmp_path / output)
    assert result.returncode == 1
    assert message in result.stderr and result.stderr.count("\n") == 1
