"""R13 under the real launcher: torchrun starts a job again whose rank failed, and goes on without a lost node.

Both on runs whose losses are compared with those of a run that nothing happened to.
"""

from __future__ import annotations

import functools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.corpora import make_byte_dataset, write_prose
from tests.multinode import paced_program
from tests.multinode.cluster import Agent, ip, two_nodes
from tests.reliability import faulty_program
from tests.reliability.jobs import ForkedJob, ProgramJob

TIMEOUT_S = 12.0
LATER_S = 5.0
START_WITHIN_S = 150.0  # a start or a rendezvous, on a busy machine
SAVED, FAULT_AFTER, RESUMED_UNTIL, STEPS = 10, 12, 17, 30
RUN = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 8 "
    "--encoder-seq-length 64 --lr 1e-2 --log-interval 1 --eval-iters 0 --micro-batch-size 2 --global-batch-size 8 "
    f"--save-interval 5 --train-iters {STEPS} --distributed-timeout-minutes {TIMEOUT_S / 60}"
)
FAULTS = ("kill", "hang", "freeze", "raise", "exit")
PACED, FAULTY = str(Path(paced_program.__file__)), str(Path(faulty_program.__file__))
ELASTIC = shlex.split("--nnodes 1:2 --nproc-per-node 1 --max-restarts 3")
# A dead node is noticed after keep_alive_interval x keep_alive_max_attempt seconds; the rest then wait
# last_call_timeout seconds for others to join.
RENDEZVOUS = ",keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=3,read_timeout=10"
# Without it torchrun (torch 2.13) does not tell a node that joins later where the others meet.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def losses(run: Path) -> dict[int, float]:
    """Loss of each step that a run reported so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["iteration"]: row["lm_loss"] for row in rows if "lm_loss" in row}


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_WITHIN_S) -> None:
    """Raises `AssertionError` when `condition` does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def uninterrupted(folder: Path, data_path: Path, ranks: int) -> dict[int, float]:
    """Losses of the run that nothing happens to."""
    run, log = folder / "uninterrupted", folder / "uninterrupted.log"
    job = ForkedJob([*RUN, "--data-path", str(data_path), "--save", str(run)], ranks, log)
    assert job.ended(120) and job.statuses() == [0] * ranks, log.read_text()
    return losses(run)


def check_same(run: Path, expected: dict[int, float], tolerance: float) -> None:
    """The run is finished, with one loss a step, those of `expected`."""
    assert (run / "finished").exists(), "not finished"
    found = losses(run)
    assert found.keys() == expected.keys(), f"steps {list(found)}"
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert worst <= tolerance, f"losses differ by {worst:.1e}"


def restarted(fault: str, folder: Path, data_path: Path) -> None:
    """`torchrun --max-restarts 1` finishes a run of which a rank fails once, with the losses of the plain run."""
    expected = uninterrupted(folder, data_path, 2)
    run, log = folder / fault, folder / f"{fault}.log"
    arguments = [fault, "step", "1", str(folder), *RUN, "--data-path", str(data_path), "--save", str(run)]
    # The fault comes in step 4 of what a process does: let it be after the first checkpoint.
    arguments += ["--save-interval", "2"]
    job = ProgramJob(arguments, 2, log, max_restarts=1, program=FAULTY)
    try:
        assert job.ended(START_WITHIN_S), f"not ended: {log.read_text()}"
    finally:
        if not job.ended(0):
            job.kill(None)
    assert job.statuses() == [0], log.read_text()
    assert "continuing from" in log.read_text(), "did not continue"
    check_same(run, expected, tolerance=0.0)


class Pace:
    """A run on two nodes that is slow after a step of our choice, so that something can be done to it there."""

    def __init__(self, folder: Path, data_path: Path, names: tuple[str, str]) -> None:
        self.run, self.names, self.folder = folder / "run", names, folder
        self.file = folder / "pace"
        self.flags = [str(self.file), *RUN, "--data-path", str(data_path), "--save", str(self.run)]

    def start(self, node: int, options: list[str]) -> Agent:
        return Agent(
            node, self.names[node], self.flags, self.folder / f"node{node}.log", options, RENDEZVOUS, PACED, ENVIRONMENT
        )

    def log(self, node: int) -> str:
        return (self.folder / f"node{node}.log").read_text()

    def until(self, step: int) -> None:
        """Run to `step` and on, slowly."""
        self.file.write_text(str(step))
        wait_until(lambda: max(losses(self.run), default=0) > step, f"step {step}: {self.log(0)}")


def lost_and_taken_back(nodes: tuple[str, str], folder: Path, data_path: Path) -> None:
    """`--nnodes 1:2`: a node dies, the other goes on with the same global batch, and takes the first back later."""
    expected = uninterrupted(folder, data_path, 2)
    pace = Pace(folder, data_path, nodes)
    pace.file.write_text(str(FAULT_AFTER))
    agents = [pace.start(0, ELASTIC), pace.start(1, ELASTIC)]
    try:
        pace.until(FAULT_AFTER)
        agents[1].kill()
        pace.until(RESUMED_UNTIL)
        assert f"continuing from {pace.run}/iter_00000{SAVED}" in pace.log(0), pace.log(0)
        assert "on 1 x cpu" in pace.log(0), pace.log(0)
        agents[1] = pace.start(1, ELASTIC)
        wait_until(lambda: pace.log(0).count("on 2 x cpu") == 2, f"taken back: {pace.log(0)}")
        pace.file.write_text(str(STEPS))
        statuses = [agent.wait(START_WITHIN_S) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert statuses == [0, 0], pace.log(0) + pace.log(1)
    check_same(pace.run, expected, tolerance=1e-4)


def cut_off(nodes: tuple[str, str], folder: Path, data_path: Path) -> None:
    """The cable between two nodes fails: both stop with a message; started on one node, the run goes on."""
    expected = uninterrupted(folder, data_path, 2)
    pace = Pace(folder, data_path, nodes)
    pace.file.write_text(str(FAULT_AFTER))
    both = shlex.split("--nnodes 2 --nproc-per-node 1")
    agents = [pace.start(0, both), pace.start(1, both)]
    try:
        pace.until(FAULT_AFTER)
        assert [len(agent.ranks()) for agent in agents] == [1, 1]
        ip("-n", nodes[0], "link", "set", "cable", "down")
        gone = "the ranks are gone"
        wait_until(lambda: not any(agent.ranks() for agent in agents), gone, TIMEOUT_S + LATER_S)
        for node in range(2):
            assert f"error: rank {node} has waited" in pace.log(node), pace.log(node)
        assert agents[0].wait(START_WITHIN_S) == 1
    finally:
        for agent in agents:
            agent.kill()
    pace.file.write_text(str(STEPS))
    alone = pace.start(0, shlex.split("--nnodes 1 --nproc-per-node 1"))
    try:
        assert alone.wait(START_WITHIN_S) == 0, pace.log(0)
    finally:
        alone.kill()
    assert f"continuing from {pace.run}/iter_00000{SAVED}" in pace.log(0), pace.log(0)
    check_same(pace.run, expected, tolerance=1e-4)


def on_nodes(attempt: Callable[[tuple[str, str], Path, Path], None]) -> Callable[[Path, Path], None]:
    """An attempt that makes its two nodes."""

    def with_nodes(folder: Path, data_path: Path) -> None:
        with two_nodes() as nodes:
            attempt(nodes, folder, data_path)

    return with_nodes


def count() -> list[dict[str, Any]]:
    """Rows about torchrun and nodes."""
    once, nodes, cable = (
        "torchrun --max-restarts: a rank is killed, hangs, is frozen, raises or ends; same losses in the end",
        "torchrun --nnodes 1:2: a node is lost and taken back, the global batch unchanged; same losses in the end",
        f"two nodes, the cable fails: both stop within the timeout + {LATER_S:.0f} s, one goes on alone; same losses",
    )
    trials: dict[str, list[Callable[[Path, Path], None]]] = {
        once: [functools.partial(restarted, fault) for fault in FAULTS],
        nodes: [on_nodes(lost_and_taken_back)],
        cable: [on_nodes(cut_off)],
    }
    rows = []
    for what, attempts in trials.items():
        start, failures = time.monotonic(), []
        for number, attempt in enumerate(attempts):
            if failure := _failure(attempt):
                failures.append(f"{number}: {failure}")
        seconds = round(time.monotonic() - start, 1)
        passed = len(attempts) - len(failures)
        row = {"test": "R13", "what": what, "trials": len(attempts), "passed": passed, "seconds": seconds}
        rows.append(row | ({"failures": failures} if failures else {}))
    return rows


def _failure(attempt: Callable[[Path, Path], Any]) -> str | None:
    with tempfile.TemporaryDirectory() as name:
        data_path = make_byte_dataset(write_prose(Path(name, "corpus.jsonl")))
        try:
            attempt(Path(name), data_path)
        except Exception as error:
            print(f"R13: {error}", file=sys.stderr, flush=True)
            return str(error)
    return None
