"""One writer at a time for the files of an output, whichever program it is.

The lock is on `<prefix>.journal.partial`, in which preprocessing also notes what it has done
(preprocessing_journal.py). A shard has the lock of its corpus, whose writer makes all of them.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron.core.errors import UserError
from megatron.core.file_utils import is_at

_SHARD = re.compile(r"-\d{5}$")  # what `shard_prefix` appends


def journal_path(prefix: str | Path) -> Path:
    """The journal and lock of the dataset or sharded corpus `prefix`, and of the corpus that it is a shard of."""
    return Path(f"{_SHARD.sub('', str(prefix))}.journal.partial")


class OutputLock:
    """The lock of a prefix, from the start until `release`.

    Raises:
        UserError: another process has it.
    """

    def __init__(self, prefix: str | Path) -> None:
        self._path = journal_path(prefix)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_locked(self._path)
        self._is_ours = os.fstat(self._file.fileno()).st_size == 0  # and no journal of a run that can be gone on with

    def take_over(self) -> None:
        """Note that other unfinished files of this prefix are not to be gone on with: they will be replaced."""
        self._is_ours = True
        self._file.truncate(0)
        self._file.write(b"another writer has begun\n")  # no line of a journal
        self._file.flush()

    def release(self) -> None:
        """Give the lock back; nothing to do a second time."""
        if not self._file.closed:
            if self._is_ours:
                self._path.unlink(missing_ok=True)
            self._file.close()


@contextmanager
def output_locked(prefix: str | Path) -> Iterator[OutputLock]:
    """The lock of a prefix until the block is left.

    Raises:
        UserError: another process has it.
    """
    lock = OutputLock(prefix)
    try:
        yield lock
    finally:
        lock.release()


def open_locked(path: Path) -> BinaryIO:
    """Open an unfinished file to append to it, locked against other processes until it is closed.

    Raises:
        UserError: another process has it.
    """
    busy = UserError(f"{path} is being written by another process; wait for it to end")
    file: BinaryIO = path.open("a+b")
    try:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # Some network file systems have no locks; two writers there are the user's to avoid.
        # Between our open and the lock the other writer may have finished: the file is then published, or gone.
        if not is_at(file, path):
            raise busy
    except BaseException:
        file.close()
        raise
    return file
