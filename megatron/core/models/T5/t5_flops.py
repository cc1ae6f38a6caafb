"""Exact floating-point operations of the model's matrix products, the numerator of TFLOP/s and MFU.

A product of `[m, k]` and `[k, n]` counts 2 m k n. Attention scores count in full, as they are computed, also where a
causal mask hides half of them. Element-wise work counts nothing.
"""

from __future__ import annotations

from megatron.core.config import ModelConfig


def model_flops_per_sequence(config: ModelConfig, encoder_length: int, decoder_length: int) -> int:
    """Floating-point operations of one forward pass over one encoder row and one decoder row, head included."""
    s, t = encoder_length, decoder_length
    hidden, inner = config.hidden_size, config.inner_size
    encoder_layers, decoder_layers = config.encoder_num_layers, config.decoder_num_layers
    projection = 2 * hidden * inner  # q, k, v or o, each token
    feed_forward = (3 if config.gated else 2) * 2 * hidden * config.ffn_hidden_size  # each token
    score = 4 * inner  # query-key product and sum of values, each query-key pair

    self_attention_encoder = 4 * projection * s + score * s * s
    self_attention_decoder = 4 * projection * t + score * t * t
    cross_attention = 2 * projection * t + 2 * projection * s + score * s * t
    encoder = encoder_layers * (self_attention_encoder + feed_forward * s)
    decoder = decoder_layers * (self_attention_decoder + cross_attention + feed_forward * t)
    head = 2 * hidden * config.padded_vocab_size * t
    return encoder + decoder + head


def training_flops_per_sequence(config: ModelConfig, encoder_length: int, decoder_length: int) -> int:
    """Forward and backward: each product's backward is two products of the same size. Recomputation is not counted."""
    return 3 * model_flops_per_sequence(config, encoder_length, decoder_length)
