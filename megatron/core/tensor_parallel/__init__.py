"""Layers with parameters that may be split over ranks, and the loss over the vocabulary."""

from megatron.core.tensor_parallel.cross_entropy import IGNORED_LABEL, TokenLoss, vocab_cross_entropy
from megatron.core.tensor_parallel.layers import Embedding, Linear

__all__ = ["IGNORED_LABEL", "Embedding", "Linear", "TokenLoss", "vocab_cross_entropy"]
