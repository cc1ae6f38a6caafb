"""T5: model, presets, floating-point operations."""

from megatron.core.models.T5.t5_flops import model_flops_per_sequence, training_flops_per_sequence
from megatron.core.models.T5.t5_model import T5Decoder, T5Embedding, T5Encoder, T5Model, T5Output
from megatron.core.models.T5.t5_presets import PRESETS

__all__ = [
    "PRESETS",
    "T5Decoder",
    "T5Embedding",
    "T5Encoder",
    "T5Model",
    "T5Output",
    "model_flops_per_sequence",
    "training_flops_per_sequence",
]
