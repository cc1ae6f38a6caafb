"""Blends: shares after any number of samples, random access, and corpora and rates from flags and YAML."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron.core.config import DataConfig
from megatron.core.datasets.blending import Blend, CorpusSpec, blend_rates, corpora_of, unimax
from megatron.core.datasets.blending_helpers import BlendOrder
from megatron.core.datasets.corpus import CorpusRange
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.loader import T5Loader
from megatron.core.datasets.t5_dataset import DenoisingDataset, SpecialTokens
from megatron.core.errors import UserError
from tests.denoising import in_memory, plan_for

SPECIAL = SpecialTokens(9_100, pad_id=0, eos_id=1, decoder_start_id=0, sentinel_ids=tuple(range(9_099, 8_999, -1)))
# The least is above a 10,000th of the sum, so that no walk is long; unit makes the arithmetic wide.
RATES = st.builds(
    lambda unit, rates: [unit * rate for rate in rates],
    st.sampled_from([1, 3, 2**20, 2**43 - 1]),
    st.lists(st.integers(1, 5) | st.integers(1, 1000), min_size=1, max_size=10),
)
# So many that blocks, of 4,096 positions or more, end in them.
FAR = st.integers(0, 2**40) | st.integers(0, 2**61) | st.integers(1, 2**30).map(lambda block: 4096 * block - 20)


def check_shares(rates: list[int], first: int, count: int, order: BlendOrder | Blend) -> None:
    """Assert that each draw is made when the dataset's share of the positions lets it, and that none is left out."""
    datasets, draws = order.draws(np.arange(first, first + count))
    before, after, total = order.counts(first), order.counts(first + count), sum(rates)
    assert before.sum() == first and after.sum() == first + count
    for dataset, rate in enumerate(rates):
        (own,) = np.nonzero(datasets == dataset)
        assert draws[own].tolist() == list(range(before[dataset], after[dataset]))
        assert abs(int(before[dataset]) * total - rate * first) < total
        for n, draw in zip(own.tolist(), draws[own].tolist(), strict=True):
            # draws <= share of the positions before, rounded up; draws + 1 > share of them with this one, rounded down
            assert draw * total < rate * (first + n + 1) and rate * (first + n) < (draw + 1) * total


@settings(max_examples=80, deadline=None)
@given(rates=RATES, first=FAR)
def test_shares_hold_everywhere(rates: list[int], first: int) -> None:
    check_shares(rates, first, 200, Blend(rates))
    check_shares(rates, 0, 200, Blend(rates))


@settings(max_examples=80, deadline=None)
@given(rates=st.lists(st.integers(1, 40), min_size=1, max_size=9), first=FAR)
def test_shares_hold_in_blocks_as_short_as_can_be(rates: list[int], first: int) -> None:
    check_shares(rates, first, 300, BlendOrder(np.array(rates), least_block=1))
    check_shares(rates, 0, 300, BlendOrder(np.array(rates), least_block=1))


def test_shares_hold_for_all_small_rates() -> None:
    for size in (2, 3, 4):
        for rates in itertools.combinations_with_replacement(range(1, 6), size):
            check_shares(list(rates), 0, 2 * sum(rates) + 3, BlendOrder(np.array(rates), least_block=1))


def test_shares_of_thousands_of_datasets() -> None:
    rates = (np.random.default_rng(0).pareto(1, 3000) * 1000 + 100).astype(np.int64)
    blend, total = Blend([int(rate) for rate in rates]), int(rates.sum())
    for first in (0, 10**9):
        datasets, draws = blend.draws(np.arange(first, first + 20_000))
        own = np.argsort(datasets, kind="stable")
        assert (np.diff(draws[own])[np.diff(datasets[own]) == 0] == 1).all()
        windows_begin, windows_end = draws * total // rates[datasets], -(-(draws + 1) * total // rates[datasets])
        assert (windows_begin <= np.arange(first, first + 20_000)).all()
        assert (np.arange(first, first + 20_000) < windows_end).all()


@settings(max_examples=40, deadline=None)
@given(rates=RATES, positions=st.lists(FAR | st.integers(0, 30), max_size=12))
def test_any_position_is_found_by_itself(rates: list[int], positions: list[int]) -> None:
    blend = Blend(rates)
    together = blend.draws(np.array(positions, np.int64))
    for n, position in enumerate(positions):
        for other in (blend, Blend(rates)):
            datasets, draws = other.draws(np.array([position]))
            assert (datasets[0], draws[0]) == (together[0][n], together[1][n])
        assert blend.counts(position)[datasets[0]] == draws[0]


@settings(max_examples=30, deadline=None)
@given(rates=RATES, cuts=st.lists(st.integers(0, 6000), max_size=6))
def test_the_sequence_does_not_depend_on_how_far_one_asks(rates: list[int], cuts: list[int]) -> None:
    bounds = sorted({0, 6000, *cuts})
    blend = Blend(rates)
    parts = [blend.draws(np.arange(low, high)) for low, high in itertools.pairwise(bounds)]
    for of_parts, of_all in zip(zip(*parts, strict=True), Blend(rates).draws(np.arange(6000)), strict=True):
        assert np.array_equal(np.concatenate(of_parts), of_all)


@settings(max_examples=30, deadline=None)
@given(
    rates=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=40),
)
def test_readers_at_several_places_do_not_disturb_each_other(rates: list[int], steps: list[tuple[int, int]]) -> None:
    order, places = BlendOrder(np.array(rates), least_block=1), [0, 7, 50, 300, 2000, 5]
    expected = BlendOrder(np.array(rates), least_block=1).draws(np.arange(4000))
    for reader, count in steps:
        positions = np.arange(places[reader], places[reader] + count)
        places[reader] += count
        for found, wanted in zip(order.draws(positions), expected, strict=True):
            assert np.array_equal(found, wanted[positions])
        assert order.counts(places[reader]).sum() == places[reader]


def parts_and_plan() -> tuple[list[CorpusRange], DenoisingPlan]:
    """Corpora of distinct ids, of 15, 40 and 70 windows."""
    plan = plan_for(DataConfig(encoder_seq_length=32), SPECIAL)
    window = plan.windows[0].raw
    bounds = 11 + window * np.cumsum([0, 15, 40, 70])
    return [in_memory(np.arange(low, high, dtype=np.int32)) for low, high in itertools.pairwise(bounds)], plan


def test_an_epoch_of_a_blend_reads_every_token_once() -> None:
    parts, plan = parts_and_plan()
    dataset = DenoisingDataset(parts, plan, SPECIAL, 0, "train", blend=Blend([15, 40, 70]))
    for epoch in range(2):
        windows = [dataset.tokens_of(125 * epoch + n)[0] for n in range(125)]
        # Windows begin somewhere in each ring, so that one may hold the ends of a corpus.
        assert np.array_equal(
            np.sort(np.concatenate(windows)), np.concatenate([part.corpus.pieces[0] for part in parts])
        )
    assert dataset.epochs(250) == [2.0, 2.0, 2.0]


@settings(max_examples=15, deadline=None)
@given(
    rates=st.lists(st.integers(1, 100), min_size=3, max_size=3),
    first_step=st.integers(0, 40),
    layout=st.sampled_from([(1, 12, 1), (2, 2, 3), (3, 1, 4), (1, 1, 12)]),
)
def test_resumed_blends_have_the_same_samples_on_any_number_of_ranks(
    rates: list[int], first_step: int, layout: tuple[int, int, int]
) -> None:
    """Also in the middle of the corpora's epochs, of which the smallest has several here."""
    parts, plan = parts_and_plan()
    undisturbed = DenoisingDataset(parts, plan, SPECIAL, 0, "train", blend=Blend(rates))
    micro_batch_size, num_microbatches, dp_size = layout
    resumed = [
        T5Loader(
            DenoisingDataset(parts, plan, SPECIAL, 0, "train", blend=Blend(rates)),
            micro_batch_size, num_microbatches, dp_rank, dp_size,
        )
        for dp_rank in range(dp_size)
    ]  # fmt: skip
    for step in range(first_step, first_step + 3):
        whole = undisturbed.batch(np.arange(12 * step, 12 * step + 12))
        for loader in resumed:
            mine = loader.sample_ids(12 * step).reshape(-1) - 12 * step
            batch = loader.step_batch(12 * step)
            assert np.array_equal(batch.encoder_input_ids.numpy(), whole.encoder_input_ids[mine])
            assert np.array_equal(batch.labels.numpy(), whole.labels[mine])


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), epoch=st.integers(0, 10**9))
def test_an_epoch_of_rates_that_are_sizes_holds_every_sample_once(sizes: list[int], epoch: int) -> None:
    total = sum(sizes)
    datasets, draws = Blend(sizes).draws(np.arange(epoch * total, (epoch + 1) * total))
    for dataset, size in enumerate(sizes):
        assert draws[datasets == dataset].tolist() == list(range(epoch * size, (epoch + 1) * size))


def test_the_unit_of_rates_does_not_matter() -> None:
    positions = np.arange(1000)
    assert np.array_equal(Blend([3, 1, 2]).draws(positions), Blend([3 * 2**50, 2**50, 2**51]).draws(positions))


def test_order_is_pinned() -> None:
    """Continued runs count on what rates give."""
    blend = Blend([700, 200, 90, 10, 1])
    positions = np.concatenate([np.arange(5000), np.arange(10**12, 10**12 + 5000)])
    datasets, draws = blend.draws(positions)
    assert datasets[:12].tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0]
    content = datasets.astype("<i4").tobytes() + draws.astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "a126a48f4ec4ae7f"


def test_threads_and_pickles_get_the_same() -> None:
    blend = pickle.loads(pickle.dumps(Blend([5, 3, 2])))
    expected = Blend([5, 3, 2]).draws(np.arange(20_000))
    found: dict[int, tuple[NDArray[np.int32], NDArray[np.int64]]] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: blend.draws(np.arange(n * 5000, (n + 1) * 5000))}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        for got, wanted in zip(found[n], expected, strict=True):
            assert np.array_equal(got, wanted[n * 5000 : (n + 1) * 5000])


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([], "at least one"),
        ([1, 0], "at least 1"),
        ([1, -5], "at least 1"),
        ([2**61, 2**61, 1], "2\\^62"),
        ([1, 2**40], "2\\^-28"),
    ],
)
def test_wrong_rates_throw(rates: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlendOrder(np.array(rates, np.int64))


def test_wrong_positions_throw() -> None:
    blend = Blend([1, 2])
    for position in (-1, 2**62):
        with pytest.raises(ValueError, match="positions must lie"):
            blend.draws(np.array([position]))
        with pytest.raises(ValueError, match="positions must lie"):
            blend.counts(position)
    with pytest.raises(ValueError, match="one dimension"):
        blend.draws(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="least_block"):
        BlendOrder(np.array([1]), least_block=0)
    for positions in (np.array([0.5]), np.array(["0"]), np.array([None]), None, "0"):
        with pytest.raises((TypeError, ValueError)):
            blend.draws(positions)  # type: ignore[arg-type]
    assert np.array_equal(blend.draws(np.arange(30)[::-3])[0], blend.draws(np.arange(30))[0][::-3])
    assert blend.draws(np.array([2**62 - 1]))[0].size == 1
    assert blend.draws(np.array([], np.int64))[0].size == 0


# Flags


def test_corpora_of_flags() -> None:
    assert corpora_of(DataConfig(data_path=["a", "b"])).shared == [CorpusSpec("a"), CorpusSpec("b")]
    spec = corpora_of(DataConfig(data_path=["0.3", "a", "2e-1", "./0.5"]))
    assert spec.shared == [CorpusSpec("a", 0.3), CorpusSpec("./0.5", 0.2)] and spec.by_split == {}
    assert spec.of_split("valid") == spec.shared
    spec = corpora_of(DataConfig(train_data_path=["1", "a", "2", "b"], valid_data_path=["c"]))
    assert spec.shared == [] and set(spec.by_split) == {"train", "valid"}
    assert spec.of_split("train") == [CorpusSpec("a", 1.0), CorpusSpec("b", 2.0)]
    assert spec.of_split("valid") == [CorpusSpec("c")] and spec.of_split("test") == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--data-path is missing"),
        ({"data_path": ["a", "0.5", "b"]}, "--data-path: a has no weight before it, but 0.5 .* ./0.5"),
        ({"data_path": ["0.5", "a", "b"]}, "--data-path: b has no weight before it"),
        ({"data_path": ["0.5", "a", "1"]}, "--data-path: weight 1 has no path after it"),
        ({"data_path": ["0.5"]}, "--data-path: weight 0.5 has no path after it .*: ./0.5"),
        ({"data_path": ["0.5", "7"]}, "--data-path: 7 follows weight 0.5; .*: ./7"),
        ({"data_path": ["nan", "a"]}, "weight nan of a must be a number greater than 0"),
        ({"data_path": ["inf", "a"]}, "weight inf of a must be"),
        ({"data_path": ["0", "a", "1", "b"]}, "weight 0 of a must be"),
        ({"data_path": ["a", "b", "./a"]}, "--data-path has ./a twice"),
        ({"train_data_path": ["a"], "valid_data_path": ["1", "b", "c"]}, "--valid-data-path: c has no weight"),
        ({"train_data_path": ["a", "a"]}, "has a twice"),
        ({"data_path": ["1", "a"], "mixture_temperature": 2.0}, "--mixture-temperature is for corpora without weights"),
        (
            {"data_path": ["1", "a"], "mixture_max_epochs": 2.0, "mixture_budget_tokens": 9},
            "--mixture-max-epochs is for corpora without weights",
        ),
        (
            {"data_path": ["a"], "mixture_max_epochs": 2.0, "mixture_budget_tokens": 9, "mixture_temperature": 2.0},
            "--mixture-temperature and --mixture-max-epochs are both given",
        ),
    ],
)
def test_mistakes_in_flags_are_one_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        corpora_of(DataConfig(**flags))
    assert "\n" not in str(caught.value)


# YAML


def of_file(tmp_path: Path, content: Any, **flags: Any) -> Any:
    (tmp_path / "blend.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return corpora_of(DataConfig(data_config=str(tmp_path / "blend.yaml"), **flags))


def test_corpora_of_yaml(tmp_path: Path) -> None:
    content = """
    corpora:
      - {path: web, weight: 0.75}
      - {path: /data/books, weight: 2, split: "90,10"}
      - {path: code, weight: 1, split: 1}
      - {path: "hf://owner/name:part@train", weight: 1}
      - {path: "*.jsonl", weight: 1, split: "9,1"}
    train:
      - path: news
        weight: 1.0e-1
    valid:
      - {path: held_out, weight: 1}
    """
    spec = of_file(tmp_path, content)
    assert spec.shared == [
        CorpusSpec(str(tmp_path / "web"), 0.75),
        CorpusSpec("/data/books", 2, "90,10"),
        CorpusSpec(str(tmp_path / "code"), 1, "1"),
        CorpusSpec("hf://owner/name:part@train", 1),
        CorpusSpec(str(tmp_path / "*.jsonl"), 1, "9,1"),
    ]
    assert spec.by_split == {
        "train": [CorpusSpec(str(tmp_path / "news"), 0.1)],
        "valid": [CorpusSpec(str(tmp_path / "held_out"), 1)],
    }
    config = DataConfig(split="8,1,1")
    assert [corpus.split_weights(config) for corpus in spec.shared] == [
        (0.8, 0.1, 0.1), (0.9, 0.1, 0.0), (1, 0, 0), (0.8, 0.1, 0.1), (0.9, 0.1, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("corpora: [", "blend.yaml is not YAML"),
        ("corpora:\n  - path: 2020-13-45\n", "blend.yaml is not YAML"),
        ("[" * 3000, "blend.yaml is not YAML that can be read: it is nested too deeply"),
        ('corpora: [{path: "a\\0b"}]', "blend.yaml: path '.*a.x00b' cannot be one \\(.*null"),
        ('corpora: [{path: "a\\ud800b"}]', "blend.yaml: path '.*a.ud800b' cannot be one"),
        ("[a, b]", "must have lists 'corpora'"),
        ("", "must have lists 'corpora'"),
        ("corpus: [{path: a}]", "unknown key 'corpus'; did you mean corpora"),
        ("1: [{path: a}]", "unknown key 1; known are corpora, train, valid, test"),
        ("corpora: a", "corpora is 'a'; it must be a list"),
        ("corpora: []", "must be a list"),
        ("valid: [{path: a}]", "has no corpora to train on"),
        ("corpora: [a]", "blend.yaml, corpora 1: expected keys and values such as 'path: books', found 'a'"),
        ("train: [{path: a}, {paht: b}]", "blend.yaml, train 2 has an unknown key 'paht'; did you mean path"),
        ("corpora: [{weight: 1}]", "corpora 1: path is None"),
        ("corpora: [{path: 5}]", "corpora 1: path is 5; it must be text, in quotes"),
        ("corpora: [{path: a, weight: much}]", "corpora 1: weight is 'much'; it must be a number"),
        ("corpora: [{path: a, weight: true}]", "corpora 1: weight is True; it must be a number"),
        ("corpora: [{path: a, weight: .nan}]", "corpora 1: weight nan must be a number greater than 0"),
        ("corpora: [{path: a, weight: -1}]", "corpora 1: weight -1 must be a number greater than 0"),
        ("corpora: [{path: a, weight: 1}, {path: b}]", "/a has a weight but .*/b has none"),
        ("corpora: [{path: a}]\ntrain: [{path: b, weight: 1}]", "/b has a weight but .*/a has none"),
        ("corpora: [{path: a}]\ntrain: [{path: a}]", "/a twice"),
        ("corpora: [{path: a, split: '1,2,3,4'}]", "corpora 1: split is '1,2,3,4'"),
        ("corpora: [{path: a, split: [1, 2]}]", "corpora 1: split is \\[1, 2\\]"),
        ("train: [{path: a, split: '1,1'}]", "train 1 has a split, but all of it is for one"),
    ],
)
def test_mistakes_in_yaml_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        of_file(tmp_path, content)
    assert str(caught.value).startswith("--data-config") and "\n" not in str(caught.value)


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data-config .* cannot be read: No such file"):
        corpora_of(DataConfig(data_config=str(tmp_path / "none.yaml")))


# Rates


def rates_of(tokens: list[int], weights: list[float] | None = None, **flags: Any) -> list[int]:
    specs = [CorpusSpec(f"c{n}", weights[n] if weights else None) for n in range(len(tokens))]
    return blend_rates(tokens, specs, DataConfig(**flags))


def test_weights_are_the_decimals_that_were_written() -> None:
    assert rates_of([5, 5, 5], [0.3, 0.6, 0.1]) == [3, 6, 1]
    assert rates_of([5, 5], [1e-3, 2]) == [1, 2000]
    assert rates_of([9, 1], [7, 7]) == [1, 1]
    assert rates_of([1, 1], [0.123456789012345, 0.876543210987655]) == [24691357802469, 175308642197531]
    little, rest = rates_of([1, 1], [0.1234567890123457, 10.0])  # rounded
    assert rest == 2**40 and abs(little / rest - 0.01234567890123457) < 2**-40


def test_rates_without_weights_follow_sizes() -> None:
    assert rates_of([10**12, 10**6, 3 * 10**6]) == [10**6, 1, 3]
    flat = rates_of([10**12, 10**6], mixture_temperature=2.0)
    assert flat[1] / flat[0] == pytest.approx(1e-3)
    alpha = rates_of([1000, 10], mixture_temperature=1 / 0.3)
    assert alpha[1] / alpha[0] == pytest.approx(0.01**0.3)


def test_unimax_gives_evenly_up_to_its_epochs() -> None:
    assert unimax([100, 10, 1000], 600, Fraction(2)) == [200, 20, 380]
    assert unimax([100, 10, 1000], 30, Fraction(2)) == [10, 10, 10]
    assert unimax([5, 5, 5], 10, Fraction(1)) == [Fraction(10, 3)] * 3
    assert unimax([100, 10], 10**6, Fraction(3, 2)) == [150, 15]  # as much as they may
    assert rates_of([100, 10, 1000], mixture_max_epochs=2.0, mixture_budget_tokens=600) == [10, 1, 19]


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 10**6), min_size=1, max_size=20),
    budget=st.integers(1, 10**8),
    epochs=st.fractions(Fraction(1, 10), 20, max_denominator=100),
)
def test_unimax_spends_the_budget_and_keeps_the_order(tokens: list[int], budget: int, epochs: Fraction) -> None:
    given_ = unimax(tokens, budget, epochs)
    caps = [size * epochs for size in tokens]
    assert sum(given_) == min(budget, sum(caps))
    assert all(tokens_ <= cap for tokens_, cap in zip(given_, caps, strict=True))
    free = {tokens_ for tokens_, cap in zip(given_, caps, strict=True) if tokens_ < cap}
    assert len(free) <= 1 and all(tokens_ <= max(free) for tokens_ in given_ if free)


def test_shares_that_are_too_small_are_refused() -> None:
    with pytest.raises(UserError, match=r"c1 \(100 tokens\) would have a share of 1.0e-10 of the samples"):
        rates_of([10**12, 100])
    with pytest.raises(UserError, match=r"c0 .* is the least"):
        rates_of([1, 1], [1e-30, 1.0])
    Blend(rates_of([1, 1], [1.0, 134217726.98765432]))  # just allowed, and rounded
