"""R14 in short: three of the counted trials."""

from pathlib import Path

import pytest

from tests.reliability.mismatch import OTHER_DATA, Trial, count, make_data, run_trial


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("two_datasets"))


@pytest.mark.parametrize("difference", ["--tensor-model-parallel-size 2", f"--data-path {OTHER_DATA}", "version=0.0.1"])
def test_a_rank_that_was_started_differently_is_refused(difference: str, data: tuple[Path, Path]) -> None:
    run_trial(Trial(2, difference), data)


@pytest.mark.slow
def test_all_trials() -> None:
    (row,) = count()
    assert row["passed"] == row["trials"], row["failures"]
