"""R13 in short: two of the counted trials."""

from pathlib import Path

import pytest

from tests.reliability.hangs import Trial, all_trials, count, run_trial


@pytest.mark.parametrize("trial", [Trial(2, "hang", "step", 1), Trial(2, "raise", "evaluation", 0)], ids=str)
def test_a_rank_that_fails_ends_the_job(trial: Trial, byte_dataset: Path) -> None:
    run_trial(trial, byte_dataset)


@pytest.mark.slow
def test_all_trials() -> None:
    (row,) = count(len(all_trials()))
    assert row["passed"] == row["trials"], row["failures"]
