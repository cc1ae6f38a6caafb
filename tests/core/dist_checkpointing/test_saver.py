"""Saving from a thread and in the foreground: what is written, what a failure leaves, and what is kept."""

import errno
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron.core.dist_checkpointing import (
    CheckpointError,
    CheckpointSaver,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
    serialization,
    storage,
    verify_checkpoint,
)
from megatron.core.dist_checkpointing.staging import HostCopies
from megatron.core.parallel_state import ParallelContext
from tests.distributed import run_distributed

CPU = ParallelContext(torch.device("cpu"))


def example(seed=0):
    """Sharded evenly and not, with fewer rows than ranks, replicated, empty, without dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(7, 5, generator=generator),
        "row": torch.randn(1, 3, generator=generator).bfloat16(),
        "replicated": torch.randn(6, 4, generator=generator),
        "plain": torch.randint(0, 2**40, (9,), generator=generator),
        "empty": torch.zeros(0, 3),
        "step": torch.tensor(float(seed)),
    }


def shard(tensors):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    placements = {"weight": Shard(0), "row": Shard(0), "replicated": Replicate()}
    return {
        name: distribute_tensor(tensor, mesh, [placements[name]]) if name in placements else tensor.clone()
        for name, tensor in tensors.items()
    }


def context_of(rank):
    return ParallelContext(torch.device("cpu"), torch.distributed.get_world_size(), rank)


def names(root):
    return sorted(path.name for path in root.iterdir())


def assert_holds(path, seed):
    loaded = {name: torch.full_like(tensor, -1) for name, tensor in example().items()}
    load_checkpoint(path, loaded)
    for name, tensor in example(seed).items():
        assert torch.equal(loaded[name], tensor), name
    verify_checkpoint(path)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path, asynchronous):
    saver = CheckpointSaver(tmp_path, CPU, asynchronous)
    tensors, manifest = example(1), {"progress": {"consumed_samples": 3}}
    saver.save(5, tensors, manifest)
    for tensor in tensors.values():
        tensor.zero_()
    manifest["progress"]["consumed_samples"] = 4
    saver.wait()
    assert saver.finished()
    [outcome] = saver.outcomes()
    assert saver.outcomes() == []
    assert (outcome.iteration, outcome.path, outcome.error) == (5, tmp_path / "iter_0000005", None)
    assert 0 < outcome.pause_seconds <= outcome.seconds
    assert_holds(outcome.path, 1)
    assert read_manifest(outcome.path)["progress"] == {"consumed_samples": 3}
    saver.save(5, example(2), manifest)  # the same again
    saver.close()
    assert_holds(tmp_path / "iter_0000005", 2)
    assert names(tmp_path) == ["iter_0000005", "latest_checkpointed_iteration.txt"]


def test_memory_is_taken_once(tmp_path):
    saver = CheckpointSaver(tmp_path, CPU, asynchronous=True)
    saver.prepare(example())
    memory = saver.copies.memory
    saver.save(1, example(1), {})
    saver.save(2, example(2), {})
    assert saver.copies.memory is memory
    saver.save(3, example(3) | {"more": torch.ones(3)}, {})
    assert saver.copies.memory is not memory
    saver.close()
    assert [outcome.error for outcome in saver.outcomes()] == [None] * 3
    assert_holds(tmp_path / "iter_0000001", 1)
    assert_holds(tmp_path / "iter_0000002", 2)


def _save_and_change(rank, root):
    saver = CheckpointSaver(root, context_of(rank), asynchronous=True)
    for seed in (1, 2):
        tensors = shard(example(seed))
        saver.save(seed, tensors, {})
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        torch.distributed.barrier()  # in the default group, while the thread talks in its own
    saver.wait()
    bytes_copied = sum(buffer.nbytes for buffer in saver.copies.buffers.values())
    saver.close()
    return bytes_copied, [outcome.error for outcome in saver.outcomes()]


def test_ranks_together_copy_and_write_everything_once(tmp_path):
    results = run_distributed(_save_and_change, 3, tmp_path)
    assert [errors for _, errors in results] == [[None, None]] * 3
    assert sum(copied for copied, _ in results) == sum(tensor.nbytes for tensor in example().values())
    assert max(copied for copied, _ in results) < 200  # of 366: shared out
    for seed in (1, 2):
        path = tmp_path / f"iter_000000{seed}"
        assert_holds(path, seed)
        for name, entry in read_manifest(path)["tensors"].items():
            assert len(entry["chunks"]) == {"weight": 3, "empty": 0}.get(name, 1), name


def _fail(root, asynchronous, rank, error):
    """Outcomes of three saves, the second of which fails on rank 1."""
    written = storage._write_shard

    def fail(path, items, planner):
        path.write_bytes(b"half of it")
        raise error

    saver = CheckpointSaver(root, context_of(rank), asynchronous)
    for iteration in (1, 2, 3):
        storage._write_shard = fail if iteration == 2 and rank == 1 else written
        try:
            saver.save(iteration, shard(example(iteration)), {})
            saver.wait()
        finally:
            storage._write_shard = written
        if iteration == 2:
            torch.distributed.barrier()  # the first rank cleans up
            left = names(root)
            torch.distributed.barrier()
    saver.close()
    return [outcome.error and str(outcome.error) for outcome in saver.outcomes()], left


def _failures(rank, root):
    full = OSError(errno.ENOSPC, "No space left on device")
    results = {mode: _fail(root / mode, mode == "async", rank, full) for mode in ("sync", "async")}
    return results | {"bug": _fail(root / "bug", True, rank, KeyError("what"))}


def test_a_failure_on_one_rank_is_the_outcome_on_all(tmp_path):
    results = run_distributed(_failures, 2, tmp_path)
    assert results[0] == results[1]
    for mode, (errors, left) in results[0].items():
        assert errors[0] is None and errors[2] is None
        assert "cannot save" in errors[1] and "iter_0000002" in errors[1] and "rank 1" in errors[1]
        assert ("KeyError('what')" if mode == "bug" else "No space left") in errors[1]
        assert left == ["iter_0000001", "latest_checkpointed_iteration.txt"]
        assert_holds(latest_checkpoint(tmp_path / mode), 3)


def test_an_exception_of_the_thread_itself_is_not_lost(tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise SystemExit(3)

    monkeypatch.setattr(serialization.dcp, "save", broken)
    saver = CheckpointSaver(tmp_path, CPU, asynchronous=True)
    saver.save(1, example(), {})
    saver.close()
    [outcome] = saver.outcomes()
    assert isinstance(outcome.error, CheckpointError) and "SystemExit 3" in str(outcome.error)
    assert "Traceback" in caplog.text


def test_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """`save` returns while the file is being written, the next one waits for that."""
    written = storage._write_shard
    events = []

    def slow(path, items, planner):
        events.append("write")
        while "returned" not in events:
            time.sleep(0.01)
        return written(path, items, planner)

    monkeypatch.setattr(storage, "_write_shard", slow)
    saver = CheckpointSaver(tmp_path, CPU, asynchronous=True)
    saver.save(1, example(1), {})
    assert not saver.finished() and saver.outcomes() == [] and latest_checkpoint(tmp_path) is None
    events.append("returned")
    saver.save(2, example(2), {})
    assert latest_checkpoint(tmp_path) is not None
    saver.close()
    assert [outcome.iteration for outcome in saver.outcomes()] == [1, 2]


def test_copies_can_be_made_while_the_tensors_are_used(tmp_path, monkeypatch):
    """`save` returns before the copies, `wait_for_copies` does not; what changes then is not in the checkpoint."""
    make, go_on = HostCopies._copy_all, threading.Event()

    def wait(*arguments):
        assert go_on.wait(60)
        make(*arguments)

    monkeypatch.setattr(HostCopies, "_copy_all", wait)
    saver = CheckpointSaver(tmp_path, CPU, asynchronous=True)
    saver.wait_for_copies()  # of nothing
    tensors = example(1)
    saver.save(1, tensors, {}, wait_for_copies=False)
    threading.Timer(0.1, go_on.set).start()
    saver.wait_for_copies()
    assert go_on.is_set()
    for tensor in tensors.values():
        tensor.zero_()
    saver.close()
    [outcome] = saver.outcomes()
    assert outcome.error is None and 0.05 < outcome.pause_seconds <= outcome.seconds
    assert_holds(outcome.path, 1)


def _no_memory_on_one_rank(rank, root):
    def fail(*arguments):
        raise MemoryError("no memory")

    make = HostCopies._copy_all
    HostCopies._copy_all = fail if rank == 1 else make
    saver = CheckpointSaver(root, context_of(rank), asynchronous=True)
    saver.save(1, shard(example(1)), {})
    saver.wait()
    HostCopies._copy_all = make
    saver.save(2, shard(example(2)), {})
    saver.close()
    return [outcome.error and str(outcome.error) for outcome in saver.outcomes()]


def test_copies_that_cannot_be_made_are_a_failed_save(tmp_path):
    for first, second in run_distributed(_no_memory_on_one_rank, 2, tmp_path):
        assert "rank 1 cannot copy its tensors: MemoryError no memory" in first and second is None
    assert_holds(latest_checkpoint(tmp_path), 2)


EXITING = """
import sys, time, torch
from pathlib import Path
from megatron.core.dist_checkpointing import CheckpointSaver, storage
from megatron.core.dist_checkpointing.staging import HostCopies
from megatron.core.parallel_state import ParallelContext
written = storage._write_shard
def slow(*arguments):
    time.sleep(1.0)
    return written(*arguments)
storage._write_shard = slow
CheckpointSaver(Path(sys.argv[1]), ParallelContext(torch.device("cpu")), True).save(1, {"a": torch.ones(3)}, {})
"""


def test_the_end_of_the_program_waits(tmp_path):
    subprocess.run([sys.executable, "-c", EXITING, tmp_path], check=True, cwd=Path(__file__).parents[3])
    verify_checkpoint(tmp_path / "iter_0000001")


def iterations(root):
    return [int(name[5:]) for name in names(root) if name.startswith("iter_")]


def test_retention(tmp_path):
    saver = CheckpointSaver(tmp_path, CPU, keep_last=2, keep_every=10)
    for iteration in range(4, 26, 2):
        saver.save(iteration, example(iteration), {})
    assert iterations(tmp_path) == [10, 20, 22, 24]
    saver.save(5, example(5), {})  # went back to an older one: what has just been saved stays
    assert iterations(tmp_path) == [5, 10, 20, 22, 24]
    saver.save(26, example(26), {})
    assert iterations(tmp_path) == [10, 20, 24, 26]


def test_what_a_run_has_gone_back_behind_does_not_count(tmp_path):
    before = CheckpointSaver(tmp_path, CPU)
    for iteration in (100, 300, 400):
        before.save(iteration, example(iteration), {})
    saver = CheckpointSaver(tmp_path, CPU, keep_last=2)
    for iteration in (150, 200):
        saver.save(iteration, example(iteration), {})
    assert sorted(iterations(tmp_path)) == [150, 200, 300, 400]


def test_damaged_checkpoints_do_not_count_and_are_not_touched(tmp_path):
    saver = CheckpointSaver(tmp_path, CPU, keep_last=1)
    saver.save(1, example(1), {})
    for iteration in (30, 40):
        (tmp_path / f"iter_00000{iteration}").mkdir()
    (tmp_path / "iter_0000030" / "manifest.json").write_text(json.dumps({"format_version": 2}))
    (tmp_path / "iter_0000050").write_text("a file")
    saver.save(2, example(2), {})
    assert iterations(tmp_path) == [2, 30, 40, 50]
    assert latest_checkpoint(tmp_path).name == "iter_0000002"


def test_old_checkpoints_that_cannot_be_removed_do_not_fail_a_save(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(serialization, "prune", refuse)
    saver = CheckpointSaver(tmp_path, CPU, keep_last=1)
    saver.save(1, example(), {})
    assert saver.outcomes()[0].error is None
    assert "Permission denied" in caplog.text
