"""R5: NaN and Inf are skipped by all ranks alike, and a run that makes nothing else stops."""

import math
from pathlib import Path

import pytest

from megatron.core.distributed import gradients
from megatron.training import training
from tests.layouts.layout import Layout
from tests.reliability.numerical_faults import LAYOUTS, Trial, count, run_all
from tests.training.test_pretrain import TINY, run_here

ONE, _, SHARDED, TENSOR, _, PIPELINE = (layout for layout, _ in LAYOUTS)


@pytest.mark.parametrize(
    "trials",
    [
        [Trial(ONE, 0, "loss", math.inf, False), Trial(ONE, 0, "microbatch", math.nan, False)],
        [Trial(ONE, 0, "gradient", math.nan, True)],
        [Trial(SHARDED, 1, "gradient", -math.inf, False), Trial(TENSOR, 1, "loss", math.nan, False)],
        [Trial(PIPELINE, 0, "loss", math.nan, True)],
    ],
    ids=["one process", "one process, endless", "two ranks", "two ranks, endless"],
)
def test_faults_are_skipped_by_all_ranks(byte_dataset: Path, tmp_path: Path, trials: list[Trial]) -> None:
    assert run_all(trials, tmp_path, byte_dataset) == []


def test_a_fault_that_is_not_noticed_is_a_failure(
    byte_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm of the gradients alone, which knows nothing of the loss."""
    monkeypatch.setattr(training, "measure_gradients", lambda *arguments: gradients.measure_gradients(*arguments[:3]))
    (failure,) = run_all([Trial(Layout(), 0, "loss", math.nan, False)], tmp_path, byte_dataset)
    assert failure.startswith("one process, microbatches: nan in the loss on rank 0: ")


def test_a_run_that_diverges_ends_with_status_4(byte_dataset: Path, tmp_path: Path) -> None:
    flags = ["--data-path", str(byte_dataset), "--train-iters", "20", "--max-consecutive-skips", "2", "--lr", "1e30"]
    result = run_here([*TINY, *flags, "--save", str(tmp_path / "save")])
    assert result.returncode == 4, result
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "--max-consecutive-skips 2" in line
    assert not (tmp_path / "save" / "finished").exists()
    assert not list((tmp_path / "save").glob("iter_*"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_fault_on_every_layout() -> None:
    for row in count():
        assert row["passed"] == row["trials"], row
