"""The groups of a layout."""

import os
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch import nn

from megatron.core.config import ParallelConfig
from megatron.core.distributed import SharedParameters
from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import Init, ParamSpec
from tests.distributed import run_distributed


class Stage(nn.Linear):
    def __init__(self):
        super().__init__(1, 1, bias=False)
        self.parameter_specs = {"weight": ParamSpec(("embed", "embed"), Init("constant", (0.0,)))}


def _timeouts(rank):
    config = ParallelConfig(pipeline_model_parallel_size=3, distributed_timeout_minutes=3.0)
    context = ParallelContext.create(config, torch.device("cpu"))
    stages, indices = ([Stage()], [rank]) if rank < 2 else ([], [])  # the ranks that share it get a group of their own
    shared = SharedParameters(stages, indices, context)
    groups = [context.tp_group, context.dp_group, context.pp_group, context.dp_tp_group, *shared._groups.values()]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_every_group_has_the_timeout_of_the_flag():
    one, other, alone = run_distributed(_timeouts, 3)
    assert one == other == [timedelta(minutes=3)] * 5
    assert alone == [timedelta(minutes=3)] * 4


def _once_a_node(rank, folder, local_rank, nodes, mistake):
    """What happens on two nodes of two; the second is slow, and may make a mistake."""
    os.environ["LOCAL_RANK"] = str(local_rank[rank])
    store = torch.distributed.FileStore(str(folder / "store"), 4)
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"), store)
    calls = []

    def prepare():
        calls.append(rank)
        time.sleep(0.3 * nodes[rank])
        (folder / str(nodes[rank])).touch()
        if nodes[rank] and mistake is not None:
            raise mistake

    try:
        context.on_local_main(prepare, patiently_at="a name")
    except UserError as error:
        return calls, str(error)
    return calls, sorted(path.name for path in folder.glob("?"))


@pytest.mark.parametrize("mistake", [None, UserError("mend this"), OSError(28, "no space", "file")])
def test_one_process_of_each_node_does_it_and_all_know(tmp_path, mistake):
    outcomes = run_distributed(_once_a_node, 4, tmp_path, (0, 1, 0, 1), (0, 0, 1, 1), mistake)
    expected = {UserError: "mend this", OSError: "file: no space; mend this"}.get(type(mistake), ["0", "1"])
    assert outcomes == [([0], expected), ([], expected), ([2], expected), ([], expected)]


def _mistake_of_one_node(rank, folder):
    """Two nodes of one process each; one has a mistake while the other is at it, or once it waits for it."""
    os.environ["LOCAL_RANK"] = "0"
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    context = ParallelContext.create(ParallelConfig(), torch.device("cpu"), store)
    work = threading.Event()

    def prepare():
        if rank == 0:
            raise UserError("mend this")
        work.wait(2)

    began = time.monotonic()
    with pytest.raises(UserError, match="mend this"):
        context.on_local_main(prepare, "a name", work.set)
    return time.monotonic() - began


def test_a_mistake_on_a_node_is_told_at_once(tmp_path):
    told_after = run_distributed(_mistake_of_one_node, 2, tmp_path)
    assert told_after[0] < 1.5 and told_after[1] >= 2


def test_a_single_process_does_it_itself():
    calls = []
    ParallelContext(torch.device("cpu")).on_local_main(lambda: calls.append(1), patiently_at="a name")
    assert calls == [1]


def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert ParallelContext(torch.device("cuda")).device == torch.device("cuda", 3)
    assert ParallelContext(torch.device("cuda", 1)).device == torch.device("cuda", 1)
    assert ParallelContext(torch.device("cpu")).device == torch.device("cpu")
