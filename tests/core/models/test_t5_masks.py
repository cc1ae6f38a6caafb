"""The additive masks that stacks hand to attention."""

import pytest
import torch

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.extensions import cpu_attention
from megatron.core.extensions.score_bias import ScoreBias
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import initialize_parameters


def packed_inputs(length):
    """Two rows of two documents each, as a model takes them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (2, length), generator=generator)
    segments = 1 + (torch.arange(length) >= torch.tensor([[length // 2], [length // 3]])).int()
    return (ids, ids), {"encoder_segment_ids": segments, "decoder_segment_ids": segments}


def build(backend):
    config = ModelConfig(
        encoder_num_layers=2, decoder_num_layers=2, hidden_size=32, num_attention_heads=2, kv_channels=16,
        ffn_hidden_size=64, vocab_size=60,
    )  # fmt: skip
    model = T5Model(config, ComputeConfig(bf16=True, attention_backend=backend))
    initialize_parameters(model, seed=1)
    return model.eval()


def test_the_operator_for_cpus_gets_masks_in_fp32_made_once(monkeypatch):
    masks = []
    attention = cpu_attention.attention

    def recorded(query, key, value, diagonals, mask, **options):
        masks.append(mask)
        return attention(query, key, value, diagonals, mask, **options)

    monkeypatch.setattr(cpu_attention, "attention", recorded)
    inputs, segments = packed_inputs(24)
    build("auto")(*inputs, **segments)
    assert len(masks) == 6 and all(mask.dtype == torch.float32 for mask in masks)
    assert len({mask.data_ptr() for mask in masks}) == 3  # of the encoder, the decoder, between them


def test_a_mask_alone_is_dense_in_the_dtype_that_is_asked_for():
    bias = ScoreBias(3, 4, mask=torch.zeros(1, 1, 1, 4))
    assert bias.dense(torch.bfloat16, torch.device("cpu")).dtype == torch.bfloat16


@pytest.mark.parametrize("length", [8, 24])
@torch.no_grad()
def test_other_operators_take_the_same_masks(length):
    """Few positions take torch's attention although their masks were made for the operator."""
    inputs, segments = packed_inputs(length)
    logits = {backend: build(backend)(*inputs, **segments).logits.float() for backend in ("auto", "unfused", "sdpa")}
    for backend in ("unfused", "sdpa"):
        assert (logits["auto"] - logits[backend]).norm() < 0.02 * logits["auto"].norm()
