"""The key-value store of one start of a job."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

from megatron.core.errors import CommunicationError
from megatron.training.consistency import rank_ranges

POLL_S = 0.02


def store_of_this_start(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """`store` without the keys of earlier starts; all ranks call it, and all get the same keys.

    When torchrun restarts a job its store lives on, with the addresses that the processes of the last start left
    there; a rank that reads such an address connects to nobody. Nothing that torchrun tells a process differs between
    two starts and is the same on all nodes (each counts its own restarts), so the ranks agree on a name: rank 0
    chooses it and gives it to whoever says a word of his own, and a rank believes only the answer to its word.

    Raises:
        CommunicationError: On rank 0, another rank did not start in time.
        torch.distributed.DistStoreError: On the others, rank 0 did not.
    """
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", mine)
        name = store.get(f"welcome/{mine}").decode()
        store.set(f"here/{name}/{rank}", "")
        return PrefixStore(name, store)
    answered: dict[int, bytes] = {}
    missing = set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"here/{mine}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]) and answered.get(other) != (word := store.get(f"hello/{other}")):
                store.set(f"welcome/{word.decode()}", mine)
                answered[other] = word
        if missing and time.monotonic() > deadline:
            raise CommunicationError(
                f"rank 0: {rank_ranges(sorted(missing))} did not start within {timeout.total_seconds():.0f} s"
            )
        time.sleep(POLL_S if missing else 0)
    return PrefixStore(mine, store)
