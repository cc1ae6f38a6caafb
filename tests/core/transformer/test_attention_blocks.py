"""Attention backends, masks without visible keys, rotary positions, norms, feed-forward, dropout."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.extensions.score_bias import MASKED_SCORE, ScoreBias, Segments, additive_mask, masked_score
from megatron.core.extensions.sdpa_attention import sdpa_attention
from megatron.core.extensions.unfused_attention import unfused_attention
from megatron.core.parameters import initialize_parameters
from megatron.core.tensor_parallel import TensorParallel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.norm import LayerNorm, RMSNorm
from megatron.core.transformer.rotary import apply_rotary, rotary_angles


def config(**fields):
    sizes = {"encoder_num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 8}
    return ModelConfig(**{**sizes, **fields})


def attention_inputs(seed, b, n, q, k, d, bias_batch):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    return draw(b, n, q, d), draw(b, n, k, d), draw(b, n, k, d), draw(bias_batch, n, q, k)


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 99), b=st.integers(1, 3), q=st.integers(1, 9), k=st.integers(1, 9), shared=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
)  # fmt: skip
def test_backends_agree(seed, b, q, k, shared, scale):
    inputs = attention_inputs(seed, b, 2, q, k, 4, 1 if shared else b)
    results = []
    for attention in (unfused_attention, sdpa_attention):
        output = attention(*inputs, scale, 0.0)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("attention", [unfused_attention, sdpa_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_visible_keys_stay_finite(attention, dtype):
    query, key, value, bias = (x.detach().to(dtype).requires_grad_() for x in attention_inputs(0, 2, 2, 5, 5, 4, 1))
    queries = torch.tensor([[1, 1, 2, 0, 0], [3, 0, 0, 0, 0]])
    keys = torch.tensor([[1, 1, 2, 3, 3], [1, 1, 2, 2, 2]])  # the zeros and the 3 of the second row see nothing
    mask = additive_mask(Segments.of(queries, keys), dtype)
    output = attention(query, key, value, (bias + mask).clamp(min=masked_score(dtype)), 1.0, 0.0)
    seeing = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    (output * seeing[:, None, :, None]).sum().backward()
    assert output.isfinite().all()
    for tensor in (query, key, value, bias):
        assert tensor.grad.isfinite().all()
    assert query.grad[1].eq(0).all() and value.grad[1].eq(0).all() and value.grad[0, :, 3:].eq(0).all()


def test_the_fp16_mask_is_finite_under_any_score():
    assert masked_score(torch.float32) == masked_score(torch.bfloat16) == MASKED_SCORE
    scores = torch.tensor([masked_score(torch.float16), -3e4], dtype=torch.float16)
    assert scores.sum().isfinite() and scores[0] + 3e4 < -1e3


def test_fp16_feed_forward_beyond_the_range_of_fp16():
    """The outputs of T5's feed-forward blocks exceed 65504, and so do those of this one; its sums are exact in fp16."""
    mlp = MLP(config(activation_function="relu", ffn_hidden_size=1000), ComputeConfig(fp16=True), 1, TensorParallel())
    with torch.no_grad():
        mlp.wi.weight.fill_(1.0)
        mlp.wo.weight.fill_(2.0)
    x = torch.full((1, 1, 16), 4.0, dtype=torch.float16, requires_grad=True)
    output = mlp(x)
    assert output.dtype == torch.float32 and output.eq(1000 * 2 * 16 * 4).all()
    (output.sum() / 1024).backward()
    assert x.grad.eq(1000 * 2 * 16 / 1024).all() and mlp.wo.weight.grad.eq(64 / 1024).all()


def test_masked_keys_have_no_weight():
    query, key, value, bias = attention_inputs(1, 1, 2, 3, 6, 4, 1)
    mask = torch.tensor([[True, True, False, True, False, False]])
    masked = bias + additive_mask(Segments.of(None, None, mask), bias.dtype)
    output = unfused_attention(query, key, value, masked, 1, 0.0)
    short = (x[:, :, mask[0]] for x in (key, value))
    torch.testing.assert_close(output, unfused_attention(query, *short, bias[..., mask[0]], 1.0, 0.0))


def test_masks_keep_size_one_dimensions():
    mask = additive_mask(Segments.of(None, None, torch.tensor([[True, False]])), torch.float32)
    assert mask.tolist() == [[[[0.0, MASKED_SCORE]]]]
    assert additive_mask(None, torch.float32) is None
    cpu = torch.device("cpu")
    assert ScoreBias(2, 2).dense(torch.float32, cpu) is None
    assert ScoreBias(2, 2, mask=mask).dense(torch.float32, cpu) is mask
    assert ScoreBias(2, 2, torch.zeros(3, 3)).dense(torch.float32, cpu).shape == (1, 3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_a_matrix_of_the_bias_has_the_diagonals_and_hides_what_either_mask_hides(dtype, causal):
    q, k = 3, 5
    diagonals = torch.arange(2 * (q + k - 1), dtype=torch.float32).view(2, -1)
    segments = Segments.of(None, None, torch.tensor([[True, True, True, False, False]]))
    cpu = torch.device("cpu")
    matrix = ScoreBias(q, k, diagonals, additive_mask(segments, dtype), causal).as_matrix(dtype, cpu)
    assert (matrix.query_length, matrix.key_length, matrix.diagonals, matrix.causal) == (q, k, None, False)
    for head, query, key in itertools.product(range(2), range(q), range(k)):
        found = matrix.mask[0, head, query, key].item()
        if key > 2 or (causal and key > query):
            assert 1.01 * masked_score(dtype) < found < 0.99 * masked_score(dtype)
        else:
            assert found == diagonals[head, key - query + q - 1].item()


def test_segments_on_one_side_only_are_refused():
    with pytest.raises(ValueError, match="for the encoder and the decoder, or for neither"):
        Segments.of(torch.ones(1, 2), None)


def test_rotary_scores_depend_on_the_difference_of_positions_only():
    rope = config(position_embedding_type="rope", kv_channels=8, rotary_percent=0.5)
    angles = rotary_angles(rope, 12, torch.device("cpu"), torch.float64)
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated_query = apply_rotary(query.expand(1, 12, 1, 8), angles)[0, :, 0]
    rotated_key = apply_rotary(key.expand(1, 12, 1, 8), angles)[0, :, 0]
    assert torch.equal(rotated_query[:, 4:], query[4:].expand(12, 4))  # the other half passes
    assert not torch.allclose(rotated_query[1, :4], query[:4])
    scores = rotated_query @ rotated_key.T
    for offset in range(-11, 12):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(scores[0, 0], query @ key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_takes_fp32_statistics(dtype):
    norm = RMSNorm(64, 1e-6)
    initialize_parameters(norm, seed=0)
    norm.weight.data.copy_(torch.linspace(0.5, 2.0, 64))
    x = (300 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    roundings = 1 if dtype == torch.bfloat16 else 2
    torch.testing.assert_close(norm(x).double(), expected, rtol=roundings * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_a_norm_of_a_sum_equals_the_sum_and_its_norm(dtype, kind):
    norm = kind(24, 1e-6)
    initialize_parameters(norm, seed=0)
    generator = torch.Generator().manual_seed(0)
    residual, branch = (torch.randn(2, 3, 24, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    total, normed = norm.add(residual, branch, 0.0)
    assert total.dtype == normed.dtype == dtype
    torch.testing.assert_close(total, residual + branch)
    torch.testing.assert_close(
        normed, norm(residual + branch), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    (total.square().sum() + normed.sin().sum()).backward()
    found = [residual.grad.clone(), norm.weight.grad.clone()]
    assert torch.equal(branch.grad, found[0])
    residual.grad = norm.weight.grad = None
    total = residual + branch
    (total.square().sum() + norm(total).sin().sum()).backward()
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, [residual.grad, norm.weight.grad], **tolerance)


def test_layer_norm_starts_as_standardisation():
    norm = LayerNorm(64, 1e-5)
    initialize_parameters(norm, seed=0)
    x = 3 + 2 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gated-gelu", "gated-silu"])
def test_mlp_equals_its_unfused_matrices(activation):
    mlp = MLP(config(activation_function=activation, ffn_hidden_size=20), ComputeConfig(), 1, TensorParallel()).double()
    initialize_parameters(mlp, seed=0)
    act = {
        "relu": torch.relu,
        "gelu": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "gated-gelu": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "gated-silu": lambda y: y * torch.sigmoid(y),
    }[activation]
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wi = mlp.wi.weight
    if activation.startswith("gated"):
        assert wi.shape == (40, 16)
        inner = act(x @ wi[0::2].T) * (x @ wi[1::2].T)
    else:
        assert wi.shape == (20, 16)
        inner = act(x @ wi.T)
    torch.testing.assert_close(mlp(x), inner @ mlp.wo.weight.T)
