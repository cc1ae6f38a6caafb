"""Two "nodes" on this machine (`cluster.py`): a run over both, one that is cut off, one that is lost and comes back.

Needs root and `ip` (iproute2); where namespaces cannot be made, the tests say so and are skipped.
"""

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode.cluster import Agent, ip, two_nodes
from tests.reliability import elastic
from tests.training.test_pretrain import train

FLAGS = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 32 --num-attention-heads 4 --kv-channels 8 "
    "--encoder-seq-length 64 --lr 1e-2 --log-interval 1 --eval-iters 0 --train-iters 5 --global-batch-size 8"
)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces with an address each on a network of their own."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip (iproute2)")
    try:
        with two_nodes() as names:
            yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")


def received_bytes(name: str) -> int:
    """Bytes that a node got over the cable."""
    return int(json.loads(ip("-n", name, "-s", "-j", "link", "show", "cable"))[0]["stats64"]["rx"]["bytes"])


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
    agents = [Agent(number, name, flags, tmp_path / f"{number}.log") for number, name in enumerate(nodes)]
    try:
        statuses = [agent.wait(400) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert statuses == [0, 0], "".join((tmp_path / f"{number}.log").read_text() for number in range(2))
    assert len(losses(four)) == 5
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert min(map(received_bytes, nodes)) > 2 * 32 * 64 * 4, "the nodes passed hidden states on to each other"


@pytest.mark.slow
def test_a_node_that_is_cut_off(nodes: tuple[str, str], byte_dataset: Path, tmp_path: Path) -> None:
    elastic.cut_off(nodes, tmp_path, byte_dataset)


@pytest.mark.slow
def test_a_node_that_is_lost_and_taken_back(nodes: tuple[str, str], byte_dataset: Path, tmp_path: Path) -> None:
    elastic.lost_and_taken_back(nodes, tmp_path, byte_dataset)
