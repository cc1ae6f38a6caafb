"""Keys of earlier starts of a job do not reach a later one."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from megatron.core.errors import CommunicationError
from megatron.training.rendezvous import store_of_this_start

TIMEOUT = timedelta(seconds=30)


def _start(store: Store, world_size: int) -> list[Store]:
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: store_of_this_start(store, rank, world_size, TIMEOUT), range(world_size)))


def test_all_ranks_of_a_start_share_keys_of_their_own() -> None:
    store = HashStore()
    store.set("hello/2", "said by a process that died before it was answered")
    for start in range(3):
        stores = _start(store, 3)
        assert not any(each.check(["address"]) for each in stores), "an address of an earlier start"
        stores[1].set("address", str(start))
        assert [each.get("address") for each in stores] == [str(start).encode()] * 3


def test_a_rank_that_never_starts_is_named() -> None:
    with pytest.raises(CommunicationError, match="rank 0: ranks 1-2 did not start within 0 s"):
        store_of_this_start(HashStore(), 0, 3, timedelta(0))
