"""R4, R8, R10 and R11: damaged datasets, concurrent builds, malformed text, any number of workers."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.reliability import concurrent_preprocessing, damaged_datasets, malformed_text, preprocessing_workers
from tests.reliability.malformed_text import case_trial, cases, check_skip, check_stop


def all_passed(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["passed"] == row["trials"] > 0, row


@pytest.mark.parametrize("count", [damaged_datasets.count, concurrent_preprocessing.count])
def test_quick(count: Callable[..., list[dict[str, Any]]]) -> None:
    all_passed(count(trials=2))


@pytest.mark.parametrize("check", [check_stop, check_skip])
def test_malformed_text(check: Any) -> None:
    """Each case of a short file."""
    for case in cases():
        if len(case.content) < 1000:
            assert case_trial(case, check) == "passed", case


def test_a_dataset_that_is_not_refused_is_a_failure() -> None:
    rows = [damaged_datasets.row("", [("name", outcome)], damaged_datasets.refused) for outcome in ("read: x", "died")]
    assert [row["failures"] for row in rows] == [["name: read: x"], ["name: died"]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", [damaged_datasets, concurrent_preprocessing, malformed_text, preprocessing_workers])
def test_counted(part: Any) -> None:
    all_passed(part.count())
