"""Exact floating-point operations of the model's matrix products, the numerator of TFLOP/s and MFU.

A product of `[m, k]` and `[k, n]` counts 2 m k n. Attention scores count in full, as they are computed, also where a
causal mask hides half of them. Element-wise work counts nothing.
"""

from __future__ import annotations

from megatron.core.config import ModelConfig
from megatron.core.models.T5.t5_units import Units


def unit_flops_per_sequence(config: ModelConfig, encoder_length: int, decoder_length: int) -> list[int]:
    """Operations of each unit's forward pass (`Units`) over one encoder row and one decoder row.

    A decoder layer projects the encoder output to keys and values itself, so that part of its work grows with the
    length of the encoder row.
    """
    s, t = encoder_length, decoder_length
    hidden, inner = config.hidden_size, config.inner_size
    projection = 2 * hidden * inner  # q, k, v or o, each token
    feed_forward = (3 if config.gated else 2) * 2 * hidden * config.ffn_hidden_size  # each token
    score = 4 * inner  # query-key product and sum of values, each query-key pair

    self_attention_encoder = 4 * projection * s + score * s * s
    self_attention_decoder = 4 * projection * t + score * t * t
    cross_attention = 2 * projection * t + 2 * projection * s + score * s * t
    units = Units.of(config)
    flops = [0] * len(units.all)
    for layer in units.encoder_layers:
        flops[layer] = self_attention_encoder + feed_forward * s
    for layer in units.decoder_layers:
        flops[layer] = self_attention_decoder + cross_attention + feed_forward * t
    flops[units.head] = 2 * hidden * config.padded_vocab_size * t
    return flops


def model_flops_per_sequence(config: ModelConfig, encoder_length: int, decoder_length: int) -> int:
    """Operations of one forward pass over one encoder row and one decoder row, head included."""
    return sum(unit_flops_per_sequence(config, encoder_length, decoder_length))


def training_flops_per_sequence(config: ModelConfig, encoder_length: int, decoder_length: int) -> int:
    """Forward and backward: each product's backward is two products of the same size. Recomputation is not counted."""
    return 3 * model_flops_per_sequence(config, encoder_length, decoder_length)
