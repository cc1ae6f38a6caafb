"""Denoised samples of tokens in memory."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron.core.config import DataConfig
from megatron.core.datasets.corpus import CorpusRange
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.t5_dataset import DenoisingDataset, SpecialTokens


def in_memory(*pieces: np.ndarray, tokens: tuple[int, int] | None = None, name: str = "corpus") -> CorpusRange:
    """A corpus of these arrays end to end, or the range `tokens` of it; one document."""
    corpus: Any = SimpleNamespace(pieces=list(pieces), num_documents=1)
    return CorpusRange(corpus, name, (0, 1), tokens or (0, sum(piece.size for piece in pieces)))


def mode_ids(mode: str) -> tuple[int, ...]:
    """Two ids for each mode, 2 .. 9 and 10."""
    return 2 + sum(map(ord, mode)) % 8, 10


def plan_for(
    config: DataConfig,
    special: SpecialTokens,
    pad_to_multiple_of: int = 1,
    tokenize: Callable[[str], Sequence[int]] = mode_ids,
) -> DenoisingPlan:
    """The plan of an objective whose modes have the ids above."""
    return DenoisingPlan.build(config, len(special.sentinel_ids), tokenize, pad_to_multiple_of)


def denoised(
    tokens: np.ndarray, special: SpecialTokens, config: DataConfig, seed: int = 0, name: str = "train", **options: Any
) -> DenoisingDataset:
    """The samples of one array."""
    return DenoisingDataset([in_memory(tokens)], plan_for(config, special), special, seed, name, **options)
