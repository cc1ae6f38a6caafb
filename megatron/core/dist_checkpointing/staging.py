"""Copies of tensors in host memory, from which a thread can write while training changes the tensors."""

from __future__ import annotations

import logging
import math
import mmap
import threading
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import WriteItem

from megatron.core.dist_checkpointing.padding import SavePlanner, Unpadded
from megatron.core.dist_checkpointing.serialization import CheckpointTensors
from megatron.core.parallel_state import ParallelContext

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes; a cache line
TOUCHED_BYTES = 64 * 2**20  # touched at a time, so that the end of the program need not wait for the rest


class HostCopies:
    """Copies what this rank is to write into memory that is taken once and used by every save.

    Of tensors that are equal on several ranks only one rank keeps a copy, the one that writes it: together the ranks
    take the size of a checkpoint once (12 bytes a parameter with Adam), each about the same part of it. On a GPU the
    memory is pinned.

    Args:
        context: The layout.
        group: Gloo group of all ranks that nothing else uses meanwhile; None for a single process.
    """

    def __init__(self, context: ParallelContext, group: dist.ProcessGroup | None) -> None:
        self.context, self.group = context, group
        self.on_gpu = context.device.type == "cuda"
        self.planned: list[WriteItem] | None = None  # what this rank holds, for which the memory was taken
        self.buffers: dict[str, torch.Tensor] = {}
        self.memory: torch.Tensor | None = None  # all buffers, bytes
        self.touching: threading.Thread | None = None
        self.is_pinned = False

    def prepare(self, tensors: CheckpointTensors) -> None:
        """Decide which rank copies what and begin to take the memory; all ranks call it together, it may be repeated.

        The first touch of memory is many times slower than a copy, so a thread does it, which the first copy waits for.
        """
        self._prepare(_pieces(tensors))

    def order(self, tensors: CheckpointTensors) -> Callable[[], dict[str, Unpadded]]:
        """A function for any thread that copies the parts of `tensors` that this rank is to write.

        `tensors` must not change before it has returned; what it returns is valid until it is called again, on all
        ranks together.
        """
        pieces = _pieces(tensors)
        ready = torch.cuda.current_stream(self.context.device).record_event() if self.on_gpu else None
        return partial(self._copy, pieces, ready)

    @torch.no_grad()
    def _copy(self, pieces: dict[str, Unpadded], ready: torch.cuda.Event | None) -> dict[str, Unpadded]:
        self._prepare(pieces)
        assert self.touching is not None
        self.touching.join()
        if ready is None:
            self._copy_all(pieces)
        else:  # beside what else the GPU does, after what it had been given when the copies were ordered
            stream = torch.cuda.Stream(self.context.device)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                self._copy_all(pieces)
            stream.synchronize()
        return {name: pieces[name].moved_to(buffer) for name, buffer in self.buffers.items()}

    def _copy_all(self, pieces: dict[str, Unpadded]) -> None:
        for name, buffer in self.buffers.items():
            buffer.copy_(pieces[name].part, non_blocking=True)

    def close(self) -> None:
        """Give the memory back."""
        if self.touching is not None:
            self.touching.join()
        if self.memory is not None and self.is_pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr()))
        self.buffers, self.memory, self.planned, self.is_pinned = {}, None, None, False

    def _prepare(self, pieces: dict[str, Unpadded]) -> None:
        planner = SavePlanner()
        planner.set_up_planner(dict(pieces), is_coordinator=self.context.is_main)
        plan = planner.create_local_plan()
        if not self._any(plan.items != self.planned):
            return
        plans = [plan]
        if self.context.world_size > 1:
            plans *= self.context.world_size
            dist.all_gather_object(plans, plan, group=self.group)
        mine = planner.create_global_plan(plans)[0][self.context.rank]
        self._take_memory({item.index.fqn: pieces[item.index.fqn] for item in mine.items})
        self.planned = plan.items

    def _any(self, value: bool) -> bool:
        """Whether `value` is true on any rank."""
        flag = torch.tensor(value, dtype=torch.int32)
        if self.context.world_size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def _take_memory(self, pieces: dict[str, Unpadded]) -> None:
        self.close()
        sizes = {name: piece.part.numel() * piece.dtype.itemsize for name, piece in pieces.items()}
        room = {name: math.ceil(size / ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}
        # One mapping: exactly as large as needed, where torch's pinned allocations are rounded up to powers of two.
        mapping = mmap.mmap(-1, max(sum(room.values()), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = torch.frombuffer(mapping, dtype=torch.uint8)
        position = 0
        for name, piece in pieces.items():
            content = self.memory[position : position + sizes[name]]
            self.buffers[name] = content.view(piece.dtype).view(piece.part.shape)
            position += room[name]
        self.touching = threading.Thread(target=self._touch, args=(self.memory,), name="checkpoint-memory", daemon=True)
        self.touching.start()

    def _touch(self, memory: torch.Tensor) -> None:
        """Take the pages of `memory`, pinned if there is a GPU to copy from."""
        for start in range(0, memory.numel(), TOUCHED_BYTES):
            memory[start : start + TOUCHED_BYTES : mmap.PAGESIZE].zero_()
        if self.on_gpu:
            try:
                with torch.cuda.device(self.context.device):
                    flags = 1  # portable: pinned for every CUDA context
                    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), flags)
                    torch.cuda.check_error(error)
                self.is_pinned = True
            except Exception as error:  # limits of a container, for one
                logger.warning("warning: host memory for copies cannot be pinned, saving takes longer: %s", error)


def _pieces(tensors: CheckpointTensors) -> dict[str, Unpadded]:
    return {name: t if isinstance(t, Unpadded) else Unpadded(t, t.shape) for name, t in tensors.items()}
