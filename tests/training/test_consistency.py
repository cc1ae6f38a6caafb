"""Ranks that were started differently say so, all with the same line."""

import pytest
import torch

from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.training.consistency import check_equal_on_all_ranks, describe_differences
from tests.distributed import run_distributed

SAME = {"config": {"optimizer": {"lr": 0.01, "clip_grad": 1.0}, "data": {"data_path": ["a"]}}}


def _check(rank: int) -> list[str]:
    context = ParallelContext(torch.device("cpu"), 4, rank)
    check_equal_on_all_ranks(context, SAME)
    messages = []
    lr = {"config": {"optimizer": {"lr": 0.02 if rank == 3 else 0.01, "clip_grad": 1.0}}}
    data = {**SAME, "dataset": {"fingerprint": "ab" if rank % 2 else "cd"}}
    missing = {"config": {"seed": 1}} if rank else {"config": {}}
    for values in (lr, data, missing):
        with pytest.raises(UserError) as raised:
            check_equal_on_all_ranks(context, values)
        messages.append(str(raised.value))
    check_equal_on_all_ranks(context, SAME)  # and nobody is out of step afterwards
    return messages


def test_ranks_with_other_values_are_named() -> None:
    of_ranks = run_distributed(_check, 4)
    cure = "; start all ranks with the same flags, data and software"
    assert of_ranks[0] == [
        "--lr is 0.01 on ranks 0-2 and 0.02 on rank 3" + cure,
        'dataset fingerprint is "cd" on ranks 0, 2 and "ab" on ranks 1, 3' + cure,
        "--seed is nothing on rank 0 and 1 on ranks 1-3" + cure,
    ]
    assert all(messages == of_ranks[0] for messages in of_ranks)


def test_one_process_has_nothing_to_compare() -> None:
    check_equal_on_all_ranks(ParallelContext(torch.device("cpu")), SAME)


def test_a_long_list_is_cut() -> None:
    of_ranks = [{f"--flag-{i}": str(rank) for i in range(9)} for rank in range(6)]
    line = describe_differences(of_ranks)
    assert "2 other values elsewhere" in line and "5 more entries differ" in line and "\n" not in line
