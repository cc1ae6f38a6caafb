"""Layers with parameters that may be split over ranks, and the loss over the vocabulary."""

from megatron.core.tensor_parallel.handle import TensorParallel
from megatron.core.tensor_parallel.head_loss import IGNORED_LABEL, TokenLoss, head_loss
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    Embedding,
    Linear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    join_logits,
    vocab_parallel_logits,
)

__all__ = [
    "IGNORED_LABEL",
    "ColumnParallelLinear",
    "Embedding",
    "Linear",
    "RowParallelLinear",
    "TensorParallel",
    "TokenLoss",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "head_loss",
    "join_logits",
    "vocab_parallel_logits",
]
