"""The comparison of training in bf16 and in fp32: curves, noise, runs that go on."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

# The scripts import each other by bare names.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import convergence
from convergence import compared, rows_of, run_directory, smoothed

ROOT = Path(__file__).resolve().parents[2]


def test_curves_are_means_over_fifty_steps() -> None:
    reports = [{"iteration": end, "lm_loss": loss} for end, loss in ((30, 2.0), (50, 4.0), (90, 1.0), (100, 6.0))]
    assert smoothed(reports) == pytest.approx({50: 2.8, 100: 2.0})
    assert smoothed(reports[:3]) == pytest.approx({50: 2.8}), "a window that is not full is no point of the curve"
    reports[1]["lm_loss"] = None
    assert smoothed(reports) == pytest.approx({50: 2.0, 100: 2.0})


def test_the_second_half_is_compared() -> None:
    found = compared({50: 9.0, 100: 3.0, 150: 2.5, 200: 1.5}, {50: 1.0, 100: 2.0, 150: 2.0, 200: 2.0})
    assert found == {"mean_difference": 0.0, "mean_absolute_difference": 0.5, "largest_difference": 0.5}


def _write_run(runs: Path, name: str, loss: float, steps: int = 200) -> None:
    save = run_directory(runs, name)
    save.mkdir(parents=True)
    fields = {"skipped_iterations": 0, "step_time_ms": 5.0, "tokens_per_s": 1e3, "mfu": None, "memory_gib": 1.0}
    rows = [{"iteration": end, "lm_loss": loss} | fields for end in range(10, steps + 1, 10)]
    (save / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (save / "finished").write_text("", encoding="utf-8")


def test_differences_are_measured_in_noise(tmp_path: Path) -> None:
    names = ["fp32", "fp32, other rounding", "bf16", "fp8 torchao"]  # the last: half a percent off
    assert rows_of(tmp_path, names) == []
    for name, loss in zip(names, (2.0, 2.004, 1.994, 2.01), strict=True):
        _write_run(tmp_path, name, loss)
    rows = {row["contender"]: row for row in rows_of(tmp_path, names)}
    assert rows["bf16"]["difference_to_noise"] == pytest.approx(1.5) and rows["bf16"]["within_noise"]
    assert rows["bf16"]["mean_difference"] == pytest.approx(-0.006)
    assert not rows["fp8 torchao"]["within_noise"]
    assert rows["fp8 torchao"]["difference_to_loss"] == pytest.approx(0.005)


def test_runs_stop_in_time_and_go_on(byte_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(
        runs=tmp_path, data_path=str(byte_dataset), steps=60, seed=1, rows=2, lr=1e-2, preset="t5-v1_1-base", length=64,
        tiny=True,
    )  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not convergence.train("bf16", options, 1e-6)
    assert convergence.train("bf16", options, None)
    assert list(smoothed(convergence.metrics(run_directory(tmp_path, "bf16")))) == [50]


@pytest.mark.slow
def test_it_runs_without_a_gpu(byte_dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "convergence.py"), "--device", "cpu", "--tiny", "--steps"]
    command += ["200", "--length", "64", "--data-path", str(byte_dataset), "--runs", str(tmp_path / "runs")]
    subprocess.run([*command, "--output", str(output)], check=True)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["contender"] for row in rows] == ["fp32", "bf16", "fp32, other rounding"]
    assert all(row["difference_to_loss"] < 0.005 and row["nonfinite_steps"] == 0 for row in rows)
