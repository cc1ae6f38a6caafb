"""What a parameter is, apart from its values: logical axes, logical matrices and initial distribution.

Three things need more than a tensor's shape:

* placement: which logical axis goes to which mesh axis;
* optimizers that scale by the RMS of a matrix (Adafactor, AdamWScale): a fused projection holds several logical
  matrices, and each must be scaled by its own RMS, or fusing would change the training;
* initialisation: every logical matrix has its own scale, and each rank draws only the rows it holds.

A fused parameter stores its logical matrices interleaved in blocks of rows, e.g. `(head, q|k|v, d_kv)`: row r
belongs to matrix `(r // block) % len(matrices)`. A shard of consecutive rows then holds the same share of each.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron.core.parallel_state import ParallelContext

# Rows that are drawn together from one seed. A rank draws whole blocks and keeps its own rows, so the values do not
# depend on how rows are divided among ranks.
INIT_BLOCK_ROWS = 64
# Standard deviation of a unit normal truncated to [-2, 2]; variance-scaling initialisers divide by it.
TRUNCATED_NORMAL_STD = 0.87962566103423978


@dataclass(frozen=True)
class Init:
    """Initial distribution of a parameter.

    Attributes:
        distribution: `constant`, `normal`, `truncated_normal` (at two standard deviations) or `uniform`.
        scales: One number a logical matrix: the value, the standard deviation (after truncation), or the bound of
            the symmetric uniform interval.
    """

    distribution: Literal["constant", "normal", "truncated_normal", "uniform"]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class ParamSpec:
    """Description of one parameter; kept on its module, because sharding replaces the Parameter object.

    Attributes:
        axes: Name of each dimension, e.g. `("heads", "embed")`.
        init: Initial distribution.
        matrices: Names of the logical matrices stored in this parameter.
        block: Consecutive rows (dimension 0) that belong to one logical matrix.
        weight_decay: Whether decoupled weight decay applies.
        valid_shape: Global shape without the padding that lets a dimension divide among ranks: what lies beyond is
            zero, gets no gradient, counts nowhere and is not in checkpoints. None: the parameter's.
    """

    axes: tuple[str, ...]
    init: Init
    matrices: tuple[str, ...] = ("weight",)
    block: int = 1
    weight_decay: bool = True
    valid_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert len(self.init.scales) == len(self.matrices), (self.init, self.matrices)

    def matrix_of_rows(self, start: int, count: int, device: torch.device | None = None) -> torch.Tensor:
        """Index of the logical matrix of rows `start .. start + count`: int64 `[count]`."""
        rows = torch.arange(start, start + count, device=device)
        return (rows // self.block) % len(self.matrices)

    def shape_of(self, parameter: torch.Tensor) -> torch.Size:
        """Global shape of the parameter without padding."""
        return parameter.shape if self.valid_shape is None else torch.Size(self.valid_shape)


def named_parameter_specs(model: nn.Module) -> dict[str, ParamSpec]:
    """Spec of every parameter by its qualified name; each module keeps them in `parameter_specs`."""
    specs: dict[str, ParamSpec] = {}
    for prefix, module in model.named_modules():
        local: dict[str, ParamSpec] = getattr(module, "parameter_specs", {})
        for name, parameter in module.named_parameters(recurse=False):
            qualified = f"{prefix}.{name}" if prefix else name
            assert name in local, f"{qualified} has no ParamSpec"
            assert len(local[name].axes) == parameter.ndim, f"{qualified}: axes {local[name].axes}, {parameter.shape}"
            specs[qualified] = local[name]
    return specs


@dataclass(frozen=True)
class ModelParameter:
    """One parameter that this rank holds (a part of).

    Attributes:
        name: Global name, the same on every layout.
        parameter: Plain, or a DTensor over the axes that divide it.
        spec: What it is.
        shared: Whether other stages of the pipeline hold copies of it. All copies get the same gradient and take the
            same steps.
        is_copy: Whether a lower stage, on this rank or another, holds it too: norms, counts and checkpoints take that
            one.
    """

    name: str
    parameter: nn.Parameter
    spec: ParamSpec
    shared: bool = False
    is_copy: bool = False

    @property
    def shape(self) -> torch.Size:
        """Global shape without padding."""
        return self.spec.shape_of(self.parameter)


def model_parameters(stages: Sequence[nn.Module]) -> list[ModelParameter]:
    """All parameters of the modules of this rank, in order; a name that comes again is a copy.

    Copies that other ranks hold are unknown here (see `core.distributed.SharedParameters`).
    """
    counts = Counter(name for stage in stages for name, _ in stage.named_parameters())
    found: list[ModelParameter] = []
    seen: set[str] = set()
    for stage in stages:
        specs = named_parameter_specs(stage)
        for name, parameter in stage.named_parameters():
            found.append(ModelParameter(name, parameter, specs[name], counts[name] > 1, name in seen))
            seen.add(name)
    return found


def shard_parameters(model: nn.Module, mesh: DeviceMesh, sharded_axes: Collection[str]) -> None:
    """Replace every parameter of `model` (on the meta device) by a DTensor of its global shape on the 1-D `mesh`.

    Args:
        model: The model; its parameters have their global shapes.
        mesh: The tensor-parallel ranks.
        sharded_axes: Logical axes that are divided over `mesh`; at most one a parameter.

    Raises:
        AssertionError: A dimension does not divide; configuration checks come first.
    """
    for module in model.modules():
        specs: dict[str, ParamSpec] = getattr(module, "parameter_specs", {})
        for name, parameter in list(module.named_parameters(recurse=False)):
            assert parameter.is_meta, f"{name} is materialised already"
            dims = [dim for dim, axis in enumerate(specs[name].axes) if axis in sharded_axes]
            assert len(dims) <= 1, f"{name}: {specs[name].axes}"
            local, placement = parameter.detach(), Replicate() if not dims else Shard(dims[0])
            if dims:
                assert local.shape[dims[0]] % mesh.size() == 0, f"{name} {tuple(local.shape)} over {mesh.size()} ranks"
                local = local.chunk(mesh.size(), dims[0])[0].contiguous()
            whole = DTensor.from_local(
                local, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            setattr(module, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def sharded_axes(parameter: torch.Tensor) -> tuple[str, ...]:
    """Names of the mesh axes over which `parameter` is divided (not replicated)."""
    if not isinstance(parameter, DTensor):
        return ()
    names = parameter.device_mesh.mesh_dim_names
    assert names is not None
    return tuple(n for n, placement in zip(names, parameter.placements, strict=True) if not placement.is_replicate())


def counted_here(parameter: torch.Tensor, context: ParallelContext) -> bool:
    """Whether this rank's part of `parameter` is the one to count among its data- and tensor-parallel replicas.

    A rank counts what it holds a shard of; of replicas, the one of rank 0 of the replicating axis counts.
    """
    axes = sharded_axes(parameter)
    return ("dp" in axes or context.dp_rank == 0) and ("tp" in axes or context.tp_rank == 0)


def local_slice(parameter: torch.Tensor, dim: int) -> tuple[int, int]:
    """First global index and number of indices of dimension `dim` of `parameter` that this rank holds."""
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return (offset[dim], shape[dim]) if shape[dim] else (0, 0)
    return 0, parameter.shape[dim]


def buckets(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of consecutive `sizes`, joined as long as they fit into `limit` together; a larger one is alone."""
    found: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if size > room:
            found.append([])
            room = limit
        found[-1].append(index)
        room -= size
    return found


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The part of `parameter` that this rank holds, as a plain tensor; differentiable, and sharing its storage."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def without_padding(tensor: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What this rank holds of the leading `shape` of `tensor`, the rest being padding.

    Returns:
        A view of the local part, maybe empty, and the global indices of its first element.
    """
    part, offsets = local_tensor(tensor), []
    for dim, size in enumerate(shape):
        start, count = local_slice(tensor, dim)
        offsets.append(min(start, size))
        part = part.narrow(dim, 0, min(count, size - offsets[-1]))
    return part, tuple(offsets)


def _seed(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _draw_block(spec: ParamSpec, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Unit-scale values of one block of rows, fp32 on the CPU, whatever the device: equal on every layout."""
    block = torch.empty(shape, dtype=torch.float32, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if spec.init.distribution == "normal":
        return block.normal_(generator=generator)
    if spec.init.distribution == "uniform":
        return block.uniform_(-1.0, 1.0, generator=generator)
    nn.init.trunc_normal_(block, generator=generator)  # unit normal cut at -2 and 2
    return block.div_(TRUNCATED_NORMAL_STD)


def _row_blocks(start: int, count: int, total: int) -> Iterator[tuple[int, int, int]]:
    """Blocks that cover rows start .. start + count: (block number, first row, end row), cut at the last row."""
    for number in range(start // INIT_BLOCK_ROWS, -(-(start + count) // INIT_BLOCK_ROWS)):
        first = number * INIT_BLOCK_ROWS
        yield number, first, min(first + INIT_BLOCK_ROWS, total)


def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` in place, deterministically from (seed, name, row), for any sharding."""
    specs = named_parameter_specs(model)
    tasks = [
        task
        for name, parameter in model.named_parameters()
        for task in _initialization(parameter.detach(), specs[name], name, seed)
    ]
    # A generator yields its numbers one after the other, but each block has its own: threads share the blocks. Within
    # a block, threads of torch's would cost more than they spare.
    num_threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(task: Callable[[], object]) -> None:
        with torch.inference_mode(inference):  # a thread does not take it over
            task()

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(run, tasks):
                pass
    finally:
        torch.set_num_threads(num_threads)


def _initialization(parameter: torch.Tensor, spec: ParamSpec, name: str, seed: int) -> Iterator[Callable[[], object]]:
    """The parts of filling this rank's share of `parameter`; none depends on another."""
    shape = spec.shape_of(parameter)
    if shape != parameter.shape:
        local_tensor(parameter).zero_()
    local, offsets = without_padding(parameter, shape)
    if local.numel() == 0:
        return
    start, count = offsets[0], local.shape[0]
    scales = torch.tensor(spec.init.scales)[spec.matrix_of_rows(start, count)]
    scales = scales.view(-1, *[1] * (local.ndim - 1))  # [rows, 1, ...]
    if spec.init.distribution == "constant":
        yield partial(local.copy_, scales.expand(local.shape))
        return

    def fill(number: int, first: int, end: int) -> None:
        block = _draw_block(spec, (end - first, *shape[1:]), _seed(seed, name, number))
        if local.ndim > 1:
            block = block.narrow(1, offsets[1], local.shape[1])
        low, high = max(first, start), min(end, start + count)
        local[low - start : high - start].copy_(block[low - first : high - first] * scales[low - start : high - start])

    for number, first, end in _row_blocks(start, count, shape[0]):
        yield partial(fill, number, first, end)
