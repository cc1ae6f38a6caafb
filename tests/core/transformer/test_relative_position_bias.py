import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import ModelConfig
from megatron.core.extensions.score_bias import MASKED_SCORE, ScoreBias
from megatron.core.parameters import initialize_parameters
from megatron.core.transformer.relative_position_bias import (
    RelativePositionBias,
    constant_beyond,
    relative_position_bucket,
)

# Smallest distance of each bucket from which the buckets widen, as T5 and T5X have them for (32, 128).
BIDIRECTIONAL = {0: 0, 1: 17, 2: 18, 7: 23, 8: 24, 12: 25, 16: 26, 23: 27, 32: 28, 46: 29, 64: 30, 91: 31}
CAUSAL = {
    15: 15, 16: 16, 19: 17, 21: 18, 24: 19, 27: 20, 31: 21, 35: 22, 40: 23, 46: 24, 52: 25, 59: 26, 67: 27, 77: 28,
    87: 29, 99: 30, 113: 31,
}  # fmt: skip


def buckets(distances, bidirectional, num_buckets=32, max_distance=128):
    relative = torch.as_tensor(distances)
    return relative_position_bucket(
        relative, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    ).tolist()


def expand(changes, up_to):
    """Change points to the bucket of every distance 0 .. up_to."""
    values = []
    for distance in range(up_to + 1):
        values.append(changes.get(distance, values[-1] + (1 if distance < 8 else 0) if values else 0))
    return values


def test_golden_buckets_after_the_query():
    expected = expand(BIDIRECTIONAL, 300)
    assert expected[:9] == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert buckets(range(301), bidirectional=True) == expected


def test_golden_buckets_before_the_query():
    expected = [value - 16 if value else 0 for value in expand(BIDIRECTIONAL, 300)]
    assert buckets([-distance for distance in range(301)], bidirectional=True) == expected


def test_golden_causal_buckets():
    values = list(range(16))
    for distance in range(16, 301):
        values.append(CAUSAL.get(distance, values[-1]))
    assert buckets([-distance for distance in range(301)], bidirectional=False) == values
    assert buckets(range(1, 301), bidirectional=False) == [0] * 300


def t5x_bucket(relative, bidirectional, num_buckets, max_distance):
    """The published formula in numpy float32, with T5X's epsilon inside the logarithm."""
    negative, result = -relative, 0
    if bidirectional:
        num_buckets //= 2
        result = (negative < 0).astype(np.int32) * num_buckets
        negative = np.abs(negative)
    else:
        negative = np.maximum(negative, 0)
    exact = num_buckets // 2
    share = np.log(negative.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    large = exact + (share * (num_buckets - exact)).astype(np.int32)
    return result + np.where(negative < exact, negative, np.minimum(large, num_buckets - 1))


@pytest.mark.parametrize("sizes", [(32, 128), (32, 64), (64, 256), (32, 256), (16, 32)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_distance_equals_t5x(sizes, bidirectional):
    distances = np.arange(-3000, 3001)
    assert buckets(distances, bidirectional, *sizes) == t5x_bucket(distances, bidirectional, *sizes).tolist()


def test_powers_fall_into_the_bucket_that_they_open():
    """5, 10, 20, 40, 80 open a bucket each; a logarithm rounded down would leave 10 in the bucket of 5."""
    assert buckets([-5, -9, -10, -19, -20, -40, -79, -80, -159], False, 10, 160) == [5, 5, 6, 6, 7, 8, 8, 9, 9]


def make_bias(bidirectional):
    config = ModelConfig(encoder_num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=8)
    bias = RelativePositionBias(config, bidirectional=bidirectional).double()
    initialize_parameters(bias, seed=0)
    return bias


def dense(module, length, dtype):
    """What the stack adds to the scores of `length` positions, causal in the decoder."""
    bias = ScoreBias(length, length, module(length, length), causal=not module.bidirectional)
    return bias.dense(dtype, torch.device("cpu"))


@settings(deadline=None, max_examples=10)
@given(length=st.integers(1, 150), bidirectional=st.booleans())
def test_bias_and_gradient_equal_a_direct_lookup(length, bidirectional):
    module = make_bias(bidirectional)
    table = module.weight.detach().clone().requires_grad_()
    relative = torch.arange(length) - torch.arange(length)[:, None]
    index = torch.tensor(buckets(relative.flatten(), bidirectional)).view(length, length)
    expected = table[:, index]
    if not bidirectional:
        expected = expected.masked_fill(relative > 0, MASKED_SCORE)
    actual = dense(module, length, torch.float64)
    assert actual.shape == (1, 2, length, length) and actual.is_contiguous()
    torch.testing.assert_close(actual[0], expected, rtol=0, atol=0)
    upstream = torch.randn(2, length, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    actual[0].backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(module.weight.grad, table.grad)


def test_bf16_bias_sums_its_gradient_in_the_tables_dtype():
    module = make_bias(bidirectional=True).float()
    dense(module, 512, torch.bfloat16).sum().backward()
    assert module.weight.grad.sum().item() == 2 * 512 * 512  # a bf16 sum would stall at 256


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (32, 17), (5, 64)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_diagonals_are_constant_from_the_distance_that_is_said(bidirectional, buckets, max_distance):
    distances = torch.arange(-2 * max_distance, 2 * max_distance + 1)
    found = relative_position_bucket(
        distances, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    first = constant_beyond(bidirectional, buckets, max_distance)
    for side in (-1, 1):
        far = found[side * distances >= first]
        assert far.eq(far[0]).all()
    before = found[distances == 1 - first]
    assert first <= max_distance and before != found[0]
