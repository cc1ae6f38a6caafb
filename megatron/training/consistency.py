"""Start-up check that all processes were started alike: same flags, same data, same software.

Ranks that differ would train nonsense or wait for each other until a timeout, so a difference is found before anything
else is communicated. A digest of 32 bytes a rank is compared; values travel only when digests differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import megatron
from megatron.core.config import flag_name
from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.core.tensor_parallel.mappings import all_gather

# A message is one line: so many differing entries, and so many groups of ranks each, are spelled out.
MAX_ENTRIES = 4
MAX_VALUES = 4
ABSENT = "nothing"


def check_equal_on_all_ranks(context: ParallelContext, values: Mapping[str, Any]) -> None:
    """Compare `values`, and the versions of this package and of torch, over all processes; all call it together.

    One process has nothing to compare. The default process group is used, so that it can be called before the mesh
    exists, which itself depends on the flags.

    Args:
        context: Only its device is used.
        values: Plain nested values that JSON can hold. What is under `config` is named as flags.

    Raises:
        UserError: Something differs; the same line on every rank, with the entries, their values and the ranks.
    """
    world = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    if world is None or world.size() == 1:
        return
    versions = {"version": {"megatron-t5": megatron.__version__, "torch": str(torch.__version__)}}
    mine = dict(_flatten({**versions, **values}))
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()
    sent = torch.tensor(list(digest), dtype=torch.uint8, device=context.device)
    digests = all_gather(sent[None], 0, world)  # [ranks, 32]
    if bool((digests == sent).all()):
        # Equality is transitive: when one rank sees all digests equal to its own, every rank does.
        return
    of_ranks: list[Any] = [None] * world.size()
    torch.distributed.all_gather_object(of_ranks, mine)
    raise UserError(describe_differences(of_ranks))


def describe_differences(of_ranks: Sequence[Mapping[str, str]]) -> str:
    """One line about the entries that differ between ranks, such as `--lr is 0.01 on ranks 0-2 and 0.02 on rank 3`.

    Args:
        of_ranks: Of each rank, its values as text by name. At least two ranks differ.
    """
    names = list(dict.fromkeys(name for values in of_ranks for name in values))
    differing = [name for name in names if len({values.get(name) for values in of_ranks}) > 1]
    assert differing, "ranks with equal values"
    parts = [_describe_entry(name, [values.get(name, ABSENT) for values in of_ranks]) for name in differing]
    if len(parts) > MAX_ENTRIES:
        parts[MAX_ENTRIES:] = [f"{len(parts) - MAX_ENTRIES} more entries differ"]
    return "; ".join(parts) + "; start all ranks with the same flags, data and software"


def _describe_entry(name: str, of_ranks: Sequence[str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(of_ranks):
        ranks.setdefault(value, []).append(rank)
    groups = [f"{value} on {rank_ranges(holders)}" for value, holders in list(ranks.items())[:MAX_VALUES]]
    if len(ranks) > MAX_VALUES:
        groups.append(f"{len(ranks) - MAX_VALUES} other values elsewhere")
    return f"{name} is {', '.join(groups[:-1])} and {groups[-1]}"


def rank_ranges(ranks: Sequence[int]) -> str:
    """Ascending ranks as text: `[0, 1, 2, 5]` -> `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(texts)


def _flatten(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every leaf of nested mappings as (name for the user, value as JSON)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*path, key))
        else:
            is_flag = path[:1] == ("config",)
            yield flag_name(key) if is_flag else " ".join((*path, key)), json.dumps(value, sort_keys=True)
