"""Decoding position by position gives what the decoder gives for whole sequences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.inference import packed_weights
from megatron.core.inference.kv_cache import DecoderState, decode_step
from megatron.core.inference.packed_weights import USES_BEFORE_PACKING, decoding_linear
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import initialize_parameters
from megatron.core.tensor_parallel import products

MODELS = {
    "relative": {},
    "relative, tied": {"share_embeddings_and_output_weights": True, "activation_function": "relu"},
    "a table a layer": {"relative_attention_bias_per_layer": True},
    "learned": {"position_embedding_type": "learned_absolute", "max_position_embeddings": 12},
    "rotary": {"position_embedding_type": "rope", "scale_attention_scores": True, "rotary_percent": 0.5},
    "none": {"position_embedding_type": "none", "add_bias_linear": True, "normalization": "LayerNorm"},
}


def build(compute=None, dtype=torch.float64, **options):
    config = ModelConfig(
        **{
            "encoder_num_layers": 2, "decoder_num_layers": 3, "hidden_size": 20, "num_attention_heads": 3,
            "kv_channels": 8, "ffn_hidden_size": 12, "vocab_size": 61, "make_vocab_size_divisible_by": 1,
            "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, **options,
        }
    )  # fmt: skip
    with torch.device("meta"):
        model = T5Model(config, compute)
    model.to_empty(device="cpu").to(dtype)
    initialize_parameters(model, seed=3)
    return model.eval()


def prompts(batch=3, length=7):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 61, (batch, length), generator=generator)
    lengths = torch.tensor([length, 1, length - 2])[:batch]
    return ids, torch.arange(length) < lengths[:, None]


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@torch.inference_mode()
def test_steps_are_the_whole_decoder(options):
    model, (ids, mask) = build(**options), prompts()
    encoder_output = model.encode(ids, mask=mask)
    outputs = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = model.logits(model.decode(outputs, encoder_output, encoder_mask=mask))
    state = DecoderState.start(model, encoder_output, mask, max_length=12)
    for position in range(12):
        logits = decode_step(model, state, outputs[:, position])
        assert distance(logits, expected[:, position]) < 1e-12


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), beams=st.integers(1, 4), steps=st.integers(1, 9))
@torch.inference_mode()
def test_rows_that_change_places_take_their_past_along(options, seed, beams, steps):
    model, (ids, mask) = build(**options), prompts(batch=2)
    encoder_output = model.encode(ids, mask=mask)
    generator = torch.Generator().manual_seed(seed)
    state = DecoderState.start(model, encoder_output, mask, steps, beams)
    history = torch.empty(2, beams, 0, dtype=torch.long)
    for _ in range(steps):
        tokens = torch.randint(0, 61, (2, beams, 1), generator=generator)
        history = torch.cat([history, tokens], -1)
        logits = decode_step(model, state, tokens.flatten())
        parents = torch.randint(0, beams, (2, beams), generator=generator)
        state.reorder(parents)
        history = history.gather(1, parents[:, :, None].expand_as(history))
        rows = model.decode(
            history.flatten(0, 1),
            encoder_output.repeat_interleave(beams, 0),
            encoder_mask=mask.repeat_interleave(beams, 0),
        )
        expected = model.logits(rows)[:, -1].view(2, beams, -1)
        reordered = logits.view(2, beams, -1).gather(1, parents[:, :, None].expand_as(expected))
        assert distance(reordered, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [{}, {"bf16": True}, {"fp16": True}, {"attention_backend": "unfused"}])
@pytest.mark.parametrize(("batch", "beams"), [(1, 1), (3, 1), (3, 3)])
@torch.inference_mode()
def test_precisions_and_backends(monkeypatch, dtype, compute, batch, beams):
    model, (ids, mask) = build(ComputeConfig(**compute), dtype, add_bias_linear=True), prompts(batch)
    encoder_output = model.encode(ids, mask=mask)
    outputs = torch.randint(0, 61, (batch * beams, 12), generator=torch.Generator().manual_seed(1))
    whole = model.decode(
        outputs, encoder_output.repeat_interleave(beams, 0), encoder_mask=mask.repeat_interleave(beams, 0)
    )
    expected = model.logits(whole)
    state = DecoderState.start(model, encoder_output, mask, 12, beams)
    monkeypatch.setattr(packed_weights, "LARGE_WEIGHT", 1)
    linear = decoding_linear(model, batch * beams, encoder_output.dtype)
    for position in range(12):
        with model.tensor_parallel.single_positions(linear):
            logits = decode_step(model, state, outputs[:, position])
        assert logits.dtype == expected.dtype
        accuracy = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[logits.dtype]
        assert distance(logits.float(), expected[:, position].float()) < accuracy


def test_more_positions_than_the_model_has_are_refused():
    model, (ids, mask) = build(**MODELS["learned"]), prompts()
    with pytest.raises(UserError, match="--max-new-tokens is 13, but the model has 12 positions"):
        DecoderState.start(model, model.encode(ids, mask=mask), mask, 13)


def test_weights_are_packed_after_a_while(monkeypatch):
    monkeypatch.setattr(packed_weights, "LARGE_WEIGHT", 61 * 20)
    model = build(dtype=torch.float32)
    linear, weight = decoding_linear(model, 2, torch.float32), model.lm_head.weight.detach()
    other, x = torch.randn(5, 20), torch.randn(2, 1, 20)
    for number in range(USES_BEFORE_PACKING + 2):
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
        for unknown_or_small in (other, model.decoder.layers["0"].cross_attention.q.weight.detach()):
            assert torch.equal(linear(x, unknown_or_small), F.linear(x, unknown_or_small))
        assert len(linear.packed) == (number >= USES_BEFORE_PACKING)
    assert decoding_linear(model, 1, torch.float32) is products.linear
