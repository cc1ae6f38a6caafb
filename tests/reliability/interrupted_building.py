"""R3 while a dataset is built: `tools/preprocess_data.py` is signalled amid its input and leaves nothing unfinished."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (b"text " * 2000 + b"\n") * 750  # several chunks for the workers


def members(group: int) -> list[int]:
    """Processes of a process group that are no zombies."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(file.parent.name))
    return found


class Builds:
    """Runs trials in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "building"
        self.folder.mkdir()
        self.text = self.folder / "whole.txt"
        self.text.write_bytes(TEXT[: 1 << 20])
        self.expected = self._build("uninterrupted")

    def _start(self, source: Path, prefix: Path) -> subprocess.Popen[bytes]:
        flags = ["--input", str(source), "--output-prefix", str(prefix), "--tokenizer-type", "ByteTokenizer"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *flags, "--workers", "2"],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def _build(self, name: str) -> list[bytes]:
        """Bytes of the dataset of the whole text."""
        process = self._start(self.text, self.folder / name)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 0, errors.decode()
        return [self.folder.joinpath(f"{name}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")]

    def run_trial(self, trial: tuple[signal.Signals, bool, int]) -> None:
        """Raises `AssertionError` when something is left, or the same build afterwards makes something else."""
        number, to_all, presses = trial
        name = f"{number.name}_{to_all}_{presses}"
        pipe = self.folder / "pipe.txt"
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        process = self._start(pipe, self.folder / name)
        with pipe.open("wb") as writer:
            writer.write(TEXT)
            time.sleep(0.5)  # until the program waits for more
            for _ in range(presses):
                (os.killpg if to_all else os.kill)(process.pid, number)
                time.sleep(0.1)
            errors = process.communicate(timeout=30)[1].decode()
        assert process.returncode == 128 + number, f"status {process.returncode}: {errors}"
        left = [path.name for path in self.folder.iterdir() if path.name.startswith(name)]
        assert not left, f"left: {', '.join(left)}"
        deadline = time.monotonic() + 10  # multiprocessing's helpers see that the program has gone, and go
        while running := members(process.pid):
            assert time.monotonic() < deadline, f"still running: {running}"
            time.sleep(0.05)
        assert self._build(name) == self.expected, "the same build makes something else afterwards"


def building_trials() -> list[tuple[signal.Signals, bool, int]]:
    """Signal, whether the workers get it too, how often it is sent."""
    return list(itertools.product((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), (False, True), (1, 2)))
