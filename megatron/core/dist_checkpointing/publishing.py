"""How checkpoints come and go under their names: publishing, replacing, retention, and what crashes left.

All of it is done by one process, the main rank of the run that saves. A run that only loads removes nothing: what looks
like rubbish to it may be a save of the run that writes there.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megatron.core.dist_checkpointing.format import checkpoint_path, looks_sound
from megatron.core.file_utils import fsync_directory

logger = logging.getLogger(__name__)

_ITERATION = re.compile(r"iter_(\d{7,})(\.replaced)?")
_TEMPORARY = re.compile(r"iter_\d{7,}\.tmp-[0-9a-f]+")


def _published(root: Path) -> Iterator[tuple[int, bool, Path]]:
    """Checkpoint directories under `root`: (iteration, whether it is the current version, path)."""
    for path in root.iterdir() if root.is_dir() else ():
        match = _ITERATION.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), match[2] is None, path


def published_checkpoints(root: Path, iteration: int | None = None) -> list[Path]:
    """Checkpoint directories under `root`, sound or not, the newest first; only those of `iteration` if it is given."""
    return [path for number, _, path in sorted(_published(root), reverse=True) if iteration in (None, number)]


def temporary_directory(final: Path) -> Path:
    """A new directory for what is to become `final`, or a name for what it is before its removal."""
    return final.with_name(f"{final.name.partition('.')[0]}.tmp-{uuid.uuid4().hex[:8]}")


def remove_checkpoint(path: Path) -> None:
    """Remove `path`, which leaves its name whole, in one step: nothing looks like a checkpoint that is half there.

    What cannot be removed (a file that another host has open on a network disk, say) is left to the next sweep.
    """
    doomed = temporary_directory(path)
    path.rename(doomed)
    fsync_directory(path.parent)
    try:
        if doomed.is_symlink() or not doomed.is_dir():
            doomed.unlink()
        else:
            shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("warning: cannot remove %s: %s", doomed, error)


def sweep(root: Path) -> None:
    """Remove what interrupted saves and removals left under `root`; undo a replacement that was cut short."""
    for path in list(root.iterdir()):
        if _TEMPORARY.fullmatch(path.name):
            # Under a new name first: should its writer be alive after all, it fails instead of publishing a remnant.
            with suppress(FileNotFoundError):
                remove_checkpoint(path)
    for iteration, current, path in list(_published(root)):
        if current:
            continue
        final = checkpoint_path(root, iteration)
        if looks_sound(path) and not looks_sound(final):
            if os.path.lexists(final):
                remove_checkpoint(final)
            path.rename(final)
        else:
            remove_checkpoint(path)


def publish_directory(temporary: Path, final: Path) -> None:
    """Give `temporary`, whose files are on the disk, the name `final`; an older `final` is replaced.

    At every instant `latest_checkpoint` finds the old version or the new one.
    """
    fsync_directory(temporary)
    replaced = final.with_name(final.name + ".replaced")
    if os.path.lexists(final):
        final.rename(replaced)
    temporary.rename(final)
    fsync_directory(final.parent)
    if os.path.lexists(replaced):
        remove_checkpoint(replaced)


def prune(root: Path, keep_last: int, keep_every: int | None, published: Path) -> None:
    """Remove checkpoints of `root` after `published` has been published.

    Kept are `published`, the `keep_last` newest that look sound, and those of iterations divisible by `keep_every`.
    What does not look sound does not count and is not touched: it may be of a newer version of this program. Nor does
    what comes after `published`, of which there is something when a run has gone back (`--ckpt-step`).
    """
    kept = 0
    candidates = sorted(_published(root), reverse=True)
    newest = next((iteration for iteration, _, path in candidates if path == published), math.inf)
    for iteration, _, path in candidates:
        if iteration > newest:
            continue
        if kept < keep_last:
            kept += looks_sound(path)
        elif path != published and not (keep_every and iteration % keep_every == 0) and looks_sound(path):
            remove_checkpoint(path)
