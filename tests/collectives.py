"""Counting what ranks send each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountCollectives(TorchDispatchMode):
    """While it is entered, counts the collectives of this thread, forward and backward.

    torch's CommDebugMode does it too, but its module hooks fail when a module runs several times before the backward.

    Attributes:
        calls: Number of calls by operator, e.g. `allreduce_`, `_allgather_base_`, `_reduce_scatter_base_`, `send`.
        nbytes: Bytes of each operator's largest tensors: what is gathered, scattered or summed, as a whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name != "wait_tensor":
                self.calls[name] += 1
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                self.nbytes[name] += max((tensor.nbytes for tensor in tensors), default=0)
        return func(*args, **(kwargs or {}))
