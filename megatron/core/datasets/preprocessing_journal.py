"""The journal of a preprocessing run: how far its unfinished files can be trusted after a crash.

`<prefix>.journal.partial` has a line for what is done, and one for each piece that is on the disk: where in the input
it ends, and how much of each output it covers. A line counts when it is whole, which its checksum tells. The journal
is also the lock of the output (output_lock.py).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from megatron.core.datasets.output_lock import journal_path, open_locked
from megatron.core.errors import UserError
from megatron.core.file_utils import fsync_directory

VERSION = 2
PUBLISHING = "publishing"


class Journal:
    """Keeps the files locked until `close`.

    Attributes:
        state: The last piece's entries; None: there is none.

    Raises:
        UserError: another process writes to this output, or `resume` is asked for after another run.
    """

    def __init__(self, prefixes: list[Path], run: dict[str, Any], resume: bool) -> None:
        """Open the journals of all outputs; the first of them is written.

        Args:
            prefixes: Of the outputs of this run.
            run: What decides on the bytes of the output, by the flag that it is known by; JSON values.
            resume: Go on after the last piece of an earlier run, if there is one.
        """
        self._paths = [journal_path(prefix) for prefix in prefixes]
        self._files: list[BinaryIO] = []
        self.state: dict[str, Any] | None = None
        try:
            for path in self._paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files.append(open_locked(path))
            self._start(run, resume)
        except BaseException:
            self.close()
            raise

    def _start(self, run: dict[str, Any], resume: bool) -> None:
        file = self._files[0]
        run = json.loads(json.dumps({"version": VERSION, **run}))
        if resume:
            file.seek(0)
            entries, size = _read(file)
            if len(entries) > 1:
                for flag, value in run.items():
                    if entries[0].get(flag) != value:
                        raise UserError(
                            f"--resume: {self._paths[0]} is of a run with another {flag}; give the same flags and "
                            "files as there, or start over without --resume"
                        )
                for path in self._paths[1:]:
                    if path.stat().st_size:
                        raise UserError(f"--resume: another run has begun to write {path}; start over without --resume")
                file.truncate(size)
                self.state = entries[-1]
                return
        for each in self._files:
            each.truncate(0)
        self._append(run)

    def add(self, state: dict[str, Any]) -> None:
        """Note a piece that is on the disk, durably."""
        self._append(state)
        self.state = state

    def _append(self, entry: dict[str, Any]) -> None:
        content = json.dumps(entry).encode()
        self._files[0].write(b"%08x %s\n" % (zlib.crc32(content), content))
        self._files[0].flush()
        os.fsync(self._files[0].fileno())

    def remove(self) -> None:
        """Remove the journal: everything is published, or nothing is left to go on with."""
        for path in reversed(self._paths):  # the one that can be gone on with is the last to go
            path.unlink(missing_ok=True)
        for directory in {path.parent for path in self._paths}:
            fsync_directory(directory)

    def close(self) -> None:
        """Give the locks back."""
        for file in self._files:
            file.close()


def is_publishing(prefix: Path) -> bool:
    """Whether a run ended while it renamed its finished files, which only has to be done again."""
    try:
        with journal_path(prefix).open("rb") as file:
            entries, _ = _read(file)
    except FileNotFoundError:
        return False
    return bool(entries) and PUBLISHING in entries[-1]


def _read(file: Iterable[bytes]) -> tuple[list[dict[str, Any]], int]:
    """First and last whole entry (one alone counts as first), and the bytes up to the end of the last."""
    entries: list[dict[str, Any]] = []
    size = 0
    for line in file:
        checksum, _, content = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content):
            break
        entries = [*entries[:1], json.loads(content)]
        size += len(line)
    return entries, size
