"""Copies of large files that cost as little as the file system allows: hard links, shared blocks, or the bytes."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Literal

_FICLONE = 0x40049409  # ioctl: let this file share all blocks of another one (Btrfs, XFS, bcachefs and others)
_PIECE_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 22
_UNABLE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EMLINK}

Way = Literal["linked", "reflinked", "copied"]


def link_or_copy(source: Path, target: Path) -> Way:
    """Give the content of `source` the name `target`, which is new: a hard link, else shared blocks, else a copy.

    A hard link is the same file: whoever changes one in place changes both. Returns which of them it became.

    Raises:
        OSError: the file cannot be read or written.
    """
    try:
        os.link(source.resolve(), target)
        return "linked"
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    with source.open("rb") as reading, target.open("xb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
            return "reflinked"
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
    copy_range(source, target, 0)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return "copied"


def copy_range(source: Path, target: Path, offset: int) -> None:
    """Copy all of `source` into the file `target` from byte `offset` on.

    The kernel does it where it can, and shares blocks where the file system and the alignment allow that.

    Raises:
        OSError: the files cannot be read or written.
    """
    with source.open("rb", buffering=0) as reading, target.open("r+b", buffering=0) as writing:
        done, in_kernel = 0, True
        writing.seek(offset)
        while True:
            if in_kernel:
                try:
                    count = os.copy_file_range(reading.fileno(), writing.fileno(), _PIECE_BYTES)
                except OSError as error:
                    if error.errno not in _UNABLE:
                        raise
                    in_kernel = False
                    continue
                if count == 0 and done == 0:  # some kernels report the end of what they cannot copy
                    in_kernel = False
                    continue
            else:
                block = memoryview(reading.read(_BUFFER_BYTES))
                count = len(block)
                while block:
                    block = block[writing.write(block) :]
            if count == 0:
                return
            done += count
