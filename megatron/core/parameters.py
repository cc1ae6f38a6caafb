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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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
    """

    axes: tuple[str, ...]
    init: Init
    matrices: tuple[str, ...] = ("weight",)
    block: int = 1
    weight_decay: bool = True

    def __post_init__(self) -> None:
        assert len(self.init.scales) == len(self.matrices), (self.init, self.matrices)

    def matrix_of_rows(self, start: int, count: int, device: torch.device | None = None) -> torch.Tensor:
        """Index of the logical matrix of rows `start .. start + count`: int64 `[count]`."""
        rows = torch.arange(start, start + count, device=device)
        return (rows // self.block) % len(self.matrices)


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


def local_rows(parameter: torch.Tensor) -> tuple[int, int]:
    """First global row (dimension 0) and number of rows of `parameter` that this rank holds."""
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        assert tuple(shape[1:]) == tuple(parameter.shape[1:]), "only dimension 0 is sharded"
        return (offset[0], shape[0]) if shape[0] else (0, 0)
    return 0, parameter.shape[0]


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The rows of `parameter` that this rank holds, as a plain tensor sharing its storage."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


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


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` in place, deterministically from (seed, name, row), for any sharding."""
    specs = named_parameter_specs(model)
    for name, parameter in model.named_parameters():
        spec, local = specs[name], local_tensor(parameter)
        start, count = local_rows(parameter)
        if count == 0:
            continue
        scales = torch.tensor(spec.init.scales)[spec.matrix_of_rows(start, count)]
        scales = scales.view(-1, *[1] * (local.ndim - 1))  # [rows, 1, ...]
        if spec.init.distribution == "constant":
            local.copy_(scales.expand(local.shape))
            continue
        for number, first, end in _row_blocks(start, count, parameter.shape[0]):
            block = _draw_block(spec, (end - first, *parameter.shape[1:]), _seed(seed, name, number))
            low, high = max(first, start), min(end, start + count)
            values = block[low - first : high - first] * scales[low - start : high - start]
            local[low - start : high - start].copy_(values)
