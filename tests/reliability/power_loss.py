"""R2, power loss: after every operation of a save, what a disk might hold when the power goes.

The system calls of a save are replayed on a model of a file system that keeps only what was made durable: the content
of a file by fsync of the file, names in a directory by fsync of the directory. Everything else may be there or not, in
any order, or in part. Every such disk, after every operation, must load as the checkpoint before or the new one; after
the last operation only as the new one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tests.reliability.crash_points import VARIANTS, CrashPoints, Situation, Variant, count_kills
from tests.reliability.small_checkpoints import count_trials, scratch
from tests.reliability.system_calls import Call, below, why_unavailable

Tree: TypeAlias = dict[str, bytes | None]
"""Content of a directory by relative path; None for directories."""


@dataclass(eq=False)
class Node:
    """A file or a directory, as programs see it and as it is on the disk."""

    is_directory: bool
    content: bytes = b""
    synced: bytes = b""
    entries: dict[str, Node] = field(default_factory=dict)
    synced_entries: dict[str, Node] = field(default_factory=dict)


Change: TypeAlias = list[tuple[Node, str, Node | None]]
"""Directory, name and what it names from now on (None: nothing). Of one call, so that it happens as a whole."""

DAMAGES: list[Callable[[Node], bytes]] = [  # what may have become of a file
    lambda node: node.content,
    lambda node: node.synced,
    lambda node: node.synced if node.synced == node.content else node.content[: len(node.content) // 2],
    lambda node: node.synced if node.synced == node.content else bytes(len(node.content)),
]


class Disk:
    """A file system below `top` that everything found there at first is durable in."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = self._read(top)
        self.pending: list[Change] = []

    def _read(self, path: Path) -> Node:
        if not path.is_dir():
            return Node(False, path.read_bytes(), path.read_bytes())
        entries = {child.name: self._read(child) for child in path.iterdir()}
        return Node(True, entries=entries, synced_entries=dict(entries))

    def _find(self, path: str) -> Node:
        node = self.root
        for part in Path(path).relative_to(self.top).parts:
            node = node.entries[part]
        return node

    def _name(self, changes: list[tuple[str, Node | None]]) -> None:
        """Change what the given paths name, all at once."""
        change: Change = [(self._find(str(Path(path).parent)), Path(path).name, node) for path, node in changes]
        _apply(change, lambda directory: directory.entries)
        self.pending.append(change)

    def apply(self, call: Call) -> None:
        """Carry out a system call."""
        paths = call.paths()
        match call.name:
            case "openat":
                if "O_CREAT" in call.arguments and Path(paths[0]).name not in self._find(_parent(paths[0])).entries:
                    self._name([(paths[0], Node(False))])
                elif "O_TRUNC" in call.arguments:
                    self._find(paths[0]).content = b""
            case "write" | "writev":
                node = self._find(paths[0])
                node.content = (node.content + b"".join(call.strings))[: len(node.content) + call.result]
            case "mkdir" | "mkdirat":
                self._name([(paths[0], Node(True))])
            case "rename" | "renameat" | "renameat2":
                self._name([(paths[0], None), (paths[1], self._find(paths[0]))])
            case "unlink" | "unlinkat" | "rmdir":
                self._name([(paths[0], None)])
            case "fsync" | "fdatasync":
                self._sync(self._find(paths[0]))
            case _:
                raise NotImplementedError(f"the model has no {call.name}")

    def _sync(self, node: Node) -> None:
        node.synced = node.content
        left = []
        for change in self.pending:
            if any(directory is node for directory, _, _ in change):
                _apply(change, lambda directory: directory.synced_entries)
            else:
                left.append(change)
        self.pending = left

    def now(self) -> Tree:
        """What programs see."""
        return _tree(self.root, lambda node: node.entries, lambda node: node.content)

    def after_power_loss(self) -> Iterator[Tree]:
        """What may be left: changes of names up to each one, all but each one, each one alone; files in each state."""
        number = len(self.pending)
        subsets = [range(end) for end in range(number + 1)]
        subsets += [[n for n in range(number) if n != left_out] for left_out in range(number)]  # type: ignore[misc]
        subsets += [[only] for only in range(number)]  # type: ignore[misc]
        for subset in subsets:
            changed: dict[Node, dict[str, Node]] = {}
            for index in subset:
                _apply(self.pending[index], lambda d, c=changed: c.setdefault(d, dict(d.synced_entries)))  # type: ignore[misc]
            for content in DAMAGES:
                yield _tree(self.root, lambda d, c=changed: c.get(d, d.synced_entries), content)  # type: ignore[misc]


def _parent(path: str) -> str:
    return str(Path(path).parent)


def _apply(change: Change, entries: Callable[[Node], dict[str, Node]]) -> None:
    for directory, name, node in change:
        if node is None:
            entries(directory).pop(name, None)
        else:
            entries(directory)[name] = node


def _tree(node: Node, entries: Callable[[Node], dict[str, Node]], content: Callable[[Node], bytes]) -> Tree:
    found: Tree = {}
    for name, child in entries(node).items():
        found[name] = None if child.is_directory else content(child)
        if child.is_directory:
            found |= {f"{name}/{path}": value for path, value in _tree(child, entries, content).items()}
    return found


def write_tree(top: Path, tree: Tree) -> None:
    """Make `top` a directory of that content."""
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir()
    for path, content in sorted(tree.items()):
        if content is None:
            (top / path).mkdir()
        else:
            (top / path).write_bytes(content)


def trials(folder: Path, variant: Variant, ignored: tuple[str, ...] = ()) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trial for each disk that a power loss during one variant of a save can leave.

    Calls whose names are `ignored` do nothing, as on a disk that does not keep its promises.
    """
    (folder / "disk").mkdir(parents=True)
    save = CrashPoints(folder, variant, place="disk/root")
    top = save.root.parent
    save.renew()
    disk = Disk(top)
    calls = [call for call in below(top, save.record().calls()) if call.changes and call.result >= 0]
    result = Disk(top).now()  # before the first trial puts another disk there
    seen: set[tuple[bool, int]] = set()
    for number, call in enumerate(calls, 1):
        if call.name not in ignored:
            disk.apply(call)
        for kind, tree in enumerate(disk.after_power_loss()):
            saved = number == len(calls)
            key = saved, hash(frozenset(tree.items()))
            if key not in seen:
                seen.add(key)
                name = f"{variant}, operation {number} ({call.name}), disk {kind}"
                yield name, partial(check, save.situation, top, tree, saved)
    assert disk.now() == result, "the model does not end with what the save has left"


def check(situation: Situation, top: Path, tree: Tree, saved: bool) -> None:
    """Load from such a disk, and save again."""
    write_tree(top, tree)
    situation.check(top / "root", saved)
    situation.check_next_save(top / "root")


def count_disks(variants: list[Variant] = VARIANTS) -> list[dict[str, Any]]:
    """A row for each number of ranks."""
    if problem := why_unavailable():
        raise RuntimeError(problem)
    rows = []
    for ranks in sorted({variant.ranks for variant in variants}):
        started = time.perf_counter()
        with scratch() as folder:
            chosen = [variant for variant in variants if variant.ranks == ranks]
            every = (t for n, variant in enumerate(chosen) for t in trials(Path(folder, str(n)), variant))
            what = f"disks that a power loss during a save can leave, {ranks} rank{'s' * (ranks > 1)}"
            rows.append(count_trials("R2", what, every, started))
    return rows


def count() -> list[dict[str, Any]]:
    """The rows of R2: kills and power losses."""
    return count_kills() + count_disks()
