"""Denoised documents, packed into rows whose segments the model keeps apart.

A document is an example; a longer one than fits a row is cut into pieces, each an example. The documents of a split
are cut into blocks of neighbours, the examples of a block packed first-fit, by their inputs and their targets. How many
rows a block has follows from the lengths alone, so it is counted once, when the data is opened: one number a block. An
epoch then needs no more than two keyed permutations:

    row n -> epoch -> group of blocks, which the epoch's order of all blocks puts beside each other
          -> row of the group, in the group's order of all its rows -> block and row of the block

Rows of a block are planned again when a group is reached. All is a pure function of (documents, seed, n): nothing is
drawn, no epoch has to be gone through to reach another, and memory depends on neither the run nor the tokens.

Where the lengths depend on chance, because there are several denoisers or prefixes are cut anywhere, rows repeat after
`PHASES` epochs, so that at most so many counts are made, each when it is reached: which denoiser and which cut an
example has is the same in epochs 0, 8, 16 ...; which of its tokens are masked, and the order, never is.

Legend: b rows, r rows of a part, m examples, w blocks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets import helpers, packing_helpers
from megatron.core.datasets.blending import Blend
from megatron.core.datasets.corpus import CorpusRange
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.t5_dataset import (
    Batch,
    RowFiller,
    SpecialTokens,
    dataset_key,
    denoisers_for,
)
from megatron.core.errors import UserError

PHASES = 8
"""Epochs after which denoisers and cuts repeat, where they are random."""

GROUP_BLOCKS = 64
"""Blocks whose rows are mixed. The parts of a blend, which mixes their rows already, share them."""

_DOCUMENTS_AT_A_TIME = 1 << 16  # when rows are counted: 8 MiB of memory
_THREADS = 4  # which count

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Uses of a part's key that must not share random numbers.
_BLOCK_ORDER, _ROW_ORDER, _DENOISERS, _CUTS, _MASKS = range(101, 106)


class _Examples(NamedTuple):
    """Pieces of documents and what becomes of each; all `[m]`."""

    starts: NDArray[np.int64]
    """Offset in the corpus."""
    raw: NDArray[np.int32]
    """Tokens."""
    denoisers: NDArray[np.int32]
    """Index of the denoiser."""
    cuts: NDArray[np.int32]
    """Tokens before the cut, where it is random; else -1."""

    def take(self, places: NDArray[np.int64]) -> _Examples:
        """Those at `places`."""
        return _Examples(self.starts[places], self.raw[places], self.denoisers[places], self.cuts[places])


def _concatenated(parts: Sequence[_Examples]) -> _Examples:
    starts, *numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Examples(starts, *numbers)


class _Blocks(NamedTuple):
    """Neighbouring blocks of documents."""

    first: int
    """Number of the first."""
    bounds: NDArray[np.int64]
    """[w + 1] first document of each, then the end; indices of `starts`."""
    starts: NDArray[np.int64]
    """First token of each document, then the end of the last."""


class _EpochOrder(NamedTuple):
    """The blocks of an epoch, in its order."""

    blocks: NDArray[np.int64]
    """[w]"""
    ends: NDArray[np.int64]
    """[groups + 1] rows of the groups before each, and of all."""


class _Group(NamedTuple):
    """The rows of some blocks, one block after the other."""

    examples: _Examples
    """Row by row."""
    row_starts: NDArray[np.int64]
    """[rows + 1] first example of each row, then their number."""


class RowsOfDocuments(NamedTuple):
    """The examples of rows; those of a row stand together, in the order of the documents."""

    places: NDArray[np.int64]
    """[m] index of the row among those that were asked for."""
    examples: _Examples
    """[m]"""
    keys: NDArray[np.uint64]
    """[m] of the masks."""


class DocumentRows:
    """The rows of the documents of one corpus: an endless sequence, epoch after epoch.

    Attributes:
        rows_per_epoch: Rows of the first epoch; of each, where lengths do not depend on chance.
        lengths_per_epoch: Sums of the inputs and of the targets of the first epoch, `[2]` int64.
        left_out: Documents of fewer than two tokens, which cannot be denoised.
    """

    def __init__(
        self,
        part: CorpusRange,
        plan: DenoisingPlan,
        denoisers: helpers.Denoisers,
        key: int,
        window: int,
        group_blocks: int = GROUP_BLOCKS,
    ) -> None:
        """Count the rows of the first epoch; reads the index of the documents once, and no token.

        Args:
            part: The documents.
            plan: The objective, and the lengths of the rows.
            denoisers: Those of the plan.
            key: 64 bits, of all that is random.
            window: Documents of a block; fewer where they have more text than as many of the longest pieces.
            group_blocks: Blocks whose rows are mixed.
        """
        self._part = part
        self._plan = plan
        self._denoisers = denoisers
        self._window = window
        self._group_blocks = group_blocks
        self._blocks_at_a_time = max(1, _DOCUMENTS_AT_A_TIME // window)
        domains = (_BLOCK_ORDER, _ROW_ORDER, _DENOISERS, _CUTS, _MASKS)
        self._keys = {domain: _derived_key(key, domain) for domain in domains}
        self._capacities = np.array([plan.encoder_length, plan.decoder_length])
        self._random_cuts = any(denoiser.noise_density is None for denoiser in plan.denoisers)
        self._table = self._lengths_table()
        self._phases = PHASES if len(plan.denoisers) > 1 or self._random_cuts else 1
        self.left_out = 0
        self._bounds = np.array([part.documents[0]])  # first document of each block, then the end  # [w + 1]
        self._counts: list[NDArray[np.int32]] = []  # rows of each block in each phase counted so far  # [w] each
        self._phase_ends = np.zeros(1, np.int64)  # rows of the phases up to each  # [phases counted + 1]
        self._counting = threading.Lock()
        self.lengths_per_epoch = self._count_phase(self._cut_into_blocks())
        self.rows_per_epoch = int(self._phase_ends[1])
        self._epoch_order = lru_cache(2)(self._order_blocks)
        self._group = lru_cache(2)(self._plan_group)  # a batch takes rows of one group or of two

    def rows(self, rows: NDArray[np.int64]) -> RowsOfDocuments:
        """The examples of these rows `[r]`, none negative."""
        epochs, within = self._epochs_of(rows)
        found = []
        for epoch in np.unique(epochs).tolist():
            ends = self._epoch_order(epoch).ends
            groups = np.where(epochs == epoch, np.searchsorted(ends, within, side="right") - 1, -1)
            for group in np.unique(groups[groups >= 0]).tolist():
                places = np.flatnonzero(groups == group)
                found.append(self._rows_of_group(epoch, group, places, within[places] - ends[group]))
        return _joined(found)

    def _rows_of_group(
        self, epoch: int, group: int, places: NDArray[np.int64], drawn: NDArray[np.int64]
    ) -> RowsOfDocuments:
        """The rows that are drawn as the how-manieth of a group."""
        examples, row_starts = self._group(epoch, group)
        key = _derived_key(_derived_key(self._keys[_ROW_ORDER], epoch), group)
        rows = _permuted(drawn, row_starts.size - 1, key)
        first, counts = row_starts[rows], row_starts[rows + 1] - row_starts[rows]
        chosen = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        own = examples.take(chosen)
        keys = helpers.derived_keys(_derived_key(self._keys[_MASKS], epoch), own.starts)
        return RowsOfDocuments(np.repeat(places, counts), own, keys)

    def _epochs_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch of each row, and its number in the epoch; counts the phases up to there."""
        with self._counting:
            while len(self._counts) < self._phases and self._phase_ends[-1] <= rows.max(initial=-1):
                self._count_phase(self._read_blocks())
            ends = self._phase_ends
        cycles, within = np.divmod(rows, ends[-1])
        phases = np.searchsorted(ends, within, side="right") - 1
        return cycles * self._phases + phases, within - ends[phases]

    def _order_blocks(self, epoch: int) -> _EpochOrder:
        num_blocks = len(self._bounds) - 1
        key = _derived_key(self._keys[_BLOCK_ORDER], epoch)
        blocks = _permuted(np.arange(num_blocks), num_blocks, key)
        counts = self._counts[epoch % self._phases][blocks]
        of_groups = np.add.reduceat(counts, np.arange(0, num_blocks, self._group_blocks), dtype=np.int64)
        return _EpochOrder(blocks, np.append(0, np.cumsum(of_groups)))

    def _plan_group(self, epoch: int, group: int) -> _Group:
        first = group * self._group_blocks
        parts, bounds = [], [0]
        for block in self._epoch_order(epoch).blocks[first : first + self._group_blocks].tolist():
            begin, end = self._bounds[block : block + 2].tolist()
            starts = self._part.corpus.document_starts(begin, end)
            examples, _ = self._examples(_Blocks(block, np.array([0, end - begin]), starts), epoch % self._phases)
            parts.append(examples)
            self._part.corpus.release_index()  # each time: the system maps megabytes around what is read
            bounds.append(bounds[-1] + examples.starts.size)
        examples = _concatenated(parts)
        rows, counts = packing_helpers.first_fit(self._lengths(examples), np.array(bounds), self._capacities)
        rows = np.repeat(np.cumsum(counts) - counts, np.diff(bounds)) + rows  # counted from the start of the group
        by_row = np.argsort(rows, kind="stable")
        row_starts = np.searchsorted(rows[by_row], np.arange(counts.sum() + 1))
        return _Group(examples.take(by_row), row_starts)

    def _cut_into_blocks(self) -> Iterator[_Blocks]:
        """All blocks, while they are made."""
        end, bounds = self._part.documents[1], [self._bounds]
        first_block = 0
        while (begin := int(bounds[-1][-1])) < end:
            stop = min(begin + max(_DOCUMENTS_AT_A_TIME, self._window), end)
            starts = self._part.corpus.document_starts(begin, stop)
            found = _block_bounds(starts, self._window, self._window * self._plan.longest_piece, stop == end)
            self.left_out += int(np.count_nonzero(np.diff(starts[: found[-1] + 1]) < 2))
            for n in range(0, found.size - 1, self._blocks_at_a_time):
                some = found[n : n + self._blocks_at_a_time + 1]
                yield _Blocks(first_block + n, some - some[0], starts[some[0] : some[-1] + 1])
            self._part.corpus.release_index()
            bounds.append(begin + found[1:])
            first_block += found.size - 1
        self._bounds = np.concatenate(bounds)

    def _read_blocks(self) -> Iterator[_Blocks]:
        """All blocks."""
        for n in range(0, len(self._bounds) - 1, self._blocks_at_a_time):
            bounds = self._bounds[n : n + self._blocks_at_a_time + 1]
            starts = self._part.corpus.document_starts(int(bounds[0]), int(bounds[-1]))
            yield _Blocks(n, bounds - bounds[0], starts)
            self._part.corpus.release_index()

    def _count_phase(self, all_blocks: Iterator[_Blocks]) -> NDArray[np.int64]:
        """Count the rows of each block in the next phase; returns the sums of their lengths, `[2]`."""
        phase, lengths = len(self._counts), np.zeros(2, np.int64)
        counts = [np.zeros(0, np.int32)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for rows, sums in _mapped(pool, lambda blocks: self._count_rows(blocks, phase), all_blocks):
                counts.append(rows)
                lengths += sums
        self._counts.append(np.concatenate(counts))
        self._phase_ends = np.append(self._phase_ends, self._phase_ends[-1] + self._counts[-1].sum(dtype=np.int64))
        return lengths

    def _count_rows(self, blocks: _Blocks, phase: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Rows of each block, `[w]`, and the sums of their lengths, `[2]`."""
        examples, first_examples = self._examples(blocks, phase)
        lengths = self._lengths(examples)
        _, counts = packing_helpers.first_fit(lengths, first_examples, self._capacities)
        # One side after the other: numpy sums columns ten times as slowly.
        return counts.astype(np.int32), np.array([lengths[:, side].sum(dtype=np.int64) for side in (0, 1)])

    def _examples(self, blocks: _Blocks, phase: int) -> tuple[_Examples, NDArray[np.int64]]:
        """The examples of blocks in a phase, and the first of each block."""
        pieces, raw, first_examples = packing_helpers.cut_documents(
            blocks.starts, blocks.bounds, self._plan.longest_piece
        )
        denoisers = np.zeros(raw.size, np.int32)
        if len(self._plan.denoisers) > 1:
            # From a random place of the mixture on, so that each block has the rates, but another order.
            numbers = np.arange(blocks.first, blocks.first + len(blocks.bounds) - 1)
            places = helpers.derived_keys(_derived_key(self._keys[_DENOISERS], phase), numbers) >> np.uint64(32)
            behind = places.astype(np.int64) - first_examples[:-1]
            positions = np.repeat(behind, np.diff(first_examples)) + np.arange(raw.size)
            denoisers, _ = self._plan.mixture.draws(positions)
        cuts = np.full(raw.size, -1, np.int32)
        if self._random_cuts:
            keys = helpers.derived_keys(_derived_key(self._keys[_CUTS], phase), pieces)
            cuts = self._denoisers.cuts(denoisers, raw, keys)
        return _Examples(pieces, raw, denoisers, cuts), first_examples

    def _lengths(self, examples: _Examples) -> NDArray[np.int32]:
        """Tokens of inputs and targets, `[m, 2]`."""
        if not self._random_cuts:
            return self._table[examples.denoisers, examples.raw]
        return self._denoisers.lengths(examples.denoisers, examples.raw, examples.cuts)

    def _lengths_table(self) -> NDArray[np.int32]:
        """Inputs and targets of each denoiser for each number of tokens, without cuts.  # [k, longest + 1, 2]"""
        raw = np.arange(2, self._plan.longest_piece + 1, dtype=np.int32)
        no_cut = np.full(raw.size, -1, np.int32)
        of_each = [self._denoisers.lengths(np.full_like(raw, k), raw, no_cut) for k in range(len(self._plan.denoisers))]
        return np.pad(np.stack(of_each), ((0, 0), (2, 0), (0, 0)))


def _mapped(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """`function` of each item, in order; items are taken only a few before their results."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _derived_key(key: int, value: int) -> int:
    return int(helpers.derived_keys(key, np.array([value]))[0])


def _permuted(places: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """What a permutation of [0, size) puts at these places."""
    one_dataset = np.zeros(places.size, np.int32)
    return packing_helpers.shuffled(one_dataset, places, np.array([size]), np.array([key], np.uint64))


def _block_bounds(starts: NDArray[np.int64], window: int, most_tokens: int, last: bool) -> NDArray[np.int64]:
    """Cut documents into blocks of `window`, or as many as have at most so many tokens, at least one.

    Args:
        starts: Of the documents, and the end of the last one.  # [m + 1]
        window: Most documents of a block.
        most_tokens: Most tokens of a block of several documents.
        last: Whether no documents follow; otherwise those of a block that may be longer are left for later.

    Returns:
        Index of the first document of each block, and the end.  # [w + 1]
    """
    bounds, count = [0], len(starts) - 1
    while (begin := bounds[-1]) < count:
        ends = starts[begin + 1 : begin + window + 1]
        fitting = int(np.searchsorted(ends, starts[begin] + most_tokens, side="right"))
        if fitting == count - begin < window and not last:
            break
        bounds.append(begin + max(fitting, 1))
    return np.array(bounds)


def _joined(found: Sequence[RowsOfDocuments]) -> RowsOfDocuments:
    nothing = np.zeros(0, np.int32)
    examples = [part.examples for part in found] or [_Examples(nothing.astype(np.int64), nothing, nothing, nothing)]
    places = [np.zeros(0, np.int64), *(part.places for part in found)]
    keys = [np.zeros(0, np.uint64), *(part.keys for part in found)]
    return RowsOfDocuments(np.concatenate(places), _concatenated(examples), np.concatenate(keys))


class PackedDocumentsDataset:
    """Rows of denoised documents, of one corpus or of a blend.

    Attributes:
        parts: The corpora, or what is used of them.
        blend: Which part each row is from; None: there is one.
        encoder_length: Columns of an encoder row (s_enc).
        decoder_length: Columns of a decoder row (s_dec).
        windows_per_epoch: Rows of the first epoch; of a blend, those of all parts together.
        tokens_per_sample: Encoder and decoder tokens of a row without padding, mean over the epoch.
        fill_rates: Shares of the encoder's and of the decoder's row slots that hold data, mean over the epoch.
        fill_rate: Of both together.
        kinds: Names of the denoisers.
        left_out: Documents of fewer than two tokens, which cannot be denoised.
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
        window: int = 4096,
    ) -> None:
        """Plan the first epoch: seconds for 10^8 documents.

        Args:
            parts: Documents of each corpus.
            plan: The objective, and the lengths of the rows.
            special: Ids of the vocabulary.
            seed: Any integer; datasets with different names share no random numbers for one seed.
            name: Split, such as "train".
            blend: Which part gives which row; needed for several parts.
            window: Documents that are packed together.

        Raises:
            UserError: A part has no document of two tokens or more, or the rows are too short.
        """
        assert parts and (blend is not None or len(parts) == 1)
        if plan.longest_piece < 3:
            raise UserError(
                "--encoder-seq-length is too short for --packing segments: rows must hold a piece of 3 tokens"
            )
        self.encoder_length, self.decoder_length = plan.encoder_length, plan.decoder_length
        self.kinds = tuple(denoiser.name for denoiser in plan.denoisers)
        self.parts = tuple(parts)
        self.blend = blend
        self._denoisers = denoisers_for(plan, special)
        names = [name] if blend is None else [f"{name}/{index}" for index in range(len(parts))]
        group_blocks = max(1, GROUP_BLOCKS // len(parts))
        self._rows = []
        for part, part_name in zip(parts, names, strict=True):
            key = dataset_key(seed, part_name)
            rows = DocumentRows(part, plan, self._denoisers, key, window, group_blocks)
            if rows.rows_per_epoch == 0:
                raise UserError(
                    f"{part.name} has no {name} document of 2 tokens or more; use more text or another --split"
                )
            self._rows.append(rows)
        self._filler = RowFiller(parts, plan, special, self._denoisers)
        self.left_out = sum(rows.left_out for rows in self._rows)
        self.windows_per_epoch = sum(rows.rows_per_epoch for rows in self._rows)
        # Of a blend, a part has its share of the rows.
        shares = np.ones(1) if blend is None else np.array(blend.rates, np.float64) / sum(blend.rates)
        lengths = shares @ np.array([rows.lengths_per_epoch / rows.rows_per_epoch for rows in self._rows])  # [2]
        self.tokens_per_sample = float(lengths.sum())
        self.fill_rates = float(lengths[0] / self.encoder_length), float(lengths[1] / self.decoder_length)
        self.fill_rate = self.tokens_per_sample / (self.encoder_length + self.decoder_length)

    def batch(self, sample_ids: NDArray[np.int64]) -> Batch:
        """The rows of these ids `[b]`, in this order, with segment ids; -1 gives a row of padding.

        Raises:
            UserError: A corpus has a token id outside the vocabulary.
        """
        numbers, keys = [np.zeros((0, 6), np.int64)], [np.zeros(0, np.uint64)]
        for part, found in self._found(sample_ids):
            numbers.append(np.column_stack([found.places, np.full(found.places.size, part), *found.examples]))
            keys.append(found.keys)
        return self._filler.rows(len(sample_ids), np.concatenate(numbers), np.concatenate(keys), with_segments=True)

    def row_kinds(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Denoiser of segment s + 1 of each row of these ids, -1 where there is none.  # [b, most segments]"""
        found = list(self._found(sample_ids))
        counts = sum(np.bincount(rows.places, minlength=len(sample_ids)) for _, rows in found)
        kinds = np.full((len(sample_ids), np.max(counts, initial=0)), -1, np.int32)
        for _, (places, examples, _) in found:
            starts = np.flatnonzero(np.diff(places, prepend=-1))  # the examples of a row stand together
            segments = np.arange(places.size) - np.repeat(starts, np.diff(starts, append=places.size))
            kinds[places, segments] = examples.denoisers
        return kinds

    def epochs(self, num_samples: int) -> list[float]:
        """How often the documents of each part were gone through after so many rows, by the rows of the first epoch."""
        counts = [num_samples] if self.blend is None else self.blend.counts(num_samples).tolist()
        return [count / rows.rows_per_epoch for count, rows in zip(counts, self._rows, strict=True)]

    def _found(self, sample_ids: NDArray[np.int64]) -> Iterator[tuple[int, RowsOfDocuments]]:
        """The examples of the rows of these ids, part by part; places are indices of `sample_ids`."""
        ids = np.asarray(sample_ids, np.int64)
        real = np.flatnonzero(ids >= 0)
        if self.blend is None:
            parts, rows = np.zeros(real.size, np.int32), ids[real]
        else:
            parts, rows = self.blend.draws(ids[real])
        for part in np.unique(parts).tolist():
            own = parts == part
            found = self._rows[part].rows(rows[own])
            yield part, found._replace(places=real[own][found.places])
