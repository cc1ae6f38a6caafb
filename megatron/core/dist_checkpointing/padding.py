"""Tensors without the padding that lets dimensions divide among ranks: checkpoints do not depend on the layout."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron.core.parameters import without_padding


class Unpadded:
    """The leading part of a tensor, which is all of it that a checkpoint is to hold.

    Implements the protocol by which torch's planner asks an object for its chunks; a rank has one, or none when it
    holds nothing but padding.

    Args:
        tensor: Plain (equal on all ranks) or a DTensor.
        shape: Its global shape without padding.

    Attributes:
        part: View of what this rank holds of it.
        offsets: Global indices of its first element.
        shape: As given.
        dtype: Of the tensor.
    """

    def __init__(self, tensor: torch.Tensor, shape: Sequence[int]) -> None:
        self.part, offsets = without_padding(tensor.detach(), shape)
        self.offsets = torch.Size(offsets)
        self.shape = torch.Size(shape)
        self.dtype = tensor.dtype

    def moved_to(self, part: torch.Tensor) -> Unpadded:
        """The same part of the same tensor in other memory, of the same shape."""
        assert part.shape == self.part.shape and part.dtype == self.dtype
        moved = copy.copy(self)
        moved.part = part
        return moved

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        # A tensor without elements has a chunk all the same: it is to be listed.
        some = self.part.numel() or 0 in self.shape
        return [ChunkStorageMetadata(self.offsets, self.part.shape)] if some else []

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.part)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


class SavePlanner(DefaultSavePlanner):
    """torch's planner for flat dictionaries of tensors and `Unpadded` ones.

    Of pieces that several ranks hold, it lets one write each, such that ranks write about equally much.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """What this rank holds of the tensor of that name."""
        found = self.state_dict[index.fqn]
        return found.part if isinstance(found, Unpadded) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """torch's planner for flat dictionaries of tensors and `Unpadded` ones."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, object], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As torch's, which would also replace what is no tensor by None."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """What this rank holds of the tensor of that name."""
        found = self.state_dict[index.fqn]
        return found.part if isinstance(found, Unpadded) else super().lookup_tensor(index)
