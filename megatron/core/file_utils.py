"""Publishing files so that a crash at any instant leaves the old file or the new one, never a part; reading JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from megatron.core.errors import UserError, one_line


def partial_path(path: Path) -> Path:
    """Where the content of `path` is written before it is complete."""
    return path.with_name(path.name + ".partial")


def fsync_directory(directory: Path) -> None:
    """Make renames and removals in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make `directory`, and those above it that are missing, durably; nothing happens where it exists."""
    if not directory.is_dir():
        if directory.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        fsync_directory(directory.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to `path` and wait until it is on the disk; nothing is left there on an error."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def publish_bytes(path: Path, content: bytes) -> None:
    """Write `content` under the name `path`: temporary file, fsync, rename, fsync of the directory."""
    partial = partial_path(path)
    write_durably(partial, content)
    try:
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def replace_directory(source: Path, target: Path) -> None:
    """Rename the directory `source` to `target`, which is removed first if it exists."""
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
    fsync_directory(target.parent)


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        UserError: It cannot be read or is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {one_line(error)[:300]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found
