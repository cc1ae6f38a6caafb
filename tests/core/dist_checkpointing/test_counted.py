"""Quick versions of the counted reliability tests of checkpoints: some trials of each kind. Slow: all of them."""

import subprocess
from collections import deque

import pytest

from tests.reliability import bit_flips, forged_checkpoints, full_disk, malicious, power_loss, retention
from tests.reliability.crash_points import CrashPoints, Variant
from tests.reliability.small_checkpoints import count_trials
from tests.reliability.system_calls import why_unavailable

traced = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")


def pass_all(trials, least):
    row = count_trials("", "", trials)
    assert row["passed"] == row["trials"] >= least, row


def made(folder):
    folder.mkdir()
    return folder


@traced
@pytest.mark.parametrize(
    "variant", [Variant("retention, untidy", 1, True), Variant("same iteration again", 2, False)], ids=str
)
def test_crash_points(tmp_path, variant):
    pass_all(list(CrashPoints(made(tmp_path / "trials"), variant).trials())[::7], least=4)


@traced
def test_power_loss(tmp_path):
    pass_all(list(power_loss.trials(tmp_path / "trials", Variant("same iteration again", 1, False)))[::4], least=5)


@traced
def test_the_model_of_power_loss_misses_fsync(tmp_path):
    """A disk that ignores fsync loses checkpoints: the model would see it if a save left one out."""
    trials = power_loss.trials(tmp_path / "trials", Variant("later save", 1, False), ignored=("fsync",))
    _, last = deque(trials, maxlen=1).pop()
    with pytest.raises(AssertionError):
        last()


@traced
def test_failing_calls(tmp_path):
    pass_all(list(full_disk.failing_calls(tmp_path / "trials", Variant("later save", 1, True)))[::8], least=5)


def test_full_disk(tmp_path):
    try:
        with full_disk.small_disk(tmp_path / "probe", 2**20):
            pass
    except (PermissionError, FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    pass_all([t for t in full_disk.conditions(tmp_path) if t[0].startswith(("FullDisk, 1", "ReadOnly, 2"))], least=4)


def test_bit_flips_and_damage(tmp_path):
    path = bit_flips.save_two(tmp_path / "root")
    pass_all([*bit_flips.flips(path, 9, seed=1), *bit_flips.damages(path)], least=20)


def test_forged_checkpoints(tmp_path):
    pass_all(list(forged_checkpoints.trials(tmp_path))[::5], least=15)


def test_planted_pickles(tmp_path):
    names = ["front of a shard, checksum forged", "save/iter_0000002/manifest.json"]
    pass_all(malicious.trials(tmp_path, names, ["torch.save"]), least=2)


def test_retention():
    row = retention.watch(ranks=1, asynchronous=True, saves=8)
    assert row["passed"] == row["trials"] > 0, row


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("module", [power_loss, full_disk, malicious, bit_flips, retention])
def test_counted(module):
    for row in module.count():
        assert row["passed"] == row["trials"] > 0, row
