"""A lock for what several processes may want to make at the same time: one makes it, the others wait."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron.core.file_utils import is_at

FIRST_MESSAGE_AFTER_S = 5.0
SECONDS_BETWEEN_MESSAGES = 60.0
SECONDS_BETWEEN_LOOKS = 0.5  # at most; at first they follow each other quickly


@contextmanager
def locked(target: Path, log: TextIO | None = None) -> Iterator[bool]:
    """One process at a time in the block, of all that name the same `target`; says whether that is so.

    The system gives the lock of a process that ends free. Where a file system has no locks the answer is False at once;
    where it has them for each machine alone (some mounts of NFS and Lustre), processes of other machines come in beside
    this one. So whatever is made must have a name of its own until it is published, and several may publish.

    Args:
        target: What is made; `<target>.lock` lies beside it meanwhile.
        log: Where lines about a long wait go; stderr by default.

    Raises:
        OSError: the lock's file cannot be made.
    """
    path = target.with_name(target.name + ".lock")
    while True:
        with path.open("a+") as file:
            held = _wait_for_lock(file, path, log or sys.stderr)
            if held and not is_at(file, path):
                continue  # whoever had the lock has removed it, and others may have a new one
            if held:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            try:
                yield held
            finally:
                path.unlink(missing_ok=True)
            return


def _wait_for_lock(file: TextIO, path: Path, log: TextIO) -> bool:
    """Take the lock; False where there are none.

    The process looks again and again instead of waiting in the system, where no signal could be handled.
    """
    start = time.monotonic()
    next_message, pause = FIRST_MESSAGE_AFTER_S, 1e-3
    while True:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return False
        else:
            return True
        waited = time.monotonic() - start
        if waited >= next_message:
            next_message = waited + SECONDS_BETWEEN_MESSAGES
            file.seek(0)
            holder = file.read() or "another process"
            print(f"waiting for {holder}, which makes {path.name.removesuffix('.lock')}", file=log, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, SECONDS_BETWEEN_LOOKS)
