"""System calls that processes make below a directory: recorded, or interrupted at a chosen one, with strace."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CALLS = (
    "openat", "write", "pwrite64", "writev", "ftruncate", "fallocate", "fsync", "fdatasync",
    "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat",
    "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat",
)  # fmt: skip
_ATTACHED = re.compile(r"strace: Process (\d+) attached")
_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)")
_UNFINISHED, _RESUMED = re.compile(r"(\d+) +(.*) <unfinished \.\.\.>"), re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)")
_PATH = re.compile(r'(?:[0-9]+|AT_FDCWD)<([^>]*)>|"([^"]*)"')  # a descriptor with its path, or a string; all in hex


@dataclass(frozen=True)
class Call:
    """One system call that has returned.

    Attributes:
        thread: Id of the thread that made it.
        name: Its name.
        descriptors: Paths of its descriptor arguments.
        strings: Its string arguments: paths, or what is written.
        arguments: All of them as strace prints them, in hexadecimal.
        result: What it returned; negative after an error.
    """

    thread: int
    name: str
    descriptors: tuple[str, ...]
    strings: tuple[bytes, ...]
    arguments: str
    result: int

    @property
    def changes(self) -> bool:
        """Whether it can change what is on the disk."""
        return self.name != "openat" or "O_CREAT" in self.arguments or "O_TRUNC" in self.arguments

    def paths(self) -> list[str]:
        """Absolute paths that it is about."""
        if self.name in ("write", "pwrite64", "writev", "ftruncate", "fallocate", "fsync", "fdatasync"):
            return list(self.descriptors)
        if len(self.descriptors) == len(self.strings):  # openat and the like: each name is relative to a directory
            pairs = zip(self.descriptors, self.strings, strict=True)
            return [str(Path(directory, string.decode())) for directory, string in pairs]
        return [string.decode() for string in self.strings]


@cache
def why_unavailable() -> str | None:
    """Why system calls cannot be traced on this machine, or None when they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    command = ["strace", "-e", "inject=getpid:signal=SIGUSR1:when=999", sys.executable, "-S", "-c", ""]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else f"strace does not work here: {result.stderr.strip().splitlines()[-1]}"


class Tracer:
    """strace attached to running processes and the threads that they start, until they end.

    Args:
        processes: Their ids.
        log: File to record calls in.
        paths: Only calls about these paths are recorded and counted. Default: all.
        inject: What to do to a call, as strace describes it: `write:signal=SIGKILL:when=3` kills the process at the
            third call of that name that one of its threads makes, before it does anything.
    """

    def __init__(
        self, processes: Iterable[int], log: Path, paths: Iterable[str] = (), inject: str | None = None
    ) -> None:
        command = ["strace", "-f", "-y", "-xx", "-s", "10000000", "-o", str(log), "-e", f"trace={','.join(CALLS)}"]
        command += [f"--trace-path={path}" for path in paths]
        if inject is not None:
            command += ["-e", f"inject={inject}"]
        waiting = set(processes)
        command += [f"--attach={process}" for process in waiting]
        self.log = log
        self.strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.strace.stderr is not None
        while waiting:
            line = self.strace.stderr.readline()
            assert line, f"strace ended before it was attached to {waiting}"
            if match := _ATTACHED.match(line):
                waiting.discard(int(match[1]))

    def wait(self) -> None:
        """Wait until the processes have ended."""
        self.strace.communicate(timeout=60)

    def calls(self) -> list[Call]:
        """What was recorded, in the order in which the calls returned."""
        return _parse(self.log.read_text().splitlines())


def _parse(lines: list[str]) -> list[Call]:
    unfinished: dict[str, str] = {}
    calls = []
    for line in lines:
        if match := _UNFINISHED.fullmatch(line):
            unfinished[match[1]] = match[2]
            continue
        if match := _RESUMED.fullmatch(line):
            line = f"{match[1]} {unfinished.pop(match[1])}{match[2]}"
        if (match := _LINE.match(line)) and match[2] in CALLS:
            found = _PATH.findall(match[3])
            descriptors = tuple(_bytes(path).decode() for path, _ in found if path)
            strings = tuple(_bytes(string) for path, string in found if not path)
            calls.append(Call(int(match[1]), match[2], descriptors, strings, match[3], int(match[4])))
    return calls


def _bytes(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal.replace("\\x", ""))


def below(root: Path, calls: list[Call]) -> list[Call]:
    """The calls about `root` or what is in it."""
    return [call for call in calls if any(Path(path).is_relative_to(root) for path in call.paths())]


def kill_points(calls: list[Call]) -> list[tuple[str, int]]:
    """(name, n) for every call that can change the disk, as injections want it.

    strace counts by thread and name, so calls of one name must all be made by one thread.
    """
    threads: dict[str, set[int]] = {}
    counts: Counter[str] = Counter()
    points = []
    for call in calls:
        counts[call.name] += 1
        threads.setdefault(call.name, set()).add(call.thread)
        if call.changes:
            points.append((call.name, counts[call.name]))
    shared = {name for name, users in threads.items() if len(users) > 1}
    assert not shared, f"{shared} are called by several threads of a process, so that their calls cannot be counted"
    return points
