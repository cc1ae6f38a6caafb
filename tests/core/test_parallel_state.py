"""The groups of a layout."""

from datetime import timedelta

import torch
from torch import nn

from megatron.core.config import ParallelConfig
from megatron.core.distributed import SharedParameters
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
