"""Batches that are prepared ahead: the same ones, in any order, with their errors, and ends without a hang."""

import itertools
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

import numpy as np
import pytest
import torch

from megatron.core.datasets.loader import T5Loader, TensorBatch
from megatron.core.datasets.prefetch import Prefetcher
from megatron.core.datasets.sample_ranges import SampleRanges
from megatron.core.datasets.t5_dataset import Batch
from megatron.core.errors import UserError
from megatron.training.watchdog import locate

CPU = torch.device("cpu")


class Numbers:
    """Sample n has its id in all places. `before` is called with the ids of each batch."""

    encoder_length, decoder_length = 6, 3
    windows_per_epoch, tokens_per_sample, fill_rate = 100, 9.0, 1.0

    def __init__(self, before: Callable[[list[int]], None] = lambda ids: None):
        self.before = before

    def batch(self, sample_ids: np.ndarray) -> Batch:
        self.before(sample_ids.tolist())
        rows = sample_ids.astype(np.int32)[:, None]
        return Batch(rows.repeat(6, axis=1), rows.repeat(3, axis=1), rows.repeat(3, axis=1))


def prefetcher(before: Callable[[list[int]], None] = lambda ids: None, **options) -> Prefetcher:
    """Batches of two samples."""
    return Prefetcher(T5Loader(Numbers(before), 1, 2, **options), CPU)


def ids_of(batch: TensorBatch) -> list[int]:
    return batch.labels[:, 0].tolist()


def settle(condition: Callable[[], bool]) -> None:
    """Wait until the thread has got so far."""
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_loaders_batches_in_order_and_no_more_ahead_than_said():
    made: list[list[int]] = []
    batches = prefetcher(made.append, dp_rank=1, dp_size=2, skipped=SampleRanges.parse(["5-6"]))
    first = 0
    for step in range(6):
        batch = batches.step_batch(first)
        expected = batches.loader.sample_ids(first).reshape(-1).tolist()
        assert ids_of(batch) == expected
        settle(lambda: len(made) >= step + 3)  # noqa: B023 - called at once
        assert len(made) == step + 3
        first = batches.loader.next_sample(first)
    batches.close()


def test_any_other_step_may_come_next():
    batches = prefetcher(lambda ids: time.sleep(0.001))
    places = [0, 2, 4, 40, 42, 2, 4, 4, 8, 6, 7, 9, 0, 100, 2, 4]
    for place in places * 5:
        assert ids_of(batches.step_batch(place)) == [place, place + 1]
        if place % 3:
            time.sleep(0.002)
    batches.close()


def test_batches_stay_what_they_were():
    batches = prefetcher()
    kept = [batches.step_batch(first) for first in range(0, 40, 2)]
    assert [ids_of(batch) for batch in kept] == [[first, first + 1] for first in range(0, 40, 2)]
    batches.close()


def test_an_error_belongs_to_its_step_and_can_be_met_again():
    calls = itertools.count()

    def fail(ids: list[int]) -> None:
        if 4 in ids and next(calls) < 2:
            raise UserError("--data-path x.bin: id 70000 is no id of the tokenizer")

    batches = prefetcher(fail)
    for first in (0, 2):
        assert ids_of(batches.step_batch(first)) == [first, first + 1]
    for _ in range(2):
        with pytest.raises(UserError, match="id 70000"):
            batches.step_batch(4)
    assert ids_of(batches.step_batch(4)) == [4, 5]
    assert ids_of(batches.step_batch(6)) == [6, 7]
    batches.close()


def test_errors_of_batches_that_no_step_takes_do_not_matter():
    met = threading.Event()

    def fail(ids: list[int]) -> None:
        if 2 in ids:
            met.set()
            raise UserError("beyond the end of the run")

    batches = prefetcher(fail)
    assert ids_of(batches.step_batch(0)) == [0, 1]
    assert met.wait(10.0)
    assert ids_of(batches.step_batch(10)) == [10, 11]
    batches.close()


def test_without_a_thread():
    made: list[list[int]] = []
    batches = Prefetcher(T5Loader(Numbers(made.append), 1, 2), CPU, ahead=0)
    threads = threading.active_count()
    assert ids_of(batches.step_batch(6)) == [6, 7]
    assert (made, threading.active_count()) == ([[6, 7]], threads)
    batches.close()


def test_close_ends_the_thread_wherever_it_is():
    threads = threading.active_count()
    idle = prefetcher()
    idle.close()  # never used
    for delay in (0.0, 0.05):
        batches = prefetcher(lambda ids, delay=delay: time.sleep(delay))
        batches.step_batch(0)
        batches.close()
        batches.close()
        assert threading.active_count() == threads
    with pytest.raises(AssertionError, match="closed"):
        batches.step_batch(2)


def test_a_step_that_waits_for_data_is_in_no_collective():
    """So that the watchdogs of other ranks name this one."""
    release, places = threading.Event(), []

    def look() -> None:
        main = threading.main_thread().ident
        settle(lambda: any(frame.f_code.co_name == "step_batch" for frame, _ in stack_of(main)))
        time.sleep(0.02)
        places.append(locate(stack_of(main)))
        release.set()

    batches = prefetcher(lambda ids: release.wait(10.0))
    observer = threading.Thread(target=look)
    observer.start()
    assert ids_of(batches.step_batch(0)) == [0, 1]
    observer.join()
    batches.close()
    assert places[0].collective is None
    assert places[0].function.startswith("step_batch (megatron/core/datasets/prefetch.py:")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_arrive_whole_beside_other_work():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    batches = Prefetcher(T5Loader(Numbers(), 1, 2), device)
    busy = torch.zeros(4096, 4096, device=device)
    for first in range(0, 200, 2):
        busy = busy @ busy  # what reads the batch waits for it, while the thread goes on
        batch = batches.step_batch(first)
        assert all(rows.device == device for rows in batch.inputs().values())
        assert ids_of(batch) == [first, first + 1]
    batches.close()


def stack_of(thread: int | None) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_stack(sys._current_frames()[thread]))


PROGRAM = """
import sys, time, numpy as np, torch
from megatron.core.datasets.loader import T5Loader
from megatron.core.datasets.prefetch import Prefetcher
from tests.core.datasets.test_prefetch import Numbers
batches = Prefetcher(T5Loader(Numbers(lambda ids: time.sleep(0.01)), 1, 2), torch.device("cpu"))
for first in range(0, 10, 2):
    batches.step_batch(first)
{end}
"""


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit(4)", 4), ("raise ValueError", 1)])
def test_a_program_that_forgets_to_close_ends_as_it_would(end: str, status: int):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr.decode()
    assert (b"terminate" in done.stderr, b"Fatal" in done.stderr) == (False, False)
