"""torchrun starts a job again that a rank of it has ended, and the run comes to the same end."""

from pathlib import Path

import pytest

from tests.reliability.elastic import FAULTS, restarted


@pytest.mark.parametrize(
    "fault", [fault if fault == "kill" else pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS]
)
def test_a_restarted_job_continues(fault: str, byte_dataset: Path, tmp_path: Path) -> None:
    restarted(fault, tmp_path, byte_dataset)
