"""Two "nodes" on this machine: network namespaces joined by a cable, each with a torchrun of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.reliability.jobs import PROGRAM, descendants, is_running

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29400
PREFIX = "t5-test-"


def ip(*arguments: str) -> str:
    """Output of the program ip."""
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def remove_leftovers() -> None:
    """Delete the namespaces of tests that were killed, which the kernel keeps."""
    listed = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True).stdout
    for pid in set(re.findall(rf"^{PREFIX}(\d+)-0", listed, re.MULTILINE)):
        if not Path("/proc", pid).exists():
            for number in range(2):
                subprocess.run(["ip", "netns", "delete", f"{PREFIX}{pid}-{number}"], check=False, capture_output=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces with an address each on a network of their own.

    Raises:
        subprocess.CalledProcessError: They cannot be made here.
    """
    remove_leftovers()
    names = (f"{PREFIX}{os.getpid()}-0", f"{PREFIX}{os.getpid()}-1")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)  # and its devices


class Agent:
    """torchrun on one of two nodes; node 0 holds the rendezvous.

    Args:
        number: Of the node.
        name: Of its namespace.
        flags: Of the program.
        log: File that takes what torchrun and its processes print, after what it holds.
        options: Of torchrun, beside those that describe the rendezvous.
        rendezvous: Further entries of `--rdzv-conf`.
        program: What every rank runs.
        environment: Further variables.
    """

    def __init__(
        self,
        number: int,
        name: str,
        flags: list[str],
        log: Path,
        options: Sequence[str] = ("--nnodes", "2", "--nproc-per-node", "2"),
        rendezvous: str = "",
        program: str = PROGRAM,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *options,
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", "two-nodes",
            "--rdzv-conf", f"is_host={int(number == 0)}{rendezvous}", "--local-addr", ADDRESSES[number],
            program, *flags,
        ]  # fmt: skip
        variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"} | dict(environment or {})
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, env=variables, stdout=output, stderr=output)

    def wait(self, timeout: float) -> int:
        """Exit status of torchrun.

        Raises:
            subprocess.TimeoutExpired: It is still running.
        """
        return self._process.wait(timeout)

    def ranks(self) -> list[int]:
        """Process ids of the ranks of this node that are there."""
        return [pid for pid in descendants(self._process.pid) if is_running(pid)]

    def kill(self) -> None:
        """End torchrun and its processes at once, as a power failure does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)  # it starts nothing meanwhile
            for pid in (*descendants(self._process.pid), self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
