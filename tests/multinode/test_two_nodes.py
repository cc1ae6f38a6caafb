"""Two "nodes" on this machine: network namespaces joined by a cable, each with a torchrun of its own.

Needs root and `ip` (iproute2); where namespaces cannot be made, the test says so and is skipped.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.test_pretrain import ROOT, train

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29400
PREFIX = "t5-test-"
FLAGS = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 32 --num-attention-heads 4 --kv-channels 8 "
    "--encoder-seq-length 64 --lr 1e-2 --log-interval 1 --eval-iters 0 --train-iters 5 --global-batch-size 8"
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def remove_leftovers() -> None:
    """Delete the namespaces of tests that were killed, which the kernel keeps."""
    listed = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True).stdout
    for pid in set(re.findall(rf"^{PREFIX}(\d+)-0", listed, re.MULTILINE)):
        if not Path("/proc", pid).exists():
            for number in range(2):
                subprocess.run(["ip", "netns", "delete", f"{PREFIX}{pid}-{number}"], check=False, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces with an address each on a network of their own."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip (iproute2)")
    remove_leftovers()
    names = (f"{PREFIX}{os.getpid()}-0", f"{PREFIX}{os.getpid()}-1")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)  # and its devices


def start_node(number: int, name: str, flags: list[str]) -> "subprocess.Popen[str]":
    """torchrun with two processes in the namespace `name`; node 0 holds the rendezvous."""
    command = [
        "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
        "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}",
        "--rdzv-id", "two-nodes", "--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", ADDRESSES[number],
        str(ROOT / "pretrain_t5.py"), *flags,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def received_bytes(name: str) -> int:
    """Bytes that a node got over the cable."""
    shown = subprocess.run(
        ["ip", "-n", name, "-s", "-j", "link", "show", "cable"], check=True, capture_output=True, text=True
    )
    return int(json.loads(shown.stdout)[0]["stats64"]["rx"]["bytes"])


def losses(metrics: Path) -> list[float]:
    return [json.loads(line)["lm_loss"] for line in metrics.read_text().splitlines()]


def test_tensor_parallel_inside_nodes_and_pipeline_between_them(
    nodes: tuple[str, str], byte_dataset: Path, tmp_path: Path
) -> None:
    """TP2 x PP2 on 2 + 2 processes has the losses of one process."""
    data = ["--data-path", str(byte_dataset)]
    one, four = tmp_path / "one.jsonl", tmp_path / "four.jsonl"
    train([*FLAGS, *data, "--metrics-file", str(one)])
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--micro-batch-size", "2"]
    flags = [*FLAGS, *data, *layout, "--metrics-file", str(four)]
    processes = [start_node(number, name, flags) for number, name in enumerate(nodes)]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert len(losses(four)) == 5
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert min(map(received_bytes, nodes)) > 2 * 32 * 64 * 4, "the nodes passed hidden states on to each other"
