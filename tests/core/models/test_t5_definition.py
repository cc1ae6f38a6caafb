"""The model equals a float64 T5 written from the definition: logits, loss and the gradient of every parameter.

In fp64 by torch's operations, and in fp32 by the operators of CPUs.
"""

import pytest
import torch
from plain_t5 import PlainT5, plain_loss

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import initialize_parameters

SIZES = {
    "encoder_num_layers": 2,
    "decoder_num_layers": 3,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "kv_channels": 6,  # inner width 18 != 12
    "ffn_hidden_size": 10,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
    "max_position_embeddings": 16,
    "vocab_size": 23,
    "make_vocab_size_divisible_by": 8,
}
V1_0 = {"activation_function": "relu", "share_embeddings_and_output_weights": True}
V1_1 = {"activation_function": "gated-gelu"}
VARIANTS = {
    "v1.0": V1_0,
    "v1.1": V1_1,
    "umt5": {**V1_1, "relative_attention_bias_per_layer": True},
    "umt5 sdpa": {**V1_1, "relative_attention_bias_per_layer": True, "backend": "sdpa"},
    "v1.1 sdpa": {**V1_1, "backend": "sdpa"},
    "v1.0 sdpa": {**V1_0, "backend": "sdpa"},
    "deeper encoder": {**V1_1, "encoder_num_layers": 3, "decoder_num_layers": 1},
    "tied, unscaled, silu": {
        "share_embeddings_and_output_weights": True,
        "scale_logits": False,
        "activation_function": "gated-silu",
    },
    "megatron": {
        "activation_function": "gelu",
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "add_bias_linear": True,
        "scale_attention_scores": True,
    },
    "rope": {"position_embedding_type": "rope", "rotary_percent": 0.75, "scale_attention_scores": True},
    "rope sdpa": {"position_embedding_type": "rope", "scale_attention_scores": True, "backend": "sdpa"},
    "no positions, biases": {"position_embedding_type": "none", "add_bias_linear": True},
    "learned sdpa": {"position_embedding_type": "learned_absolute", "backend": "sdpa"},
}
B, S, T = 2, 11, 7
# Relative and absolute tolerance of loss, logits and gradients.
TOLERANCES = {
    torch.float64: {"loss": (1e-11, 1e-11), "logits": (1e-9, 1e-10), "gradient": (1e-7, 1e-9)},
    torch.float32: {"loss": (1e-6, 0.0), "logits": (1e-5, 1e-5), "gradient": (1e-5, 1e-5)},
}
# Dtype and channels of a head, on which the kernel of attention depends.
COMPUTATIONS = {"fp64": (torch.float64, 6), "fp32": (torch.float32, 6), "fp32, tiles": (torch.float32, 16)}


def computed(*variants):
    """Parametrises a test over `variants` and how they are computed; those with a backend only in fp64."""
    cases = [
        (variant, computation)
        for variant in variants
        for computation in COMPUTATIONS
        if computation == "fp64" or "backend" not in VARIANTS[variant]
    ]
    return pytest.mark.parametrize(("variant", "computation"), cases)


def build(variant, computation, z_loss_weight=0.01):
    dtype, channels = COMPUTATIONS[computation]
    fields = {**SIZES, "kv_channels": channels, **VARIANTS[variant]}
    compute = ComputeConfig(attention_backend=fields.pop("backend", "auto"))
    with torch.device("meta"):
        model = T5Model(ModelConfig(**fields), compute, z_loss_weight).to(dtype)
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # biases and norm weights start at constants, which would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(2, 23, shape, generator=generator)  # noqa: E731
    labels = draw(B, T)
    labels[0, 2] = labels[1, -1] = -100
    return draw(B, S), draw(B, T), labels


def check(model, masks, encoder_ids, decoder_ids, labels):
    """Compare with the plain model; `visible(b)` below follows from the masks by the definition."""
    exact = {name: p.detach().to(torch.float64, copy=True).requires_grad_() for name, p in model.named_parameters()}
    plain = PlainT5(model.config, exact)
    ones = {"encoder": torch.ones(B, S, dtype=torch.long), "decoder": torch.ones(B, T, dtype=torch.long)}
    segments = {
        side: (masks.get(f"{side}_segment_ids", ones[side]) * masks.get(f"{side}_mask", ones[side])) for side in ones
    }
    expected_loss, expected_logits = 0.0, []
    for b in range(B):
        encoder, decoder = segments["encoder"][b], segments["decoder"][b]
        same = lambda q, k: (q[:, None] == k) & (k != 0)  # noqa: E731
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        visible = same(encoder, encoder), same(decoder, decoder) & causal, same(decoder, encoder)
        logits = plain.logits(encoder_ids[b], decoder_ids[b], *visible)
        expected_logits.append(logits[labels[b] != -100])
        expected_loss = expected_loss + plain_loss(logits, labels[b], model.z_loss_weight)
    expected_loss.backward()

    output = model(encoder_ids, decoder_ids, labels, **masks)
    assert output.logits is None
    assert output.loss.cross_entropy.shape == (B, T)
    assert output.loss.cross_entropy[labels == -100].eq(0).all() and output.loss.z_loss[labels == -100].eq(0).all()
    loss = output.loss.total[0]
    loss.backward()
    tolerances = TOLERANCES[next(model.parameters()).dtype]

    def compare(kind, found, expected, scale=1.0):
        rtol, atol = tolerances[kind]
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol * scale)

    compare("loss", loss, expected_loss)
    logits = model(encoder_ids, decoder_ids, **masks).logits
    assert logits.isfinite().all()
    compare("logits", logits[labels != -100], torch.cat(expected_logits))
    for name, parameter in model.named_parameters():
        expected = plain.p[name].grad
        compare("gradient", parameter.grad, expected, scale=max(1.0, expected.abs().max().item()))


@computed(*VARIANTS)
def test_loss_and_gradients(variant, computation):
    check(build(variant, computation), {}, *batch())


@computed("v1.0", "v1.1 sdpa", "umt5", "megatron")
def test_padding_masks(variant, computation):
    encoder_ids, decoder_ids, labels = batch()
    encoder_mask = torch.ones(B, S, dtype=torch.bool)
    encoder_mask[0, 8:] = False
    encoder_mask[1, :2] = False  # padding may stand anywhere
    decoder_mask = torch.ones(B, T, dtype=torch.bool)
    decoder_mask[1, 5:] = False
    labels[1, 5:] = -100
    masks = {"encoder_mask": encoder_mask, "decoder_mask": decoder_mask}
    check(build(variant, computation), masks, encoder_ids, decoder_ids, labels)


@computed("v1.0", "v1.1", "v1.1 sdpa", "umt5 sdpa", "rope", "learned sdpa")
def test_segments(variant, computation):
    encoder_ids, decoder_ids, labels = batch()
    encoder_segments = torch.tensor([[1] * 4 + [2] * 5 + [0] * 2, [1] * 6 + [2] * 2 + [3] * 3])
    decoder_segments = torch.tensor([[1] * 3 + [2] * 2 + [0] * 2, [1] * 2 + [2] * 2 + [3] * 3])
    labels[decoder_segments == 0] = -100
    masks = {"encoder_segment_ids": encoder_segments, "decoder_segment_ids": decoder_segments}
    check(build(variant, computation), masks, encoder_ids, decoder_ids, labels)


@computed("v1.1")
def test_segments_together_with_masks(variant, computation):
    encoder_ids, decoder_ids, labels = batch()
    encoder_segments = torch.tensor([[1] * 4 + [2] * 7, [1] * 6 + [2] * 5])
    decoder_segments = torch.tensor([[1] * 3 + [2] * 4, [1] * 2 + [2] * 5])
    encoder_mask, decoder_mask = torch.ones(B, S, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    encoder_mask[0, 3], encoder_mask[1, 9:], decoder_mask[0, 6:] = False, False, False
    labels[~decoder_mask] = -100
    masks = {
        "encoder_segment_ids": encoder_segments,
        "decoder_segment_ids": decoder_segments,
        "encoder_mask": encoder_mask,
        "decoder_mask": decoder_mask,
    }
    check(build(variant, computation, z_loss_weight=0.0), masks, encoder_ids, decoder_ids, labels)
