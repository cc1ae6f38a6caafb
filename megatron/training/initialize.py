"""Process start-up: device, process group and context."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta

import torch

from megatron.core.config import ParallelConfig
from megatron.core.errors import CommunicationError, UserError
from megatron.core.parallel_state import ParallelContext
from megatron.training.consistency import check_equal_on_all_ranks
from megatron.training.console import warn
from megatron.training.rendezvous import store_of_this_start
from megatron.training.watchdog import describe_communication_failure


def launched_by_torchrun() -> bool:
    """Whether the environment describes a process group to join."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_device() -> torch.device:
    """The GPU of this local rank, or the CPU where there is none.

    Raises:
        UserError: There are more processes than GPUs on this node.
    """
    if torch.cuda.is_available():
        local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise UserError(f"--nproc-per-node starts more than {num_gpus} processes, the GPUs of this node; lower it")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def layout_warnings(config: ParallelConfig, processes_per_node: int) -> list[str]:
    """One line for each choice that works but is slow on nodes of so many processes."""
    size = config.tensor_model_parallel_size
    if processes_per_node % size == 0:
        return []
    return [
        f"--tensor-model-parallel-size {size} does not divide the {processes_per_node} processes of a node, so that "
        "tensor-parallel ranks talk between nodes, which is slow"
    ]


@contextmanager
def parallel_context(config: ParallelConfig) -> Iterator[ParallelContext]:
    """Join the process group that torchrun describes, if any, and leave it at the end.

    A process started without a launcher trains alone and needs no process group.

    Raises:
        UserError: The flags do not fit the machine or differ between ranks.
        CommunicationError: Another rank did not start, ended early, hangs or is cut off.
    """
    device = choose_device()
    if config.distributed_backend == "nccl" and device.type != "cuda":
        raise UserError("--distributed-backend nccl needs GPUs and there is none here; use gloo or leave it out")
    if not launched_by_torchrun():
        yield ParallelContext.create(config, device)
        return
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    rank = int(os.environ["RANK"])
    others_are_gone = False
    try:
        # What init_process_group would do by itself; done here to keep the store.
        store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = store_of_this_start(store, rank, world_size, timeout)
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore("default_pg", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )
        # Ranks with other layouts would wait for each other while they build the mesh.
        check_equal_on_all_ranks(ParallelContext(device), {"config": asdict(config)})
        context = ParallelContext.create(config, device, store)
        for warning in layout_warnings(config, int(os.environ.get("LOCAL_WORLD_SIZE", context.world_size))):
            warn(warning, context.is_main)
        yield context
        # A gloo rank that leaves while a peer still communicates aborts that peer. Only on the way out of a run that
        # succeeded: after an error the others may never come.
        torch.distributed.barrier()
    except RuntimeError as error:
        message = describe_communication_failure(error, rank)
        others_are_gone = message is not None or isinstance(error, CommunicationError)
        if message is not None:
            raise CommunicationError(message) from error
        raise
    finally:
        if torch.distributed.is_initialized() and not others_are_gone:  # it may wait for them
            torch.distributed.destroy_process_group()
