"""R3 in short: a few of the counted trials."""

import signal
from pathlib import Path

import pytest

from tests.reliability import signals
from tests.reliability.signals import Signals, Trial


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, byte_dataset: Path) -> Signals:
    return Signals(tmp_path_factory.mktemp("signals"), byte_dataset)


@pytest.mark.parametrize(
    "trial",
    [
        Trial("data", ("step",), signal.SIGTERM, target=1),
        Trial("data", ("step", "start-up"), signal.SIGINT, presses=2),
        Trial("data", ("evaluation",), signal.SIGUSR1),
        Trial("data", ("save",), signal.SIGTERM, flags=("--async-save",)),
    ],
    ids=str,
)
def test_a_signalled_run_saves_stops_and_continues(runs: Signals, trial: Trial) -> None:
    runs.run_trial(trial)


def test_without_save_the_status_tells_the_signal(runs: Signals, tmp_path: Path) -> None:
    trial, log = Trial("one", ("step",), signal.SIGUSR1), tmp_path / "log"
    statuses = runs.start_and_hit(trial, "step", [*signals.RUN, "--data-path", str(runs.data_path)], log)
    assert statuses == [128 + signal.SIGUSR1]
    assert "stopped after step 4: SIGUSR1; nothing was saved" in log.read_text()


def test_a_trial_that_goes_wrong_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    def run_trial(trial: str) -> None:
        if trial != "sound":
            raise AssertionError("status 1 instead of 0")

    row = signals.count_trials("signals", ["sound", "broken"], run_trial)
    assert (row["trials"], row["passed"], row["failures"]) == (2, 1, ["broken: status 1 instead of 0"])


@pytest.mark.slow
def test_all_trials() -> None:
    rows = signals.count()
    assert [row.get("failures") for row in rows] == [None] * len(rows)
