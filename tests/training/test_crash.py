"""Quick versions of the counted kills and of the soak test."""

import json
import random
from pathlib import Path

import pytest

from tests.reliability import kills, soak
from tests.reliability.__main__ import COUNTED
from tests.reliability.kills import Trial, run_trials
from tests.reliability.table import TITLES, render, summarize

SEED = 1
QUICK = (
    Trial(1, "one process", asynchronous=False, aimed=True, real=False, rank=None),
    Trial(2, "one process", asynchronous=True, aimed=False, real=False, rank=None),
    Trial(3, "one process", asynchronous=True, aimed=True, real=False, rank=None),
    Trial(4, "DP2", asynchronous=False, aimed=True, real=False, rank=1),
    Trial(5, "DP2", asynchronous=True, aimed=True, real=False, rank=None),
    Trial(6, "DP2", asynchronous=True, aimed=False, real=False, rank=0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trials write; the uninterrupted runs stay there."""
    return tmp_path_factory.mktemp("kills")


def test_killed_runs_end_as_the_uninterrupted_one(folder: Path) -> None:
    results = dict(run_trials(QUICK, folder, SEED))
    assert list(results) == list(QUICK)
    for trial, result in results.items():
        assert result.failure is None, result.failure
        assert result.landed != "nothing" and (trial.rank is None or -9 in result.statuses), (trial, result)


def test_a_run_that_differs_is_noticed(folder: Path) -> None:
    """One bit of a shard, one digit of a loss, one sample of the progress."""
    save = next(path for path in folder.iterdir() if path.name.startswith("reference_") and path.is_dir())
    expected = kills.outcome(save)
    assert kills.difference(kills.outcome(save), expected) is None
    assert len([value for value in expected["values"] if value[1] == "lm_loss"]) == kills.STEPS
    checkpoint = save / expected["checkpoint"]
    shard = next(checkpoint.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    metrics = save / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[3]["lm_loss"] *= 1 + 1e-15
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["progress"]["consumed_samples"] += 1
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    difference = kills.difference(kills.outcome(save), expected)
    assert difference is not None and difference.startswith("files and progress and values differ")


def test_trials_are_half_aimed_and_go_through_everything() -> None:
    trials = [Trial.of(number, seed=7) for number in range(200)]
    assert sum(trial.aimed for trial in trials) == sum(trial.asynchronous for trial in trials) == 100
    assert sum(trial.real for trial in trials) == 20
    assert {(t.layout, t.asynchronous, t.aimed, t.rank is None) for t in trials if not t.real} == {
        (layout, asynchronous, aimed, whole)
        for layout, (ranks, _) in kills.LAYOUTS.items()
        for asynchronous in (False, True)
        for aimed in (False, True)
        for whole in ((True,) if ranks == 1 else (False, True))
    }
    assert trials == [Trial.of(number, seed=7) for number in range(200)]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_kills() -> None:
    for row in kills.count():
        assert row["passed"] == row["trials"], row["failures"]


def test_a_short_run_uses_no_more_as_it_goes_on(tmp_path: Path) -> None:
    row = soak.soak(1, 200, tmp_path, real=False)
    assert row["passed"] == 1, row


def test_growth_is_the_rise_of_the_second_half() -> None:
    chance = random.Random(0)
    noise = [soak.Sample(float(second), 100.0 + chance.uniform(-1, 1), 10, 3, 8) for second in range(1000)]
    assert abs(soak.growth(noise, "rss_mib")) < 0.5
    leak = [soak.Sample(s.seconds, s.rss_mib + s.seconds / 50, 10, 3, 8) for s in noise]
    assert soak.growth(leak, "rss_mib") == pytest.approx(10.0, abs=0.5)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_soak() -> None:
    for row in soak.count():
        assert row["passed"] == row["trials"], row["failures"]


def test_rows_become_a_table() -> None:
    row = {"test": "R2", "what": "a", "trials": 3, "passed": 2, "seconds": 250.0, "date": "D", "torch": "T"}
    row["commit"] = "C"
    lines = [json.dumps(row), json.dumps(row | {"test": "R1", "seconds": 9.6}), json.dumps(row | {"passed": 3})]
    assert render(lines).splitlines()[2:] == [
        "| R1 | a | 2 of 3 | 10 s | D, torch T, C |",
        "| R2 | a | 3 of 3 | 4 min | D, torch T, C |",
    ]
    assert summarize(lines).splitlines()[2:] == [
        f"| R1 | {TITLES['R1']} | 2 of 3 |",
        f"| R2 | {TITLES['R2']} | 3 of 3 |",
    ]


def test_every_counted_test_has_a_title() -> None:
    assert TITLES.keys() == COUNTED.keys()
