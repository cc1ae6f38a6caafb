"""T5 samples from an indexed dataset: span corruption of a token stream (Raffel et al. 2020).

The documents of a split are one token stream, joined into a ring. An epoch cuts it into windows that do not
overlap, in random order; a window becomes one sample of exactly the objective's length, without padding.
Sample n is a pure function of (tokens, seed, n), so there is no index to build and no state to save but n.

The tokens of the corpus are not searched for sentinels: one that stands in the raw text is copied as it is,
as in Google's implementation; keeping them out is the preprocessing's part.

Legend: b samples, s_enc encoder tokens, s_dec decoder tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.core.config import DataConfig
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.errors import UserError

IGNORED_LABEL = -100
"""Label of a position that the loss leaves out."""

PADDING_SAMPLE = -1
"""Sample id of a row without data."""

SPLIT_NAMES = ("train", "valid", "test")


class SpanLengths(NamedTuple):
    """Token counts of a span-corrupted sample."""

    raw: int
    """Tokens of the window before corruption."""
    inputs: int
    """Encoder tokens: what is not noise, one sentinel a span, and EOS."""
    targets: int
    """Decoder tokens: the noise, one sentinel a span, and EOS."""
    noise_tokens: int
    """Masked tokens of the window."""
    num_spans: int
    """Spans that the masked tokens form."""


def _lengths_of_window(raw: int, noise_density: float, mean_span_length: float) -> SpanLengths:
    noise = min(max(round(raw * noise_density), 1), raw - 1)
    spans = max(round(noise / mean_span_length), 1)
    return SpanLengths(raw, raw - noise + spans + 1, noise + spans + 1, noise, spans)


def span_corruption_lengths(
    encoder_seq_length: int, noise_density: float, mean_noise_span_length: float
) -> SpanLengths:
    """The largest window whose corrupted form fits the encoder (`random_spans_helper` of Google's t5).

    Its inputs are exactly `encoder_seq_length` tokens, but for a noise density of 0.5, where they can be one fewer.

    Args:
        encoder_seq_length: Most tokens that an encoder row may have.
        noise_density: Share of the window that is masked, in (0, 1).
        mean_noise_span_length: Mean tokens of a masked span, at least 1.

    Raises:
        UserError: No window fits, or the spans are more than the tokens between them.
    """

    def of_window(raw: int) -> SpanLengths:
        return _lengths_of_window(raw, noise_density, mean_noise_span_length)

    if mean_noise_span_length < 1:
        raise UserError(f"--mean-noise-span-length is {mean_noise_span_length:g}; a span has at least 1 token")
    fits, too_long = 2, 4
    if of_window(fits).inputs > encoder_seq_length:
        raise UserError(
            f"--encoder-seq-length is {encoder_seq_length}; a span-corrupted sample has at least "
            f"{of_window(fits).inputs} encoder tokens"
        )
    # The inputs never shrink as the window grows, so bisection finds the last window that fits.
    while of_window(too_long).inputs <= encoder_seq_length:
        fits, too_long = too_long, 2 * too_long
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if of_window(middle).inputs <= encoder_seq_length:
            fits = middle
        else:
            too_long = middle
    lengths = of_window(fits)
    # With half of the tokens noise, Google keeps the targets no longer than the inputs.
    if noise_density == 0.5 and lengths.targets > lengths.inputs:
        lengths = of_window(fits - 1)
    if lengths.num_spans > lengths.raw - lengths.noise_tokens:
        raise UserError(
            f"--noise-density {noise_density:g} with --mean-noise-span-length {mean_noise_span_length:g} puts "
            f"{lengths.num_spans} spans between {lengths.raw - lengths.noise_tokens} unmasked tokens; lower the "
            "density or make the spans longer"
        )
    return lengths


class Batch(NamedTuple):
    """Rows for the model."""

    encoder_input_ids: NDArray[np.int32]
    """[b, s_enc]"""
    decoder_input_ids: NDArray[np.int32]
    """[b, s_dec], the targets shifted right behind the decoder start token."""
    labels: NDArray[np.int32]
    """[b, s_dec], -100 where there is nothing to predict."""
    encoder_segment_ids: NDArray[np.int32] | None = None
    """[b, s_enc], examples of packed rows from 1, 0 for padding; None when rows are single and full."""
    decoder_segment_ids: NDArray[np.int32] | None = None
    """[b, s_dec], likewise; given exactly when the encoder's are."""


class Tokenizer(Protocol):
    """What the datasets need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def pad_id(self) -> int: ...  # noqa: D102
    @property
    def eos_id(self) -> int: ...  # noqa: D102
    @property
    def decoder_start_id(self) -> int: ...  # noqa: D102
    @property
    def sentinel_ids(self) -> tuple[int, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that corruption adds to the text."""

    vocab_size: int
    """Ids that the tokenizer uses, sentinels included."""
    pad_id: int
    """Fills rows."""
    eos_id: int
    """Ends inputs and targets."""
    decoder_start_id: int
    """First decoder input; the pad id in T5."""
    sentinel_ids: tuple[int, ...]
    """Stand for spans, in order of use."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> SpecialTokens:
        """The ids of a tokenizer."""
        return cls(
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            decoder_start_id=tokenizer.decoder_start_id,
            sentinel_ids=tuple(tokenizer.sentinel_ids),
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class SpanCorruptionDataset:
    """Span-corrupted samples of a range of tokens: an endless sequence, epoch after epoch.

    Attributes:
        lengths: Token counts of every sample.
        encoder_length: Columns of an encoder row (s_enc).
        decoder_length: Columns of a decoder row (s_dec).
        token_range: [begin, end) of the split in the corpus.
        windows_per_epoch: Samples after which every token (but fewer than one window) has been used once.
        tokens_per_sample: Encoder and decoder tokens of a sample, without padding.
        fill_rate: Share of the row slots that hold data; 1.0 unless rows are padded.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        token_range: tuple[int, int],
        special: SpecialTokens,
        config: DataConfig,
        seed: int,
        name: str = "",
        *,
        source: str = "",
        pad_to_multiple_of: int = 1,
    ) -> None:
        """Check that the objective fits rows, sentinels and corpus; reads no token.

        Args:
            tokens: All tokens of the corpus, one-dimensional; a memory map stays one.
            token_range: [begin, end) of the split.
            special: Ids of the vocabulary.
            config: Lengths and noise.
            seed: Any integer; datasets with different names share no random numbers for one seed.
            name: Split, such as "train".
            source: What messages call the corpus.
            pad_to_multiple_of: Pad both rows to a multiple of this, for hardware or sequence parallelism.

        Raises:
            UserError: The rows are too short, the sentinels too few or the corpus shorter than one window.
        """
        self.lengths = span_corruption_lengths(
            config.encoder_seq_length, config.noise_density, config.mean_noise_span_length
        )
        self.encoder_length = _round_up(self.lengths.inputs, pad_to_multiple_of)
        self.decoder_length = _round_up(self.lengths.targets, pad_to_multiple_of)
        self.fill_rate = (self.lengths.inputs + self.lengths.targets) / (self.encoder_length + self.decoder_length)
        self.special = special
        self.name = name
        self.source = source or "the corpus"
        self._check_decoder_and_sentinels(config)
        num_tokens = token_range[1] - token_range[0]
        if num_tokens < self.lengths.raw:
            raise UserError(
                f"{self.source} has {num_tokens} {name} tokens, but one sample takes {self.lengths.raw}; "
                "use more text, another --split or a smaller --encoder-seq-length"
            )
        self.windows_per_epoch = num_tokens // self.lengths.raw
        self.tokens_per_sample = self.lengths.inputs + self.lengths.targets
        self._tokens = tokens
        self.token_range = token_range
        self._begin, self._end = token_range
        self._key = _dataset_key(seed, name)
        self._sentinel_ids = np.array(special.sentinel_ids, dtype=np.int32)

    def _check_decoder_and_sentinels(self, config: DataConfig) -> None:
        objective = (
            f"--encoder-seq-length {config.encoder_seq_length} with --noise-density {config.noise_density:g} and "
            f"--mean-noise-span-length {config.mean_noise_span_length:g}"
        )
        if config.decoder_seq_length is not None and config.decoder_seq_length < self.lengths.targets:
            raise UserError(
                f"--decoder-seq-length is {config.decoder_seq_length}, but {objective} needs "
                f"{self.lengths.targets}; raise it or leave it out"
            )
        if self.lengths.num_spans > len(self.special.sentinel_ids):
            raise UserError(
                f"{objective} makes {self.lengths.num_spans} spans a sample, but the tokenizer has "
                f"{len(self.special.sentinel_ids)} sentinels; raise --mean-noise-span-length, lower "
                "--encoder-seq-length or --noise-density, or use a tokenizer with more (--vocab-extra-ids)"
            )

    kinds = ("span-corruption",)

    def row_kinds(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Kind of each row `[b, 1]`: 0, or -1 for padding."""
        return np.where(np.asarray(sample_ids) >= 0, 0, -1).astype(np.int32)[:, None]

    def epochs(self, num_samples: int) -> list[float]:
        """How often the tokens were gone through after so many samples."""
        return [num_samples / self.windows_per_epoch]

    def batch(self, sample_ids: NDArray[np.int64]) -> Batch:
        """The samples of these ids, in this order.

        Args:
            sample_ids: [b] integers; -1 gives a row of padding whose labels are all -100.

        Raises:
            UserError: The corpus has a token id outside the vocabulary.
        """
        ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
        batch = Batch(
            np.empty((ids.size, self.encoder_length), np.int32),
            np.empty((ids.size, self.decoder_length), np.int32),
            np.empty((ids.size, self.decoder_length), np.int32),
        )
        try:
            helpers.fill_span_corruption(
                self._tokens,
                self._begin,
                self._end,
                ids,
                self.lengths.raw,
                self.lengths.noise_tokens,
                self.lengths.num_spans,
                self._key,
                self.special.vocab_size,
                self.special.pad_id,
                self.special.eos_id,
                self.special.decoder_start_id,
                self._sentinel_ids,
                batch.encoder_input_ids,
                batch.decoder_input_ids,
                batch.labels,
            )
        except helpers.TokenOutOfVocabularyError as error:
            raise UserError(
                f"{self.source}: {error}; use the tokenizer that the corpus was preprocessed with"
            ) from None
        return batch

    @property
    def tokens(self) -> NDArray[np.integer]:
        """The tokens of the split, in the type of the corpus."""
        return self._tokens[self._begin : self._end]

    def window(self, sample_id: int) -> NDArray[np.integer]:
        """The raw tokens of a sample, [lengths.raw], in the type of the corpus."""
        ids = np.array([sample_id], dtype=np.int64)
        (start,) = helpers.window_starts(self._begin, self._end, self.lengths.raw, self._key, ids)
        stop = int(start) + self.lengths.raw
        head = self._tokens[start : min(stop, self._end)]
        return np.concatenate([head, self._tokens[self._begin : self._begin + self.lengths.raw - head.size]])


def _dataset_key(seed: int, name: str) -> int:
    """64 bits that differ between seeds of any size and between names."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def split_token_ranges(indexed: IndexedDataset, weights: tuple[float, float, float]) -> dict[str, tuple[int, int]]:
    """Token ranges of train, valid and test: runs of whole documents in order, rounded as Megatron's `--split`.

    Args:
        indexed: The corpus.
        weights: Shares of the documents, summing to 1.

    Returns:
        Name of the split -> [begin, end) in tokens; begin == end when it has no documents.
    """
    num_documents = indexed.num_documents
    bounds = [min(round(share * num_documents), num_documents) for share in accumulate(weights, initial=0.0)]
    offsets = [indexed.document_start(bound) for bound in bounds]
    return dict(zip(SPLIT_NAMES, pairwise(offsets), strict=True))


class T5Datasets(NamedTuple):
    """The splits of a corpus; what is None has no data."""

    train: SpanCorruptionDataset
    valid: SpanCorruptionDataset | None
    test: SpanCorruptionDataset | None
    warnings: list[str]
    """One line for each split that was asked for and has too little data."""


def build_datasets(
    config: DataConfig, indexed: IndexedDataset, special: SpecialTokens, seed: int, *, pad_to_multiple_of: int = 1
) -> T5Datasets:
    """The training, validation and test samples of a corpus.

    Args:
        config: `--split`, lengths and noise.
        indexed: The corpus.
        special: Ids of the vocabulary.
        seed: Any integer.
        pad_to_multiple_of: Pad rows to a multiple of this.

    Raises:
        UserError: The objective does not fit, or the training split is shorter than one sample. Validation and
            test splits that are too short are left out with a warning.
    """
    weights = config.split_weights()
    ranges = split_token_ranges(indexed, weights)

    def build(name: str) -> SpanCorruptionDataset:
        return SpanCorruptionDataset(
            indexed.tokens, ranges[name], special, config, seed, name,
            source=str(indexed.prefix), pad_to_multiple_of=pad_to_multiple_of,
        )  # fmt: skip

    train = build("train")
    held_out: dict[str, SpanCorruptionDataset | None] = {}
    warnings = []
    for name, weight in zip(SPLIT_NAMES[1:], weights[1:], strict=True):
        num_tokens = ranges[name][1] - ranges[name][0]
        held_out[name] = build(name) if num_tokens >= train.lengths.raw else None
        if weight > 0 and held_out[name] is None:
            use = "validation" if name == "valid" else name
            warnings.append(
                f"--split {config.split} leaves {num_tokens} of {indexed.prefix}'s tokens for {use}, but one sample "
                f"takes {train.lengths.raw}; there will be no {use} loss"
            )
    return T5Datasets(train, held_out["valid"], held_out["test"], warnings)
