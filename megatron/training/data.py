"""Opens the data of a run: corpora or the examples of tasks, the tokenizer, and the datasets of the three splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.config import DataConfig
from megatron.core.datasets.corpus import SPLITS
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.loader import Dataset
from megatron.core.datasets.t5_dataset import SpecialTokens
from megatron.core.datasets.text_to_text import build_text_to_text
from megatron.core.datasets.text_to_text_tasks import Task
from megatron.core.dist_checkpointing import published_checkpoints
from megatron.core.errors import UserError
from megatron.core.huggingface import HuggingFaceCheckpoint, load_huggingface_tokenizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from megatron.training.config import RunConfig
from megatron.training.corpora import open_corpora, prepare_texts
from megatron.training.stopping import StopControl

_ANY_SENTINELS = 1 << 31


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
        corpora: Names of those that are trained on; nothing for text-to-text.
        warnings: One line for each thing about the data that the user should know.
    """

    tokenizer: Tokenizer
    special: SpecialTokens
    train: Dataset
    valid: Dataset | None
    test: Dataset | None
    fingerprint: dict[str, Any]
    tasks: Sequence[Task] = ()
    corpora: Sequence[str] = ()
    warnings: Sequence[str] = ()

    def describe(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint records of the tokenizer and of the dataset, to recognise both."""
        return {"tokenizer": self.tokenizer.describe(), "dataset": self.fingerprint}


def open_data(config: RunConfig) -> TrainingData:
    """Open the data that the configuration names.

    A corpus opens in constant time and memory, whatever its size. The examples of text-to-text are tokenized once into
    a cache, which all processes share.
    """
    return _open_tasks(config) if config.data.objective == "text-to-text" else _open_corpora(config)


def row_lengths(config: DataConfig) -> tuple[int, int]:
    """Tokens of an encoder and of a decoder row of the objective, without looking at any data."""
    if config.objective == "text-to-text":
        assert config.decoder_seq_length is not None
        return config.encoder_seq_length, config.decoder_seq_length
    plan = DenoisingPlan.build(config, _ANY_SENTINELS)
    return plan.encoder_length, plan.decoder_length


def _open_corpora(config: RunConfig) -> TrainingData:
    opened = open_corpora(config)
    train, valid, test = (opened.datasets[name] for name in SPLITS)
    assert train is not None
    longest = max(train.encoder_length, train.decoder_length)
    if config.model.position_embedding_type == "learned_absolute" and longest > config.model.max_position_embeddings:
        raise UserError(
            f"--max-position-embeddings is {config.model.max_position_embeddings}, but the objective makes rows of "
            f"{longest} tokens; raise it, or shorten --encoder-seq-length"
        )
    special = SpecialTokens.from_tokenizer(opened.tokenizer)
    return TrainingData(
        opened.tokenizer, special, train, valid, test,
        fingerprint=opened.fingerprint, corpora=opened.names, warnings=opened.warnings,
    )  # fmt: skip


def _open_tasks(config: RunConfig) -> TrainingData:
    tokenizer = tokenizer_of_tasks(config)
    datasets = build_text_to_text(config.data, tokenizer, config.training.seed)
    return TrainingData(
        tokenizer, SpecialTokens.from_tokenizer(tokenizer), datasets.train, datasets.valid, datasets.test,
        fingerprint=datasets.describe(), tasks=datasets.tasks, warnings=datasets.warnings,
    )  # fmt: skip


def prepare_data(config: RunConfig, context: ParallelContext, stop: StopControl) -> None:
    """Tokenize what is given as text, on one process (of each node, where these share no disk); the others wait.

    A wish to stop, of any rank, interrupts that; the next `stop.poll` then tells so. What is done is kept, as far as
    the next start can go on from it.
    """
    tasks = config.data.objective == "text-to-text"
    work = partial(stop.interruptible, partial(_open_tasks if tasks else prepare_texts, config))
    (context.on_main if tasks else context.on_local_main)(work, "tokenization", stop.tell_others)


def tokenizer_of_tasks(config: RunConfig) -> Tokenizer:
    """The tokenizer of the flags, or else the one of the model that the run starts from."""
    flags, checkpoint = config.tokenizer, config.checkpoint
    if flags.names_tokenizer:
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
