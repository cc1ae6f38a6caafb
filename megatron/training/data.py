"""Opens the corpus of a run: indexed dataset, its tokenizer, and the datasets of the three splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.core.config import DataConfig, TokenizerConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, manifest_path, resolve_prefix
from megatron.core.datasets.t5_dataset import SpanCorruptionDataset, SpecialTokens, build_datasets
from megatron.core.errors import UserError
from megatron.core.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from megatron.training.config import RunConfig

# The fingerprint of a dataset is that of so many tokens at so many places, evenly spread.
FINGERPRINT_TOKENS = 64
FINGERPRINT_PLACES = 256


@dataclass(frozen=True)
class TrainingData:
    """The corpus of a run.

    Attributes:
        indexed: The tokens on disk.
        tokenizer: The tokenizer that made them.
        special: Its special ids.
        train: Dataset of the training split.
        valid: Dataset of the validation split, or None when it has no window.
        test: Dataset of the test split, or None when it has no window.
        warnings: One line for each split that came out empty.
    """

    indexed: IndexedDataset
    tokenizer: Tokenizer
    special: SpecialTokens
    train: SpanCorruptionDataset
    valid: SpanCorruptionDataset | None
    test: SpanCorruptionDataset | None
    warnings: list[str]

    def describe(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint records of the tokenizer and of the dataset, to recognise both."""
        return {"tokenizer": self.tokenizer.describe(), "dataset": describe_dataset(self.indexed)}


def describe_dataset(indexed: IndexedDataset) -> dict[str, Any]:
    """Size and fingerprint of a dataset; the fingerprint reads a few hundred places, however large the dataset is."""
    tokens = indexed.tokens
    starts = np.linspace(0, max(0, tokens.size - FINGERPRINT_TOKENS), FINGERPRINT_PLACES, dtype=np.int64)
    digest = hashlib.sha256()
    for start in starts:
        digest.update(np.ascontiguousarray(tokens[start : start + FINGERPRINT_TOKENS], dtype="<i8").tobytes())
    return {
        "num_documents": indexed.num_documents,
        "num_tokens": int(tokens.size),
        "fingerprint": digest.hexdigest()[:16],
    }


def _single_prefix(config: DataConfig) -> str:
    if not config.data_path:
        raise UserError("--data-path is missing; give the prefix of a dataset made by tools/preprocess_data.py")
    if len(config.data_path) > 1:
        raise UserError(f"--data-path has {len(config.data_path)} values; this version trains on one dataset")
    return config.data_path[0]


def _manifest_entry(indexed: IndexedDataset, *keys: str) -> str:
    """The text under nested `keys` of the dataset's manifest."""
    value: Any = indexed.manifest
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise UserError(
            f"{manifest_path(indexed.prefix)} has no {'.'.join(keys)}; preprocess the corpus again, or remove it "
            "and give --tokenizer-type and --tokenizer-model (or --vocab-file)"
        )
    return value


def resolve_tokenizer(indexed: IndexedDataset, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of the flags, or else the one that travels with the data; checked against the manifest."""
    given = config.tokenizer_type or config.tokenizer_model or config.vocab_file
    if given:
        tokenizer, source = build_tokenizer(config), "the tokenizer of the flags"
    elif indexed.manifest is None:
        raise UserError(
            f"{indexed.prefix} has no manifest that names its tokenizer; give --tokenizer-type and --tokenizer-model "
            "(or --vocab-file)"
        )
    else:
        directory = indexed.prefix.parent / _manifest_entry(indexed, "tokenizer_directory")
        tokenizer, source = load_tokenizer(directory), str(directory)
    if indexed.manifest is not None:
        recorded = _manifest_entry(indexed, "tokenizer", "fingerprint")
        if recorded != tokenizer.fingerprint:
            raise UserError(
                f"{source} ({tokenizer.type}, {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}) "
                f"is not the one that made {indexed.prefix} (fingerprint {recorded[:12]}); use that one, or preprocess "
                "the corpus again"
            )
    if config.vocab_extra_ids not in (None, len(tokenizer.sentinel_ids)):
        raise UserError(
            f"--vocab-extra-ids is {config.vocab_extra_ids}, but the tokenizer of {indexed.prefix} has "
            f"{len(tokenizer.sentinel_ids)} sentinels; leave the flag out, or preprocess the corpus again"
        )
    return tokenizer


def open_data(config: RunConfig) -> TrainingData:
    """Open the corpus that the configuration names; constant in time and memory, whatever its size."""
    indexed = IndexedDataset(resolve_prefix(_single_prefix(config.data)))
    tokenizer = resolve_tokenizer(indexed, config.tokenizer)
    special = SpecialTokens.from_tokenizer(tokenizer)
    datasets = build_datasets(config.data, indexed, special, config.training.seed)
    longest = max(datasets.train.encoder_length, datasets.train.decoder_length)
    if config.model.position_embedding_type == "learned_absolute" and longest > config.model.max_position_embeddings:
        raise UserError(
            f"--max-position-embeddings is {config.model.max_position_embeddings}, but the objective makes rows of "
            f"{longest} tokens; raise it, or shorten --encoder-seq-length"
        )
    return TrainingData(indexed, tokenizer, special, datasets.train, datasets.valid, datasets.test, datasets.warnings)


def fit_vocabulary(config: RunConfig, tokenizer: Tokenizer, given: bool) -> None:
    """Give the model the tokenizer's vocabulary size, or check the one that was `given` explicitly."""
    if not given:
        config.model.vocab_size = tokenizer.vocab_size
    elif config.model.vocab_size < tokenizer.vocab_size:  # type: ignore[operator]
        raise UserError(
            f"--vocab-size is {config.model.vocab_size}, but the tokenizer uses {tokenizer.vocab_size} ids; "
            "raise it, or leave it out to follow the tokenizer"
        )
    config.check_vocabulary()
