"""Opens the data of a run: a corpus or the examples of tasks, the tokenizer, and the datasets of the three splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.config import DataConfig, TokenizerConfig
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.indexed_dataset import IndexedDataset, manifest_path, resolve_prefix
from megatron.core.datasets.loader import Dataset
from megatron.core.datasets.t5_dataset import SpecialTokens, build_datasets
from megatron.core.datasets.text_to_text import build_text_to_text
from megatron.core.datasets.text_to_text_tasks import Task
from megatron.core.dist_checkpointing import published_checkpoints
from megatron.core.errors import UserError
from megatron.core.huggingface import HuggingFaceCheckpoint, load_huggingface_tokenizer
from megatron.core.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from megatron.training.config import RunConfig

# The fingerprint of a dataset is that of so many tokens at so many places, evenly spread.
FINGERPRINT_TOKENS = 64
FINGERPRINT_PLACES = 256


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Attributes:
        tokenizer: The tokenizer that made the tokens.
        special: Its special ids.
        train: Dataset of the training split.
        valid: Dataset of the validation split, or None when it has no sample.
        test: Dataset of the test split, or None when it has no sample.
        fingerprint: What a checkpoint records of the dataset.
        tasks: Of text-to-text; nothing otherwise.
        warnings: One line for each thing about the data that the user should know.
    """

    tokenizer: Tokenizer
    special: SpecialTokens
    train: Dataset
    valid: Dataset | None
    test: Dataset | None
    fingerprint: dict[str, Any]
    tasks: Sequence[Task] = ()
    warnings: Sequence[str] = ()

    def describe(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint records of the tokenizer and of the dataset, to recognise both."""
        return {"tokenizer": self.tokenizer.describe(), "dataset": self.fingerprint}


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
    """Open the data that the configuration names.

    A corpus opens in constant time and memory, whatever its size. The examples of text-to-text are tokenized once into
    a cache, which all processes share.
    """
    return _open_tasks(config) if config.data.objective == "text-to-text" else _open_corpus(config)


def row_lengths(config: DataConfig) -> tuple[int, int]:
    """Tokens of an encoder and of a decoder row of the objective, without looking at any data."""
    if config.objective == "text-to-text":
        assert config.decoder_seq_length is not None
        return config.encoder_seq_length, config.decoder_seq_length
    plan = DenoisingPlan.build(config, num_sentinels=2**31)
    return plan.encoder_length, plan.decoder_length


def _open_corpus(config: RunConfig) -> TrainingData:
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
    return TrainingData(
        tokenizer, special, datasets.train, datasets.valid, datasets.test,
        fingerprint=describe_dataset(indexed), warnings=datasets.warnings,
    )  # fmt: skip


def _open_tasks(config: RunConfig) -> TrainingData:
    tokenizer = tokenizer_of_tasks(config)
    datasets = build_text_to_text(config.data, tokenizer, config.training.seed)
    return TrainingData(
        tokenizer, SpecialTokens.from_tokenizer(tokenizer), datasets.train, datasets.valid, datasets.test,
        fingerprint=datasets.describe(), tasks=datasets.tasks, warnings=datasets.warnings,
    )  # fmt: skip


def prepare_tasks(config: RunConfig) -> None:
    """Tokenize the examples of text-to-text on this process, so that the others find them done."""
    _open_tasks(config)


def tokenizer_of_tasks(config: RunConfig) -> Tokenizer:
    """The tokenizer of the flags, or else the one of the model that the run starts from."""
    flags, checkpoint = config.tokenizer, config.checkpoint
    if flags.tokenizer_type or flags.tokenizer_model or flags.vocab_file:
        return build_tokenizer(flags)
    if checkpoint.save is not None and published_checkpoints(Path(checkpoint.save)):
        return load_tokenizer(Path(checkpoint.save, "tokenizer"))
    if checkpoint.load is None:
        raise UserError(
            "--objective text-to-text needs a tokenizer; give --tokenizer-type and --tokenizer-model (or "
            "--vocab-file), or a model that has one with --load"
        )
    if HuggingFaceCheckpoint.is_one(Path(checkpoint.load)):
        return load_huggingface_tokenizer(Path(checkpoint.load))
    return load_tokenizer(Path(checkpoint.load, "tokenizer"))


def fit_vocabulary(config: RunConfig, tokenizer: Tokenizer, given: bool) -> None:
    """Give the model the tokenizer's vocabulary size, or check the one that was `given` explicitly."""
    if not given:
        config.model.vocab_size = tokenizer.vocab_size
    elif config.model.vocab_size < tokenizer.vocab_size:  # type: ignore[operator]
        raise UserError(
            f"--vocab-size is {config.model.vocab_size}, but the tokenizer uses {tokenizer.vocab_size} ids; "
            "raise it, or leave it out to follow the tokenizer"
        )
    config.model.check_vocabulary(config.parallel.tensor_model_parallel_size)
