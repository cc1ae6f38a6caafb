"""Parameters that several stages of a pipeline hold: word embeddings, a tied head, tables of the relative bias.

Each of these stages has a copy. All copies start from the same values, get the sum of the gradients of all of them and
take the same optimizer steps, so that they stay equal bit by bit. The copy of the lowest stage, the owner, is the one
that norms, counts and checkpoints take.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.distributed.flat_all_reduce import all_reduce_gradients_
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor, model_parameters

CHECKSUM_CHUNK = 1 << 22  # elements


class _Holders(NamedTuple):
    """Pipeline ranks that hold a parameter, ascending, and the one that owns it."""

    ranks: tuple[int, ...]
    owner: int


class SharedParameters:
    """All parameters of this rank, with copies marked, and what has to be done to keep copies equal.

    All ranks construct it together, after tensor and data parallelism have divided the stages (and before or after they
    are materialised: its lists hold the modules' Parameter objects, which must not be replaced any more).

    Args:
        stages: The stage modules of this rank, ascending.
        stage_indices: Their places in the pipeline.
        context: The layout; with more than one pipeline rank.

    Attributes:
        parameters: All parameters of `stages`, in order.
    """

    def __init__(self, stages: Sequence[nn.Module], stage_indices: Sequence[int], context: ParallelContext) -> None:
        assert context.pp_group is not None and len(stages) == len(stage_indices)
        self.context = context
        names = {
            index: [name for name, _ in stage.named_parameters()]
            for index, stage in zip(stage_indices, stages, strict=True)
        }
        everywhere: list[dict[int, list[str]]] = [{}] * context.pp_size
        dist.all_gather_object(everywhere, names, group=context.pp_group)
        stages_of: dict[str, list[tuple[int, int]]] = defaultdict(list)  # name -> (stage, pipeline rank)
        for rank, stages_names in enumerate(everywhere):
            for stage, held in stages_names.items():
                for name in held:
                    stages_of[name].append((stage, rank))
        self._holders = {
            name: _Holders(tuple(sorted({rank for _, rank in holders})), min(holders)[1])
            for name, holders in stages_of.items()
            if len(holders) > 1
        }
        self.parameters = [
            replace(
                p,
                shared=p.name in self._holders,
                is_copy=p.is_copy or (p.name in self._holders and self._holders[p.name].owner != context.pp_rank),
            )
            for p in model_parameters(stages)
        ]
        self._copies: dict[str, list[nn.Parameter]] = defaultdict(list)  # those of this rank, lowest stage first
        for p in self.parameters:
            if p.shared:
                self._copies[p.name].append(p.parameter)
        self._global_ranks = dist.get_process_group_ranks(context.pp_group)
        self._groups = self._create_groups()

    def _create_groups(self) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """A process group for each set of pipeline ranks with a parameter in common that this rank is one of.

        All ranks of the world create all groups in the same order, as torch asks for (its local alternative hangs with
        groups that overlap).
        """
        context = self.context
        assert context.mesh is not None and context.pp_group is not None
        groups = {}
        for ranks in sorted({holders.ranks for holders in self._holders.values()}):
            if len(ranks) == context.pp_size:
                groups[ranks] = context.pp_group
            elif len(ranks) > 1:
                for dp_rank in range(context.dp_size):
                    for tp_rank in range(context.tp_size):
                        members = context.mesh.mesh[list(ranks), dp_rank, tp_rank].tolist()
                        group = dist.new_group(members, timeout=context.timeout)
                        if (dp_rank, tp_rank) == (context.dp_rank, context.tp_rank) and context.pp_rank in ranks:
                            groups[ranks] = group
        return groups

    def _by_group(self) -> list[tuple[tuple[int, ...], dist.ProcessGroup, list[str]]]:
        """Pipeline ranks, process group and names of the parameters that this rank shares with others."""
        return [
            (ranks, group, [name for name in sorted(self._copies) if self._holders[name].ranks == ranks])
            for ranks, group in self._groups.items()
        ]

    @torch.no_grad()
    def sum_gradients_(self) -> None:
        """Give every copy the sum of the gradients of all copies, the same bits everywhere.

        First the copies of each rank are summed, then one all-reduce for each set of ranks. All ranks call it, after
        gradients have been summed over the data-parallel ranks.
        """
        for copies in self._copies.values():
            for copy in copies[1:]:
                _local_gradient(copies[0]).add_(_local_gradient(copy))
        for _, group, names in self._by_group():
            all_reduce_gradients_([self._copies[name][0] for name in names], group)
        for copies in self._copies.values():
            for copy in copies[1:]:
                _local_gradient(copy).copy_(_local_gradient(copies[0]))

    @torch.no_grad()
    def synchronize(self, tensors: dict[str, Tensor]) -> None:
        """Replace each tensor, in place, by the one that the owner of the parameter of that name has.

        All ranks call it, equally often, with tensors of one dtype for the shared parameters that they hold; names that
        no other rank holds are left alone.
        """
        by_source: dict[tuple[tuple[int, ...], int], list[str]] = defaultdict(list)
        for name in sorted(tensors):
            holders = self._holders[name]
            if len(holders.ranks) > 1:
                by_source[holders.ranks, holders.owner].append(name)
        for (ranks, owner), names in sorted(by_source.items()):
            buffer = torch.cat([tensors[name].flatten() for name in names])
            dist.broadcast(buffer, src=self._global_ranks[owner], group=self._groups[ranks])
            pieces = buffer.split([tensors[name].numel() for name in names])
            for name, piece in zip(names, pieces, strict=True):
                tensors[name].copy_(piece.view_as(tensors[name]))

    @torch.no_grad()
    def check_equal(self) -> None:
        """Make sure that all copies have the same bits; all ranks call it together.

        Raises:
            RuntimeError: Copies of a parameter differ, which is a bug.
        """
        # One rank's copies differ: then it says so to the others first, which would wait for it otherwise.
        different = {
            name
            for name, (first, *others) in self._copies.items()
            if not all(torch.equal(_bits(first), _bits(other)) for other in others)
        }
        for ranks, group, names in self._by_group():
            mine = torch.stack([_fingerprint(self._copies[name][0], name in different) for name in names])  # [names, 3]
            gathered = [torch.empty_like(mine) for _ in ranks]
            dist.all_gather(gathered, mine, group=group)
            together = torch.stack(gathered)  # [ranks, names, 3]
            differs = (together != together[0]).any(dim=-1).any(dim=0) | (together[..., 2] > 0).any(dim=0)
            different.update(name for name, d in zip(names, differs.tolist(), strict=True) if d)
        if different:
            raise RuntimeError(f"stages of the pipeline hold different copies of {', '.join(sorted(different))}")


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return local_tensor(parameter.grad)


def _bits(parameter: nn.Parameter) -> Tensor:
    """The local part as integers."""
    return local_tensor(parameter.detach()).contiguous().flatten().view(torch.int32)


def _fingerprint(parameter: nn.Parameter, differs: bool) -> Tensor:
    """Sum of the bits of the local part, that weighted by position (both wrap around), and `differs`: int64 `[3]`."""
    total = torch.zeros(3, dtype=torch.int64, device=parameter.device)
    total[2] = differs
    for number, chunk in enumerate(_bits(parameter).split(CHECKSUM_CHUNK)):
        values = chunk.long()
        weights = torch.arange(1, len(values) + 1, device=values.device) + number * CHECKSUM_CHUNK
        total[0] += values.sum()
        total[1] += (values * weights).sum()
    return total
