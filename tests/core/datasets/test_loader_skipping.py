"""`--skip-samples`: which ids a step takes."""

import random

import numpy as np
import pytest

from megatron.core.datasets.loader import T5Loader
from megatron.core.datasets.sample_ranges import SampleRanges
from megatron.core.errors import UserError
from tests.core.datasets.test_t5_dataset import dataset, text_of


def dealt_out(skipped: SampleRanges, micro: int, num: int, dp: int, num_steps: int, start: int = 0) -> list[int]:
    """Ids of some steps in the order of their places in the global batches."""
    loaders = [T5Loader(None, micro, num, rank, dp, skipped) for rank in range(dp)]
    found: list[int] = []
    for _ in range(num_steps):
        ids = np.stack([loader.sample_ids(start) for loader in loaders], axis=1)  # [num, dp, micro]
        found += ids.reshape(-1).tolist()
        ranges = loaders[0].sample_ranges(start)
        assert found[-ids.size :] == [i for first, last in ranges for i in range(first, last + 1)]
        start = loaders[0].next_sample(start)
        assert start == found[-1] + 1
    return found


def test_ranges_are_sorted_and_merged():
    parsed = SampleRanges.parse(["30-39", "5-5", "7-9", "8-12", "13-13", "40-40"])
    assert parsed.ranges == ((5, 5), (7, 13), (30, 40))
    assert SampleRanges.parse(None) == SampleRanges.parse([]) == SampleRanges()


@pytest.mark.parametrize("text", ["", "5", "9-5", "-3-5", "3-", "3-5,7-9", "a-b", "1-9999999999999999999", "3 - 5"])
def test_other_texts_are_mistakes(text: str):
    with pytest.raises(UserError, match=r"--skip-samples .* first-last"):
        SampleRanges.parse(["1-2", text])


@pytest.mark.parametrize("layout", [(1, 6, 1), (6, 1, 1), (1, 3, 2), (3, 1, 2), (1, 2, 3), (2, 1, 3)])
def test_steps_take_what_is_left_on_every_layout(layout: tuple[int, int, int]):
    chance = random.Random(0)
    for _ in range(50):
        texts = []
        for _ in range(chance.randrange(6)):
            first = chance.randrange(60)
            texts.append(f"{first}-{first + chance.randrange(20)}")
        skipped = SampleRanges.parse(texts)
        left = [i for i in range(300) if not any(a <= i <= b for a, b in skipped.ranges)]
        assert dealt_out(skipped, *layout, num_steps=8) == left[:48], texts
        start = chance.randrange(70)
        assert dealt_out(skipped, *layout, num_steps=3, start=start) == [i for i in left if i >= start][:18], texts


def test_a_huge_range_costs_nothing():
    skipped = SampleRanges.parse(["4-900000000000000000"])
    assert dealt_out(skipped, 2, 1, 2, num_steps=2) == [0, 1, 2, 3, *range(900000000000000001, 900000000000000005)]


def test_batches_are_of_the_samples_that_are_left():
    samples = dataset()
    batch = T5Loader(samples, 2, 3, skipped=SampleRanges.parse(["1-3", "6-6"])).step_batch(0)
    assert (batch.encoder_input_ids.numpy() == samples.batch(np.array([0, 4, 5, 7, 8, 9])).encoder_input_ids).all()


def test_evaluation_is_not_concerned():
    samples = dataset()
    loader = T5Loader(samples, 2, 3, skipped=SampleRanges.parse(["1-3"]))
    (batch,) = loader.evaluation_batches(6, microbatches=3)
    assert (text_of(batch) == text_of(samples.batch(np.arange(6)))).all()


def test_ranges_behind_the_position_are_warned_about():
    skipped = SampleRanges.parse(["0-3", "8-12", "20-29"])
    assert skipped.too_late(0, 0) is None
    warning = skipped.too_late(10, 10)
    assert warning is not None and warning.startswith("--skip-samples: some of 0-3 8-9 have been trained on")
    assert dealt_out(skipped, 1, 4, 1, num_steps=3, start=10) == [13, 14, 15, 16, 17, 18, 19, 30, 31, 32, 33, 34]


def test_a_run_that_left_them_out_is_not_warned_when_it_continues():
    loader = T5Loader(None, 1, 4, skipped=SampleRanges.parse(["0-3", "8-12", "20-29"]))
    start = 0
    for step in range(10):
        assert loader.skipped.too_late(start, 4 * step) is None
        start = loader.next_sample(start)
    assert loader.skipped.too_late(start, 4 * 10 + 1) is not None
