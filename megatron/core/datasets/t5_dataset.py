"""T5 samples from corpora: denoising of token streams (Raffel et al. 2020; Tay et al. 2022).

The documents of a split are one token stream, joined into a ring. An epoch cuts it into windows that do not overlap, in
random order; a window becomes one sample of exactly the objective's length. A blend has a ring for each of its corpora.
Sample n is a pure function of (tokens, seed, n), so there is no index to build and no state to save but n.

The tokens of the corpus are not searched for sentinels: one that stands in the raw text is copied as it is,
as in Google's implementation; keeping them out is the preprocessing's part.

Legend: b samples, s_enc encoder tokens, s_dec decoder tokens, m windows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets import helpers
from megatron.core.datasets.corpus import CorpusRange
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.blending import Blend

IGNORED_LABEL = -100
"""Label of a position that the loss leaves out."""

PADDING_SAMPLE = -1
"""Sample id of a row without data."""


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


class DenoisingDataset:
    """Denoised windows of a corpus or of a blend of corpora: an endless sequence, epoch after epoch.

    Attributes:
        plan: Denoisers and lengths.
        parts: The corpora, or what is used of them.
        blend: Which part each sample is from; None: there is one.
        special: Ids of the vocabulary.
        name: Split, such as "train".
        kinds: Names of the denoisers.
        encoder_length: Columns of an encoder row (s_enc).
        decoder_length: Columns of a decoder row (s_dec).
        windows_per_epoch: Samples after which every token (but fewer than one window) has been used once; of a blend
            the sum over its corpora.
        tokens_per_sample: Encoder and decoder tokens of a sample without padding, mean.
        fill_rate: Share of the row slots that hold data, mean.
    """

    def __init__(
        self,
        parts: Sequence[CorpusRange],
        plan: DenoisingPlan,
        special: SpecialTokens,
        seed: int,
        name: str = "",
        *,
        blend: Blend | None = None,
        block_windows: int = 1,
    ) -> None:
        """Check that the corpora are long enough; reads no token.

        Args:
            parts: What samples are made of; several need a blend.
            plan: Denoisers and lengths, for the tokenizer of `special`.
            special: Ids of the vocabulary.
            seed: Any integer; datasets with different names share no random numbers for one seed.
            name: Split, such as "train".
            blend: Which part each sample is from; None: there is one.
            block_windows: Neighbouring windows that are read one after the other (`--shuffle-block-windows`).

        Raises:
            UserError: A part is shorter than one window.
        """
        assert blend is not None or len(parts) == 1
        self.plan = plan
        self.parts = tuple(parts)
        self.special = special
        self.name = name
        self.kinds = tuple(denoiser.name for denoiser in plan.denoisers)
        self.encoder_length, self.decoder_length = plan.encoder_length, plan.decoder_length
        self.tokens_per_sample = plan.tokens_per_sample
        self.fill_rate = self.tokens_per_sample / (self.encoder_length + self.decoder_length)
        longest = max(window.raw for window in plan.windows)
        for part in parts:
            if part.num_tokens < longest:
                raise UserError(
                    f"{part.name} has {part.num_tokens} {name} tokens, but one sample takes {longest}; "
                    "use more text, another --split or a smaller --encoder-seq-length"
                )
        ranges = np.array([part.tokens for part in parts], np.int64)
        keys = [dataset_key(seed, name if blend is None else f"{name}/{index}") for index in range(len(parts))]
        self.blend = blend
        self._windows_a_row = 2 if plan.paired else 1
        # Rows that are not full need segment ids, which keep the model from attending to padding.
        full = plan.windows[0].inputs == self.encoder_length and len({window.inputs for window in plan.windows}) == 1
        varies = any(denoiser.noise_density is None for denoiser in plan.denoisers)
        self._has_segments = varies or not full
        self._whole_blocks = block_windows > 1
        self._denoisers = denoisers_for(plan, special)
        self._filler = RowFiller(parts, plan, special, self._denoisers, reads_ahead=self._whole_blocks)
        self._layouts = helpers.WindowLayouts(
            ranges, np.array(keys, np.uint64), np.array([window.raw for window in plan.windows], np.int64),
            plan.mixture.fractions, plan.mixture.children, block_windows,
        )  # fmt: skip
        self._windows = self._layouts.windows_per_epoch  # of each part
        # A pair is made of neighbours in the order of the windows, whatever epoch they are of.
        self.windows_per_epoch = int(np.maximum(self._windows // self._windows_a_row, 1).sum())

    def batch(self, sample_ids: NDArray[np.int64]) -> Batch:
        """The samples of these ids, in this order.

        Args:
            sample_ids: [b] integers; -1 gives a row of padding whose labels are all -100.

        Raises:
            UserError: A corpus has a token id outside the vocabulary.
        """
        datasets, draws = self._draws(sample_ids)
        read = self._layouts.examples(datasets, draws, True)[0] if self._whole_blocks else None
        examples, keys = self._examples_of(datasets, draws)
        return self._filler.rows(len(sample_ids), examples, keys, with_segments=self._has_segments, read=read)

    def row_kinds(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Denoiser of each window of the rows, an index into `kinds`; -1: none.  # [b, 1], of pairs [b, 2]"""
        examples, _ = self._examples(sample_ids)
        kinds = np.full((len(sample_ids), self._windows_a_row), -1, np.int32)
        kinds[examples[:, _ROW], np.arange(len(examples)) % self._windows_a_row] = examples[:, _DENOISER]
        return kinds

    def epochs(self, num_samples: int) -> list[float]:
        """How often the tokens of each part have been used after so many samples."""
        samples = np.array([num_samples]) if self.blend is None else self.blend.counts(num_samples)
        return [float(epochs) for epochs in samples * self._windows_a_row / self._windows]

    def tokens_of(self, sample_id: int) -> list[NDArray[np.int32]]:
        """The raw tokens of each window of a sample."""
        examples, _ = self._examples(np.array([sample_id], np.int64))
        return [self._filler.sources.read(*map(int, example[_DATASET : _LENGTH + 1])) for example in examples]

    def _draws(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Part and draw of each window of these samples; of pairs, two for each sample."""
        ids = np.ascontiguousarray(sample_ids, np.int64)
        datasets, draws = np.zeros(ids.size, np.int32), ids
        if self.blend is not None:
            given = np.flatnonzero(ids != PADDING_SAMPLE)
            draws = np.full(ids.size, PADDING_SAMPLE, np.int64)
            datasets[given], draws[given] = self.blend.draws(ids[given])
        if not self.plan.paired:
            return datasets, draws
        # Row n has windows 2n and 2n + 1.
        windows = np.where(draws == PADDING_SAMPLE, PADDING_SAMPLE, 2 * draws)
        return np.repeat(datasets, 2), np.stack([windows, windows + (windows >= 0)], axis=1).reshape(-1)

    def _examples(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The windows of these samples, as `helpers.fill_rows` takes them, and their keys.  # [m, 6], [m]"""
        return self._examples_of(*self._draws(sample_ids))

    def _examples_of(
        self, datasets: NDArray[np.int32], draws: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        examples, keys = self._layouts.examples(datasets, draws)
        if not self.plan.paired:
            return examples, keys
        examples[:, _ROW] //= 2
        denoisers, raw = examples[::2, _DENOISER].astype(np.int32), examples[::2, _LENGTH].astype(np.int32)
        cuts = self._denoisers.cuts(denoisers, raw, np.ascontiguousarray(keys[::2]))
        # The cuts complement each other, so that both rows are full.
        examples[::2, _CUT], examples[1::2, _CUT] = cuts, raw - cuts
        return examples, keys


_ROW, _DATASET, _START, _LENGTH, _DENOISER, _CUT = range(6)  # columns of the examples of `helpers.fill_rows`


class RowFiller:
    """Makes rows of examples, and reads their tokens: what windows and documents have in common.

    Attributes:
        sources: The tokens of the parts.
    """

    def __init__(
        self,
        parts: Sequence[CorpusRange],
        plan: DenoisingPlan,
        special: SpecialTokens,
        denoisers: helpers.Denoisers,
        reads_ahead: bool = False,
    ) -> None:
        """Read no token.

        Args:
            parts: What examples are made of.
            plan: Lengths of the rows.
            special: Ids of the vocabulary.
            denoisers: Those of the plan.
            reads_ahead: Ask the disk for the tokens of a batch together, and for nothing around them; so it is, too,
                where the corpora exceed memory.
        """
        # Messages of the C++ side are UTF-8, which not every name of a file is.
        names = [part.name.encode("utf-8", "backslashreplace").decode() for part in parts]
        self.sources = helpers.TokenSources(
            [part.corpus.pieces for part in parts], np.array([part.tokens for part in parts], np.int64),
            special.vocab_size, names,
        )  # fmt: skip
        self._plan, self._denoisers = plan, denoisers
        self._reads_ahead = reads_ahead or exceeds_memory(parts)
        if self._reads_ahead:
            self.sources.expect_random_reads()

    def rows(
        self,
        count: int,
        examples: NDArray[np.int64],
        keys: NDArray[np.uint64],
        *,
        with_segments: bool,
        read: NDArray[np.int64] | None = None,
    ) -> Batch:
        """Rows of these examples; a row without any is padding.

        Args:
            count: How many rows.
            examples: As `helpers.fill_rows` takes them.  # [m, 6]
            keys: Of their masks.  # [m]
            with_segments: Give segment ids.
            read: What to ask the disk for; None: the examples.  # [m, 6]

        Raises:
            UserError: A corpus has a token id outside the vocabulary.
        """
        if self._reads_ahead:
            self.sources.will_need(examples if read is None else read)
        encoder, decoder = (count, self._plan.encoder_length), (count, self._plan.decoder_length)
        batch = Batch(
            np.empty(encoder, np.int32),
            np.empty(decoder, np.int32),
            np.empty(decoder, np.int32),
            np.empty(encoder, np.int32) if with_segments else None,
            np.empty(decoder, np.int32) if with_segments else None,
        )
        try:
            helpers.fill_rows(self.sources, examples, keys, self._denoisers, *batch)
        except helpers.TokenOutOfVocabularyError as error:
            raise UserError(f"{error}; use the tokenizer that the corpus was preprocessed with") from None
        return batch


def exceeds_memory(parts: Sequence[CorpusRange]) -> bool:
    """Whether the corpora are more than the page cache is likely to keep: half of this machine's memory."""
    size = sum(piece.nbytes for part in parts for piece in part.corpus.pieces)
    return size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def denoisers_for(plan: DenoisingPlan, special: SpecialTokens) -> helpers.Denoisers:
    """The plan's denoisers for the C++ side."""
    table, mode_ids = plan.table()
    return helpers.Denoisers(
        table, mode_ids, np.array(special.sentinel_ids, np.int32), special.eos_id, special.pad_id,
        special.decoder_start_id, special.vocab_size,
    )  # fmt: skip


def dataset_key(seed: int, name: str) -> int:
    """64 bits that differ between seeds of any size and between names."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
