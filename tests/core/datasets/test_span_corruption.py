"""The C++ span corruption against its definition, written here in plain Python."""

import math
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.datasets import helpers

MASK_64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
VOCAB, PAD, EOS, START = 1000, 0, 1, 0
SENTINELS = np.arange(999, 899, -1, dtype=np.int32)
FIRST_TOKEN, LAST_TOKEN = 2, 899  # corpus ids that are neither special nor sentinels

quick = settings(deadline=None, max_examples=60)


# ------------------------------------------------------------------------------------------------------------
# The definition


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def derive(key: int, value: int) -> int:
    return mix(mix((key + GOLDEN) & MASK_64) ^ value)


class Random:
    def __init__(self, key: int) -> None:
        self.state = key

    def next(self) -> int:
        self.state = (self.state + GOLDEN) & MASK_64
        return mix(self.state)

    def below(self, bound: int) -> int:
        """Lemire's bounded draw from 32 bits: reject what would make some values likelier."""
        while True:
            product = (self.next() >> 32) * bound
            if product % 2**32 >= 2**32 % bound:
                return product >> 32

    def below_wide(self, bound: int) -> int:
        while (draw := self.next()) < 2**64 % bound:
            pass
        return draw % bound


class Permutation:
    """Keyed bijection of [0, size): a Feistel network on (low, high), walking past values that are too large."""

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self.width = math.isqrt(size - 1) + 1
        self.height = -(-size // self.width)
        self.keys = [derive(key, round_number) for round_number in range(12)]

    def shift(self, round_number: int, value: int, modulus: int) -> int:
        return ((mix(self.keys[round_number] ^ value) >> 32) * modulus) >> 32

    def forward(self, index: int) -> int:
        while True:
            high, low = divmod(index, self.width)
            for r in range(0, 12, 2):
                low = (low + self.shift(r, high, self.width)) % self.width
                high = (high + self.shift(r + 1, low, self.height)) % self.height
            index = high * self.width + low
            if index < self.size:
                return index

    def inverse(self, index: int) -> int:
        while True:
            high, low = divmod(index, self.width)
            for r in range(10, -1, -2):
                high = (high - self.shift(r + 1, low, self.height)) % self.height
                low = (low - self.shift(r, high, self.width)) % self.width
            index = high * self.width + low
            if index < self.size:
                return index


def epoch_order(num_tokens: int, raw: int, seed: int, epoch: int) -> tuple[int, Permutation]:
    """Offset of the epoch's first window, and the order of its windows."""
    offset = Random(derive(derive(seed, 1), epoch)).below_wide(num_tokens)
    return offset, Permutation(num_tokens // raw, derive(derive(seed, 2), epoch))


def window_start(num_tokens: int, raw: int, seed: int, sample_id: int) -> int:
    epoch, index = divmod(sample_id, num_tokens // raw)
    offset, permutation = epoch_order(num_tokens, raw, seed, epoch)
    return (offset + permutation.forward(index) * raw) % num_tokens


def composition(items: int, segments: int, random: Random) -> list[int]:
    """`items` as a sum of `segments` positive numbers: segments - 1 of the gaps between items are cut (Floyd)."""
    cuts: set[int] = set()
    for last in range(items - segments, items - 1):
        gap = random.below(last + 1)
        cuts.add(last if gap in cuts else gap)
    bounds = [0, *(cut + 1 for cut in sorted(cuts)), items]
    return [after - before for before, after in pairwise(bounds)]


def corrupt(window: list[int], noise: int, spans: int, seed: int, sample_id: int) -> tuple[list[int], list[int]]:
    """Inputs and targets of a window."""
    random = Random(derive(derive(seed, 3), sample_id))
    noise_runs = composition(noise, spans, random)
    kept_runs = composition(len(window) - noise, spans, random)
    inputs, targets, position = [], [], 0
    for sentinel, kept, masked in zip(SENTINELS[:spans].tolist(), kept_runs, noise_runs, strict=True):
        inputs += [*window[position : position + kept], sentinel]
        targets += [sentinel, *window[position + kept : position + kept + masked]]
        position += kept + masked
    return [*inputs, EOS], [*targets, EOS]


# ------------------------------------------------------------------------------------------------------------
# Calling the extension

NO_NODES = (np.zeros(0, np.uint64), np.zeros((0, 2), np.int32))


class Rows(NamedTuple):
    encoder: np.ndarray
    decoder: np.ndarray
    labels: np.ndarray


def span_denoiser(raw: int, noise: int, spans: int) -> helpers.Denoisers:
    """The denoiser that masks so many of `raw` tokens."""
    table = np.array([[noise / spans, noise / raw]])
    return helpers.Denoisers(table, [np.zeros(0, np.int32)], SENTINELS, EOS, PAD, START, VOCAB)


def layouts(begin: int, end: int, raw: int, seed: int) -> helpers.WindowLayouts:
    ranges, keys = np.array([[begin, end]]), np.array([seed], np.uint64)
    return helpers.WindowLayouts(ranges, keys, np.array([raw]), *NO_NODES)


def window_starts(begin: int, end: int, raw: int, seed: int, ids: Any) -> np.ndarray:
    """First token of each sample."""
    ids = np.asarray(ids, np.int64)
    return layouts(begin, end, raw, seed).examples(np.zeros(ids.size, np.int32), ids)[0][:, 2]


def fill(
    tokens: np.ndarray, ids: Any, raw: int, noise: int, spans: int,
    *, seed: int = 0, begin: int = 0, end: int | None = None, padding: tuple[int, int] = (0, 0),
) -> Rows:  # fmt: skip
    ids = np.asarray(ids, dtype=np.int64)
    end = tokens.size if end is None else end
    examples, keys = layouts(begin, end, raw, seed).examples(np.zeros(ids.size, np.int32), ids)
    decoder_shape = (ids.size, noise + spans + 1 + padding[1])
    rows = Rows(
        np.full((ids.size, raw - noise + spans + 1 + padding[0]), -7, np.int32),
        np.full(decoder_shape, -7, np.int32),
        np.full(decoder_shape, -7, np.int32),
    )
    sources = helpers.TokenSources([[tokens]], np.array([[begin, end]]), VOCAB)
    helpers.fill_rows(sources, examples, keys, span_denoiser(raw, noise, spans), *rows)
    return rows


def random_tokens(count: int, dtype: Any = np.uint16) -> np.ndarray:
    high = min(LAST_TOKEN, np.iinfo(dtype).max)
    return np.random.default_rng(count).integers(FIRST_TOKEN, high, count, endpoint=True).astype(dtype)


def restore(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """The raw window: each sentinel of the inputs gives way to the tokens behind it in the targets."""
    spans: dict[int, list[int]] = {}
    for token in targets[targets != EOS].tolist():
        if token > LAST_TOKEN:
            spans[token] = current = []
        else:
            current.append(token)
    return [x for token in inputs[inputs != EOS].tolist() for x in spans.get(token, [token])]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(tokens in the corpus, raw, noise, spans) that go together."""
    spans = draw(st.integers(1, 40))
    noise = spans + draw(st.integers(0, 60))
    raw = noise + spans + draw(st.integers(0, 300))
    return raw + draw(st.integers(0, 5 * raw)), raw, noise, spans


# ------------------------------------------------------------------------------------------------------------
# Samples


@quick
@given(
    shapes(),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
    st.integers(0, MASK_64),
    st.sampled_from(["u1", "i1", "i2", "u2", "i4", "i8"]),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_equals_the_definition(
    shape: tuple[int, int, int, int], ids: list[int], seed: int, dtype: str, padding: tuple[int, int]
) -> None:
    num_tokens, raw, noise, spans = shape
    tokens = random_tokens(num_tokens, dtype)
    rows = fill(tokens, ids, raw, noise, spans, seed=seed, padding=padding)
    ring = np.concatenate([tokens, tokens]).tolist()
    for row, sample_id in enumerate(ids):
        start = window_start(num_tokens, raw, seed, sample_id)
        inputs, targets = corrupt(ring[start : start + raw], noise, spans, seed, sample_id)
        assert rows.encoder[row].tolist() == inputs + [PAD] * padding[0]
        assert rows.decoder[row].tolist() == [START, *targets[:-1]] + [PAD] * padding[1]
        assert rows.labels[row].tolist() == targets + [-100] * padding[1]


@quick
@given(shapes(), st.integers(0, MASK_64))
def test_inverts_to_the_raw_window(shape: tuple[int, int, int, int], seed: int) -> None:
    num_tokens, raw, noise, spans = shape
    tokens = random_tokens(num_tokens)
    ids = np.arange(3)
    rows = fill(tokens, ids, raw, noise, spans, seed=seed)
    starts = window_starts(0, num_tokens, raw, seed, ids)
    for inputs, targets, start in zip(rows.encoder, rows.labels, starts, strict=True):
        assert restore(inputs, targets) == np.roll(tokens, -start)[:raw].tolist()
        assert inputs[0] <= LAST_TOKEN  # the first token is never noise
        assert inputs[-2] == SENTINELS[spans - 1]  # the last always is
        assert np.count_nonzero(np.isin(targets, SENTINELS)) == spans  # no closing sentinel


def test_samples_never_change() -> None:
    """The samples of a seed are part of every checkpoint that was trained with it: these numbers stay."""
    rows = fill(np.arange(2, 502, dtype=np.uint16), [0, 1, 123456789], 20, 6, 3, seed=2024)
    assert rows.encoder.tolist() == [
        [360, 361, 362, 363, 364, 365, 999, 367, 368, 369, 370, 371, 372, 373, 998, 377, 997, 1],
        [60, 61, 62, 63, 64, 65, 66, 67, 68, 999, 72, 998, 75, 76, 77, 78, 997, 1],
        [201, 202, 203, 204, 205, 206, 207, 208, 209, 210, 211, 999, 214, 215, 998, 218, 997, 1],
    ]
    assert rows.labels.tolist() == [
        [999, 366, 998, 374, 375, 376, 997, 378, 379, 1],
        [999, 69, 70, 71, 998, 73, 74, 997, 79, 1],
        [999, 212, 213, 998, 216, 217, 997, 219, 220, 1],
    ]  # fmt: skip


def noise_runs(labels: np.ndarray, spans: int) -> np.ndarray:
    """Lengths of the noise spans, [b, spans]."""
    positions = np.nonzero(np.isin(labels, SENTINELS) | (labels == EOS))[1].reshape(len(labels), spans + 1)
    return np.diff(positions) - 1


def kept_runs(encoder: np.ndarray, spans: int) -> np.ndarray:
    positions = np.nonzero(np.isin(encoder, SENTINELS))[1].reshape(len(encoder), spans)
    return np.diff(positions, prepend=-1) - 1


def chi_square_excess(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations by which Pearson's statistic exceeds its mean; the cells sum to the same total."""
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_masks_are_uniform_over_all_compositions() -> None:
    """11 tokens, 5 of them noise in 3 spans: C(4, 2) x C(5, 2) = 60 masks, each as likely as the other."""
    count = 60_000
    rows = fill(random_tokens(500), np.arange(count), 11, 5, 3, seed=5)
    masks = Counter(map(tuple, np.hstack([noise_runs(rows.labels, 3), kept_runs(rows.encoder, 3)]).tolist()))
    assert len(masks) == 60
    assert chi_square_excess(np.array(list(masks.values())), np.full(60, count / 60)) < 4


@pytest.mark.parametrize("runs", ["noise", "kept"])
def test_span_lengths_are_distributed_as_published(runs: str) -> None:
    """512 / 114: the first of s parts of n has length k in C(n - k - 1, s - 2) of C(n - 1, s - 1) compositions."""
    count, spans = 20_000, 28
    rows = fill(random_tokens(100_000), np.arange(count), 568, 85, spans, seed=9)
    lengths = noise_runs(rows.labels, spans) if runs == "noise" else kept_runs(rows.encoder, spans)
    total = 85 if runs == "noise" else 568 - 85
    assert (lengths.sum(axis=1) == total).all()
    probability = np.array([math.comb(total - k - 1, spans - 2) for k in range(1, total)], dtype=float)
    probability /= math.comb(total - 1, spans - 1)
    for span in (0, 13, spans - 1):
        counts = np.bincount(lengths[:, span] - 1, minlength=total - 1)
        often = probability * count >= 10
        observed = np.append(counts[often], counts[~often].sum())
        expected = np.append(probability[often], probability[~often].sum()) * count
        assert chi_square_excess(observed, expected) < 4


# ------------------------------------------------------------------------------------------------------------
# Windows


@quick
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, MASK_64), st.integers(0, 3), st.integers(0, 50))
def test_no_token_twice_an_epoch(num_windows: int, raw: int, seed: int, epoch: int, left_over: int) -> None:
    num_tokens = num_windows * raw + left_over % raw
    ids = np.arange(epoch * num_windows, (epoch + 1) * num_windows)
    begin = 1000
    starts = window_starts(begin, begin + num_tokens, raw, seed, ids) - begin
    assert ((starts >= 0) & (starts < num_tokens)).all()
    used = np.bincount(((starts[:, None] + np.arange(raw)) % num_tokens).ravel(), minlength=num_tokens)
    assert used.max() == 1
    assert np.count_nonzero(used == 0) == num_tokens - num_windows * raw < raw


@quick
@given(st.integers(1, 2**62), st.integers(1, 2**20), st.integers(0, MASK_64), st.integers(0, 2**63 - 1))
def test_windows_equal_the_definition_at_any_size(num_tokens: int, raw: int, seed: int, sample_id: int) -> None:
    raw = min(raw, num_tokens)
    (start,) = window_starts(0, num_tokens, raw, seed, np.array([sample_id]))
    assert start == window_start(num_tokens, raw, seed, sample_id)


def test_few_windows_come_in_every_order() -> None:
    """The permutation alone, for 5 windows: seeds make all 120 orders about equally often."""
    count = 24_000
    ids = np.arange(5)
    orders: Counter[tuple[int, ...]] = Counter()
    for seed in range(count):
        starts = window_starts(0, 5, 1, seed, ids)
        orders[tuple((starts - epoch_order(5, 1, seed, 0)[0]) % 5)] += 1
    assert len(orders) == 120
    frequencies = np.array(list(orders.values())) / (count / 120)
    assert abs(frequencies - 1).max() < 0.5


def test_neighbours_in_the_order_are_independent() -> None:
    """20,000 windows: positions of consecutive samples are uncorrelated, and uniform over the corpus."""
    starts = window_starts(0, 20_000, 1, 3, np.arange(20_000)) / 20_000
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 0.03
    cells = np.histogram2d(starts[::2], starts[1::2], bins=10, range=[[0, 1], [0, 1]])[0].ravel()
    assert chi_square_excess(cells, np.full(100, 100.0)) < 4


def test_epochs_and_seeds_differ() -> None:
    ids = np.arange(1000)
    first = window_starts(0, 100_000, 100, 7, ids)
    for other in (
        window_starts(0, 100_000, 100, 7, ids + 1000),
        window_starts(0, 100_000, 100, 8, ids),
    ):
        assert np.count_nonzero(first == other) < 20
        assert len(np.unique((other - first) % 100_000)) > 500  # another order, not only another offset
    tokens = random_tokens(568)  # one window: only the offset and the mask can differ
    runs = [noise_runs(fill(tokens, [n], 568, 85, 28, seed=s).labels, 28).tolist() for n, s in ((0, 7), (1, 7), (0, 8))]
    assert runs[0] != runs[1] != runs[2] != runs[0]


def test_a_corpus_of_a_trillion_tokens(tmp_path: Path) -> None:
    """Both ends are read, across the seam of the ring, and nothing takes time or memory that grows with it."""
    num_tokens, raw = 10**12, 568
    path = tmp_path / "tokens.bin"
    with path.open("wb") as file:
        file.write(np.arange(2, 602, dtype=np.uint16).tobytes())
        file.truncate(2 * num_tokens)
        file.seek(2 * (num_tokens - 600))
        file.write(np.arange(200, 800, dtype=np.uint16).tobytes())
    tokens = np.memmap(path, np.uint16, "r")
    offset, order = epoch_order(num_tokens, raw, 0, 0)
    seam = order.inverse((num_tokens - 1 - offset) // raw)  # the sample that reads the last token
    (start,) = window_starts(0, num_tokens, raw, 0, np.array([seam]))
    expected = [*range(200, 800), *range(2, 602)][int(start) - (num_tokens - 600) :][:raw]
    began = time.perf_counter()
    rows = fill(tokens, [seam], raw, 85, 28)
    assert time.perf_counter() - began < 1
    assert start > num_tokens - raw
    assert restore(rows.encoder[0], rows.labels[0]) == expected


# ------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(("dtype", "bad"), [("u2", 1000), ("u2", 65535), ("i4", -1), ("i4", 2**31 - 1), ("i8", 2**32)])
@pytest.mark.parametrize("position", [0, 57, 99])
def test_token_outside_the_vocabulary(dtype: str, bad: int, position: int) -> None:
    tokens = random_tokens(120, dtype)
    tokens[10 + position] = bad
    with pytest.raises(helpers.TokenOutOfVocabularyError) as caught:
        fill(tokens, [0], 100, 15, 5, begin=10, end=110)
    assert str(caught.value) == (
        f"token id {bad} at token offset {10 + position} is outside the vocabulary of 1000 ids"
    )


def test_tokens_outside_the_range_are_not_read() -> None:
    tokens = random_tokens(120)
    tokens[:10] = tokens[110:] = 5000
    fill(tokens, np.arange(50), 100, 15, 5, begin=10, end=110)


def test_padding_rows() -> None:
    rows = fill(random_tokens(120), [0, -1, 1], 100, 15, 5)
    assert (rows.encoder[1] == PAD).all()
    assert (rows.decoder[1] == PAD).all()
    assert (rows.labels[1] == -100).all()
    assert (rows.labels[[0, 2]] >= 0).all()
