"""The helper for distributed tests must not hide failures."""

import os
import time

import pytest
import torch

from tests.distributed import run_distributed


def _sum(rank, offset):
    value = torch.tensor([float(rank + offset)])
    torch.distributed.all_reduce(value)
    return value


def test_results_by_rank():
    assert [r.item() for r in run_distributed(_sum, 3, 10)] == [33.0] * 3


def _one_raises(rank):
    if rank == 1:
        raise ValueError("the reason")
    time.sleep(60)


def _one_dies(rank):
    if rank == 1:
        os._exit(3)
    time.sleep(60)


def _hang(rank):
    time.sleep(60)


@pytest.mark.parametrize(
    ("fn", "timeout", "message"),
    [(_one_raises, 30, "rank 1 raised(.|\n)*the reason"), (_one_dies, 30, "rank 1 died"), (_hang, 1, "did not finish")],
)
def test_failures_end_all_ranks(fn, timeout, message):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_distributed(fn, 2, timeout=timeout)
    assert time.monotonic() - start < 30
