"""Samples of text-to-text tasks: examples of several tasks mixed, and packed into rows.

    position k of the stream --mixture--> draw j of a task --permutation of an epoch--> example --packing--> row n

All of it is a pure function of (files, flags, seed, n), computed when asked for: the only data state of a run is the
number of consumed rows. Tasks are mixed in proportion to min(examples, cap) ** (1 / temperature); an epoch is as many
examples as these minima add up to, and each task goes through all of its own examples before one comes again.
Validation and test rows hold every example once, in the order of the files.

Legend: b rows, m examples, s_enc encoder tokens, s_dec decoder tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.core.config import DataConfig
from megatron.core.datasets import packing_helpers
from megatron.core.datasets.examples import ExampleStore, open_examples
from megatron.core.datasets.mixture import Mixture
from megatron.core.datasets.packing import PackedRows, SingleRows
from megatron.core.datasets.t5_dataset import Batch, SpecialTokens
from megatron.core.datasets.text_to_text_tasks import Task, load_tasks
from megatron.core.errors import UserError
from megatron.core.tokenizers import Tokenizer

_EXAMPLES_AT_A_TIME = 1 << 20  # when all are looked at
_RATE_UNIT = 1 << 32  # shares are counted in this part of an example, which leaves sizes exact


class Stream(Protocol):
    """An order of the examples of several stores."""

    examples_per_epoch: int

    def examples(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Store of each position `[m]`, and example in that store."""


class MixedStream:
    """Stores mixed by rates, each shuffled anew in each of its epochs; endless.

    Attributes:
        examples_per_epoch: Over all stores.
        counted: Examples that each store counts for.
    """

    def __init__(self, stores: Sequence[ExampleStore], tasks: Sequence[Task], temperature: float, seed: int) -> None:
        sizes = [len(store) for store in stores]
        self.counted = [min(size, task.max_examples or size) for size, task in zip(sizes, tasks, strict=True)]
        self.examples_per_epoch = sum(self.counted)
        self._mixture = Mixture([max(1, round(count ** (1 / temperature) * _RATE_UNIT)) for count in self.counted])
        self._sizes = np.array(sizes, np.int64)
        self._keys = np.array([_key(seed, task.name) for task in tasks], np.uint64)

    def examples(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Store of each position `[m]`, and example in that store."""
        stores, draws = self._mixture.draws(positions)
        return stores, packing_helpers.shuffled(stores, draws, self._sizes, self._keys)


class OrderedStream:
    """The examples of all stores, one store after the other; of one epoch."""

    def __init__(self, stores: Sequence[ExampleStore]) -> None:
        self._ends = np.cumsum([len(store) for store in stores])
        self.examples_per_epoch = int(self._ends[-1])

    def examples(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Store of each position `[m]`, and example in that store."""
        stores = np.searchsorted(self._ends, positions, side="right").astype(np.int32)
        return stores, positions - np.concatenate([[0], self._ends])[stores]


def _key(seed: int, name: str) -> int:
    """64 bits that differ between seeds and between tasks."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/task/{name}".encode(), digest_size=8).digest(), "little")


class TextToTextDataset:
    """Rows of examples.

    Attributes:
        encoder_length: Columns of an encoder row (s_enc).
        decoder_length: Columns of a decoder row (s_dec).
        windows_per_epoch: Rows of the (first) epoch.
        tokens_per_sample: Encoder and decoder tokens of a row without padding, mean over the epoch.
        fill_rate: Share of the row slots that hold data, mean over the epoch.
        num_examples: Examples of an epoch.
        kinds: Of one kind all.
    """

    kinds = ("text-to-text",)

    def __init__(
        self, stores: Sequence[ExampleStore], stream: Stream, special: SpecialTokens, lengths: tuple[int, int],
        packing_window: int | None, endless: bool,
    ) -> None:  # fmt: skip
        """Plan the rows of the first epoch.

        Args:
            stores: Examples; inputs and targets above `lengths` are cut, EOS kept.
            stream: Their order.
            special: Ids of the vocabulary.
            lengths: Tokens of an encoder and of a decoder row.
            packing_window: Examples that are packed together; None: one example a row.
            endless: Whether the stream goes on after an epoch; if not, the rows after it are empty.
        """
        self.encoder_length, self.decoder_length = lengths
        self.num_examples = stream.examples_per_epoch
        self._stores = stores
        self._stream = stream
        self._special = special
        self._endless = endless
        if packing_window is None:
            self._rows: PackedRows | SingleRows = SingleRows(self._lengths, self.num_examples)
        else:
            self._rows = PackedRows(self._lengths, self.num_examples, lengths, packing_window)
        self.windows_per_epoch = self._rows.rows_per_epoch
        self.tokens_per_sample = float(self._rows.lengths_per_epoch.sum() / self.windows_per_epoch)
        self.fill_rate = self.tokens_per_sample / sum(lengths)

    def batch(self, sample_ids: NDArray[np.int64]) -> Batch:
        """The rows of these ids `[b]`, in this order, with segment ids; -1 gives a row of padding."""
        ids = np.asarray(sample_ids, np.int64)
        positions, rows = self._examples(ids)
        stores, examples = self._stream.examples(positions)
        placements = np.column_stack([rows, stores, self._spans(stores, examples)])

        def rows_of(columns: int) -> NDArray[np.int32]:
            return np.empty((ids.size, columns), np.int32)

        inputs, input_segments = rows_of(self.encoder_length), rows_of(self.encoder_length)
        shifted, labels, target_segments = (rows_of(self.decoder_length) for _ in range(3))
        packing_helpers.fill_packed_rows(
            [store.tokens for store in self._stores], placements,
            self._special.pad_id, self._special.eos_id, self._special.decoder_start_id,
            inputs, shifted, labels, input_segments, target_segments,
        )  # fmt: skip
        return Batch(inputs, shifted, labels, input_segments, target_segments)

    def row_kinds(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Kind of each segment of the rows of these ids, `[b, segments]`: 0, or -1 where there is none."""
        segments = np.bincount(self._examples(np.asarray(sample_ids, np.int64))[1], minlength=len(sample_ids))
        return np.where(np.arange(segments.max(initial=0)) < segments[:, None], 0, -1).astype(np.int32)

    def epochs(self, num_samples: int) -> list[float]:
        """How often all examples were gone through after so many samples."""
        return [num_samples / self.windows_per_epoch]

    def _examples(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Position in the stream of each example of the rows of `ids`, and the place of its row among them."""
        real = np.flatnonzero(ids >= 0 if self._endless else (ids >= 0) & (ids < self.windows_per_epoch))
        positions, rows = self._rows.examples(ids[real])
        return positions, real[rows]

    def _spans(self, stores: NDArray[np.int32], examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token and length of the inputs, then of the targets, of examples `[m]`, cut to the rows: `[m, 4]`."""
        lengths = (self.encoder_length, self.decoder_length)
        return packing_helpers.example_spans([store.boundaries for store in self._stores], stores, examples, lengths)

    def _lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int32]:
        """Tokens of inputs and targets of the examples at `positions`, cut: `[m, 2]`."""
        return self._spans(*self._stream.examples(positions))[:, 1::2].astype(np.int32)


@dataclass(frozen=True)
class TextToTextDatasets:
    """The splits of some tasks.

    Attributes:
        train: Rows to train on, endless.
        valid: Rows of all validation files, None without any.
        test: Rows of all test files, None without any.
        tasks: All tasks, those without a training file too.
        warnings: One line for each file of which examples were cut.
        recognised_by: Of each task that is trained on, in order: name, fingerprint, examples that it counts for.
    """

    train: TextToTextDataset
    valid: TextToTextDataset | None
    test: TextToTextDataset | None
    tasks: list[Task]
    warnings: list[str]
    recognised_by: list[list[Any]]

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of the training examples, to recognise them."""
        return {"tasks": self.recognised_by}


def build_text_to_text(config: DataConfig, tokenizer: Tokenizer, seed: int) -> TextToTextDatasets:
    """The rows of the tasks that the flags name. Their files are tokenized when that was not done before.

    Args:
        config: Tasks, lengths, mixture and packing.
        tokenizer: Makes the ids.
        seed: Any integer; orders the examples.

    Raises:
        UserError: flags or files are unusable, no task has a training file, or a target is too long.
    """
    tasks = load_tasks(config)
    if not any(task.train for task in tasks):
        raise UserError(f"--task-config {config.task_config} has no task with a train file; add one")
    assert config.decoder_seq_length is not None
    lengths = (config.encoder_seq_length, config.decoder_seq_length)
    special = SpecialTokens.from_tokenizer(tokenizer)
    window = config.packing_window if config.packing == "segments" else None
    cache = None if config.data_cache_path is None else Path(config.data_cache_path)
    warnings: list[str] = []

    def stores_of(files: list[tuple[Task, Path]]) -> list[ExampleStore]:
        stores = [open_examples(path, task, tokenizer, cache) for task, path in files]
        for store in stores:
            warnings.extend(_cut_examples(store, lengths, config.truncate_targets))
        return stores

    def held_out(files: list[tuple[Task, Path]]) -> TextToTextDataset | None:
        stores = stores_of(files)
        return TextToTextDataset(stores, OrderedStream(stores), special, lengths, window, False) if stores else None

    training = [(task, task.train) for task in tasks if task.train]
    stores = stores_of(training)
    stream = MixedStream(stores, [task for task, _ in training], config.mixture_temperature, seed)
    return TextToTextDatasets(
        TextToTextDataset(stores, stream, special, lengths, window, True),
        held_out([(task, task.validation) for task in tasks if task.validation]),
        held_out([(task, task.test) for task in tasks if task.test]),
        tasks, warnings,
        [[t.name, s.fingerprint[:16], c] for (t, _), s, c in zip(training, stores, stream.counted, strict=True)],
    )  # fmt: skip


def _cut_examples(store: ExampleStore, most: tuple[int, int], truncate_targets: bool) -> list[str]:
    """A warning for inputs, and one for targets, that rows of `most` tokens cut.

    Raises:
        UserError: a target is too long, and is not to be cut.
    """
    counts, longest, first = np.zeros(2, np.int64), np.zeros(2, np.int64), -1
    for begin in range(0, len(store), _EXAMPLES_AT_A_TIME):
        lengths = store.lengths(begin, min(begin + _EXAMPLES_AT_A_TIME, len(store)))
        too_long = lengths > most
        counts += too_long.sum(axis=0)
        longest = np.maximum(longest, lengths.max(axis=0))
        if first < 0 and too_long[:, 1].any():
            first = begin + int(too_long[:, 1].argmax())
    if first >= 0 and not truncate_targets:
        length = store.lengths(first, first + 1)[0, 1]
        raise UserError(
            f"{store.path}:{store.line(first)}: its target has {length} tokens, a decoder row {most[1]}; give "
            f"--decoder-seq-length {longest[1]}, which holds all of the file's, or --truncate-targets"
        )
    sides = zip(("inputs", "targets"), counts, most, longest, strict=True)
    return [
        f"{store.path}: {count:,} of {len(store):,} {side} were cut to {limit} tokens; the longest has {top}"
        for side, count, limit, top in sides
        if count
    ]
