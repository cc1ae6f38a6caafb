"""The layout of processes, passed explicitly to whatever needs it; there are no module globals."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron.core.config import ParallelConfig
from megatron.core.errors import UserError

T = TypeVar("T")

SECONDS_BETWEEN_LOOKS = 0.5  # of processes that wait for the main one

MESH_AXES = ("pp", "dp", "tp")  # outermost first: tensor-parallel neighbours are adjacent ranks, inside one node


@dataclass(frozen=True)
class ParallelContext:
    """Where this process stands.

    Attributes:
        device: Device this process computes on.
        world_size: Number of processes.
        rank: This process, counted over all nodes.
        mesh: Device mesh with the axes of `MESH_AXES`, or None when there is a single process, which then needs no
            process group at all.
        dp_tp_group: Process group of the ranks of this pipeline rank (dp x tp together), or None without a mesh.
        control_group: Gloo group of all ranks for small agreements between hosts, used from the main thread only; None
            for a single process.
        store: Key-value store of the job, or None when the process group was made without one at hand.
        timeout: Time after which a collective ends the job, for groups that are created later; None: torch's.
    """

    device: torch.device
    world_size: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None
    dp_tp_group: ProcessGroup | None = None
    control_group: ProcessGroup | None = None
    store: Store | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and self.device.index is None and torch.cuda.is_available():
            # "The present GPU" would be another one in threads, and tensors on it say its number.
            object.__setattr__(self, "device", torch.device("cuda", torch.cuda.current_device()))

    @classmethod
    def create(cls, config: ParallelConfig, device: torch.device, store: Store | None = None) -> ParallelContext:
        """Build the mesh over the initialised default process group (a single process needs none).

        Raises:
            UserError: The number of processes does not fit the layout.
        """
        initialized = torch.distributed.is_initialized()
        world_size = torch.distributed.get_world_size() if initialized else 1
        model_parallel = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
        if world_size % model_parallel:
            raise UserError(
                f"the number of processes is {world_size}, not a multiple of --tensor-model-parallel-size "
                f"{config.tensor_model_parallel_size} x --pipeline-model-parallel-size "
                f"{config.pipeline_model_parallel_size}; start that many with torchrun, or lower a size"
            )
        if not initialized:
            return cls(device=device)
        shape = (config.pipeline_model_parallel_size, world_size // model_parallel, config.tensor_model_parallel_size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=MESH_AXES)
        dp_tp_group = mesh["dp", "tp"]._flatten("dp_tp").get_group()
        timeout = timedelta(minutes=config.distributed_timeout_minutes)
        control_group = None
        if torch.distributed.get_backend() != "fake":  # which has no timeouts and exchanges nothing
            for group in (*mesh.get_all_groups(), dp_tp_group):  # torch gives new groups its own default
                group.set_timeout(timeout)
            control_group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        rank = torch.distributed.get_rank()
        return cls(device, world_size, rank, mesh, dp_tp_group, control_group, store, timeout)

    # Cached below: torch takes 0.1 ms to look an axis up, and the gradient norm asks for every parameter.
    def _size(self, axis: str) -> int:
        return 1 if self.mesh is None else self.mesh[axis].size()

    def _rank(self, axis: str) -> int:
        return 0 if self.mesh is None else self.mesh[axis].get_local_rank()

    def _group(self, axis: str) -> ProcessGroup | None:
        return None if self.mesh is None else self.mesh[axis].get_group()

    @cached_property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""
        return self._size("dp")

    @cached_property
    def dp_rank(self) -> int:
        """This process among the data-parallel ranks."""
        return self._rank("dp")

    @cached_property
    def dp_group(self) -> ProcessGroup | None:
        """Process group of the data-parallel ranks, or None for a single process."""
        return self._group("dp")

    @cached_property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self._size("tp")

    @cached_property
    def tp_rank(self) -> int:
        """This process among the tensor-parallel ranks."""
        return self._rank("tp")

    @cached_property
    def tp_group(self) -> ProcessGroup | None:
        """Process group of the tensor-parallel ranks, or None for a single process."""
        return self._group("tp")

    @cached_property
    def pp_size(self) -> int:
        """Number of pipeline ranks."""
        return self._size("pp")

    @cached_property
    def pp_rank(self) -> int:
        """This process among the pipeline ranks."""
        return self._rank("pp")

    @cached_property
    def pp_group(self) -> ProcessGroup | None:
        """Process group of the pipeline ranks, or None for a single process."""
        return self._group("pp")

    def sharding_group(self, *, over_dp: bool, over_tp: bool) -> ProcessGroup | None:
        """Process group of the ranks among which a parameter is divided, or None when it is not divided at all."""
        over_dp, over_tp = over_dp and self.dp_size > 1, over_tp and self.tp_size > 1
        if over_dp and over_tp:
            return self.dp_tp_group
        return self.dp_group if over_dp else self.tp_group if over_tp else None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def on_main(
        self,
        function: Callable[[], T],
        patiently_at: str | None = None,
        while_waiting: Callable[[], object] | None = None,
    ) -> T:
        """What `function` returns on the main process (picklable), on every process; all call it together.

        Args:
            function: What to do there.
            patiently_at: A name that this run uses once, for what may take longer than a collective may: the others
                then look every now and then whether it is done.
            while_waiting: What they call whenever they look.

        Raises:
            UserError: `function` raised it, or an OSError; on every process, so that none waits for another.
        """
        outcome: list[Any] = [None, None]  # result, error
        done = f"on_main/{patiently_at}"
        if self.is_main:
            outcome = _outcome_of(function)
            if patiently_at is not None and self.store is not None:
                self.store.set(done, "")
        elif patiently_at is not None and self.store is not None:
            while not self.store.check([done]):
                _wait_a_little(while_waiting)
        if self.mesh is not None:
            torch.distributed.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def on_local_main(
        self, function: Callable[[], object], patiently_at: str, while_waiting: Callable[[], object] | None = None
    ) -> None:
        """Let `function` run on one process of each node; all processes call this together and leave it together.

        It may take longer than a collective may. Without torchrun, which numbers the processes of a node, every process
        runs it. A mistake that it meets ends the waiting at once, whatever other nodes are still at.

        Args:
            function: What to do there.
            patiently_at: A name that this run uses once.
            while_waiting: What processes that have nothing to do, or are done, call every now and then.

        Raises:
            UserError: `function` raised it on a node, or an OSError; on every process, so that none waits for another.
        """
        error = _outcome_of(function)[1] if os.environ.get("LOCAL_RANK", "0") == "0" else None
        if self.store is not None:
            name = f"on_local_main/{patiently_at}"
            if error is not None:
                self.store.set(f"{name}/error", str(error))
            self.store.add(name, 1)
            while not self.store.check([f"{name}/error"]) and self.store.add(name, 0) < self.world_size:
                _wait_a_little(while_waiting)
            # A process that has counted all the others has to look again: the last one may have told of its error.
            if self.store.check([f"{name}/error"]):
                raise UserError(self.store.get(f"{name}/error").decode())
        elif self.control_group is not None:
            errors: list[UserError | None] = [None] * self.world_size
            torch.distributed.all_gather_object(errors, error, group=self.control_group)
            error = next((error for error in errors if error is not None), None)
        if error is not None:
            raise error


def _wait_a_little(while_waiting: Callable[[], object] | None) -> None:
    if while_waiting is not None:
        while_waiting()
    time.sleep(SECONDS_BETWEEN_LOOKS)


def _outcome_of(function: Callable[[], object]) -> list[Any]:
    """What `function` returns, and the user's mistake that it met; one of them is None."""
    try:
        return [function(), None]
    except UserError as error:
        return [None, error]
    except OSError as error:
        return [None, UserError(f"{error.filename or 'a file'}: {error.strerror}; mend this")]
