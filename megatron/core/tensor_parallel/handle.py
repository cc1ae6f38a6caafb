"""The tensor-parallel ranks as the layers see them.

Shapes: b batch, s sequence, s' this rank's part of the padded sequence, h hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.config import ParallelConfig
from megatron.core.extensions import cpu_elementwise
from megatron.core.parallel_state import ParallelContext
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.dropout_mask import dropout_mask
from megatron.core.tensor_parallel.products import linear
from megatron.core.tensor_parallel.weight_gradients import LinearFunction


class TensorParallel:
    """The ranks that divide each layer, passed to whatever layer needs them; without arguments, a single one.

    Between the blocks of a layer, activations are replicated over the ranks; under sequence parallelism each rank has
    an equal part of the sequence, whose length is padded to a multiple of the ranks.

    Args:
        group: Process group of the ranks; None for a single one.
        sequence_parallel: Divide activations between blocks along the sequence.
        device: Where dropout masks are drawn.
    """

    def __init__(
        self, group: ProcessGroup | None = None, sequence_parallel: bool = False, device: torch.device | None = None
    ) -> None:
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self._group = group
        self._devices = [device] if device is not None and device.type != "cpu" else []
        self.sequence_parallel = sequence_parallel and self.size > 1
        # The product of all linear layers; pipelines replace it (see `weight_gradients`).
        self.linear: LinearFunction = linear

    @classmethod
    def of(cls, context: ParallelContext, config: ParallelConfig) -> TensorParallel:
        """Those of a layout of processes."""
        return cls(context.tp_group, config.sequence_parallel, context.device)

    @property
    def group(self) -> ProcessGroup:
        """Process group of the ranks, of which there are at least two."""
        assert self._group is not None
        return self._group

    def round_up(self, count: int) -> int:
        """The next number that divides among the ranks."""
        return -(-count // self.size) * self.size

    def padded_length(self, length: int) -> int:
        """Length to which sequences are padded."""
        return self.round_up(length) if self.sequence_parallel else length

    def enter(self, x: Tensor) -> Tensor:
        """Activations between blocks `[b, s', h]` to the input of column-parallel products `[b, s, h]`."""
        if self.size == 1:
            return x
        if self.sequence_parallel:
            return mappings.gather_for_product(x, 1, self.group)
        return mappings.copy_to_ranks(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """This rank's share of a row-parallel product `[b, s, h]` to activations between blocks `[b, s', h]`."""
        if self.size == 1:
            return x
        if self.sequence_parallel:
            return mappings.reduce_scatter_from_ranks(x, 1, self.group)
        return mappings.reduce_from_ranks(x, self.group)

    def copy(self, x: Tensor) -> Tensor:
        """A tensor `[b, s, h]` that every rank has whole, to the input of column-parallel products."""
        return x if self.size == 1 else mappings.copy_to_ranks(x, self.group)

    def join_last(self, x: Tensor) -> Tensor:
        """The output of a column-parallel product `[..., n / ranks]` to the whole `[..., n]` on every rank."""
        return x if self.size == 1 else mappings.gather_for_all(x, -1, self.group)

    def join_sequence(self, x: Tensor, length: int) -> Tensor:
        """Activations between blocks `[b, s', h]` to the whole sequence `[b, length, h]`, without its padding."""
        if not self.sequence_parallel:
            return x
        return mappings.gather_for_all(x, 1, self.group)[:, :length]

    def split_sequence(self, x: Tensor) -> Tensor:
        """A whole sequence `[b, s, h]`, equal on all ranks, to activations between blocks `[b, s', h]`."""
        if not self.sequence_parallel:
            return x
        padding = self.padded_length(x.shape[1]) - x.shape[1]
        return mappings.split_among_ranks(F.pad(x, (0, 0, 0, padding)), 1, self.group)

    @contextmanager
    def single_positions(self, linear: LinearFunction) -> Iterator[None]:
        """Inside, generation decodes single positions: activations are whole on each rank, `linear` the product."""
        before = self.sequence_parallel, self.linear
        self.sequence_parallel, self.linear = False, linear
        try:
            yield
        finally:
            self.sequence_parallel, self.linear = before

    def dropout(self, x: Tensor, probability: float, training: bool) -> Tensor:
        """Dropout of a tensor of which each rank has another part: attention probabilities, feed-forward units.

        Masks differ from rank to rank, but all ranks draw one seed, the same one, from torch's generator of the CPU:
        nothing but torch's generators has a state, and activation recomputation, which restores those, draws the same
        masks again. torch.compile takes it as it is.
        """
        if not training or probability == 0.0:
            return x
        if cpu_elementwise.supports(x):
            return cpu_elementwise.dropout(x, probability, self.dropout_stream)
        if self.size == 1 or self.sequence_parallel:
            return F.dropout(x, probability)
        return torch.where(dropout_mask(x, probability, self.dropout_stream), x * (1.0 / (1.0 - probability)), 0.0)

    @property
    def dropout_stream(self) -> int:
        """What makes masks of divided activations differ between ranks, whose generators are in the same state.

        Under sequence parallelism every activation is divided, and the generators differ (see `seed_dropout`).
        """
        return 0 if self.sequence_parallel else self.rank

    @contextmanager
    def split_dropout(self) -> Iterator[None]:
        """Inside, torch's random numbers differ from rank to rank; outside they are equal (and go on so).

        For operators that draw masks of divided activations by themselves; otherwise see `dropout`. The stream inside
        is seeded by a draw from the stream outside and the rank. torch.compile cannot do this.
        """
        if self.size == 1 or self.sequence_parallel:
            yield
            return
        seed = int(torch.randint(2**62, (), device="cpu"))
        with torch.random.fork_rng(self._devices, enabled=True):
            torch.manual_seed(self._seed_of_rank(seed))
            yield

    def seed_dropout(self, seed: int) -> None:
        """Start the streams of dropout anew; `seed` is the same on all tensor-parallel ranks."""
        torch.manual_seed(self._seed_of_rank(seed) if self.sequence_parallel else seed)

    def _seed_of_rank(self, seed: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.rank}".encode()).digest()[:7], "little")
