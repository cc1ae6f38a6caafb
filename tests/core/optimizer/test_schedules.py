import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import OptimizerConfig
from megatron.core.errors import UserError
from megatron.core.optimizer import LearningRateSchedule

STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WSD_STYLES = ["exponential", "linear", "cosine", "minus_sqrt"]


def schedule(total=1000, unit="iterations", **flags):
    return LearningRateSchedule.from_config(OptimizerConfig(lr=1.0, **flags), total, unit)


@settings(deadline=None, max_examples=200)
@given(
    style=st.sampled_from(STYLES),
    wsd_style=st.sampled_from(WSD_STYLES),
    total=st.integers(3, 10_000),
    warmup=st.floats(0.0, 0.5),
    wsd=st.floats(0.01, 0.5),
    minimum=st.floats(0.0, 0.9),
    start=st.floats(0.0, 0.9),
)
def test_rises_in_the_warmup_and_never_rises_again(style, wsd_style, total, warmup, wsd, minimum, start):
    rate = schedule(
        total,
        lr_decay_style=style,
        lr_wsd_decay_style=wsd_style,
        lr_warmup_fraction=warmup,
        lr_wsd_decay_iters=max(1, int(wsd * total)),
        min_lr=minimum,
        lr_warmup_init=start,
    )
    end_of_warmup = warmup * total
    values = [rate(step) for step in range(total + 10)]
    assert all(math.isfinite(value) and value <= 1.0 + 1e-12 for value in values)
    for step in range(1, len(values)):
        if step <= end_of_warmup:
            assert values[step] >= values[step - 1]
        elif step - 1 > end_of_warmup:
            assert values[step] <= values[step - 1] + 1e-12
            assert values[step] >= minimum
    assert values[-1] == (1.0 if style == "constant" else minimum)


def test_warmup_is_linear_from_init_and_ends_at_the_peak():
    rate = schedule(lr_warmup_iters=10, lr_warmup_init=0.5, lr_decay_style="cosine")
    assert [rate(step) for step in (0, 1, 5, 10)] == [0.5, 0.55, 0.75, 1.0]


@pytest.mark.parametrize(
    ("style", "middle", "end"),
    [
        ("linear", 0.1 + 0.9 * 0.5, 0.1),
        ("cosine", 0.1 + 0.9 * 0.5, 0.1),
        ("constant", 1.0, 1.0),
        ("inverse-square-root", math.sqrt(100 / 550), math.sqrt(100 / 1000)),
    ],
)
def test_values_after_the_warmup(style, middle, end):
    rate = schedule(lr_decay_style=style, lr_warmup_iters=100, min_lr=0.1)
    assert rate(550) == pytest.approx(middle)
    assert rate(1000) == pytest.approx(end)
    assert rate(5000) == (1.0 if style == "constant" else 0.1)


@pytest.mark.parametrize(
    ("style", "half"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", math.sqrt(2) - 1), ("minus_sqrt", 1 - math.sqrt(0.5))],
)
def test_wsd_is_flat_until_its_decay(style, half):
    rate = schedule(lr_decay_style="WSD", lr_wsd_decay_style=style, lr_wsd_decay_iters=200, lr_warmup_iters=10)
    assert rate(10) == rate(500) == rate(800) == 1.0
    assert rate(900) == pytest.approx(half)
    assert rate(1000) == pytest.approx(0.0, abs=1e-12)


def test_decay_length_is_the_run_unless_given():
    assert schedule(lr_decay_style="linear", lr_warmup_iters=0)(500) == 0.5
    assert schedule(lr_decay_style="linear", lr_warmup_iters=0, lr_decay_iters=2000)(500) == 0.75
    assert schedule(lr_warmup_fraction=0.1, lr_decay_iters=2000).lr_warmup == 200
    assert schedule(400).lr_warmup == 4  # 0.01 by default


def test_samples():
    rate = schedule(10_000, "samples", lr_decay_style="linear", lr_warmup_samples=1000, lr_decay_samples=5000)
    assert rate(500) == 0.5
    assert rate(3000) == 0.5
    assert rate(5001) == 0.0


@pytest.mark.parametrize(
    ("unit", "flags", "named"),
    [
        ("iterations", {"lr_decay_samples": 5}, "--lr-decay-samples"),
        ("iterations", {"lr_warmup_samples": 5}, "--lr-warmup-samples"),
        ("samples", {"lr_warmup_iters": 5}, "--lr-warmup-iters"),
        ("samples", {"lr_wsd_decay_iters": 5}, "--lr-wsd-decay-iters"),
        ("iterations", {"lr_warmup_iters": 1000}, "--lr-warmup-iters"),
        ("iterations", {"lr_warmup_init": 2.0}, "--lr-warmup-init"),
        ("iterations", {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 999}, "--lr-wsd-decay-iters"),
    ],
)
def test_refusals_name_the_flag(unit, flags, named):
    with pytest.raises(UserError, match=named):
        schedule(1000, unit, **flags)


def test_wsd_decays_as_megatron_does_without_further_flags():
    """Its default shape is exponential: 2 * 0.5**progress - 1."""
    rate = schedule(lr_decay_style="WSD", lr_wsd_decay_iters=200)
    assert rate(900) == pytest.approx(2 * 0.5**0.5 - 1)
