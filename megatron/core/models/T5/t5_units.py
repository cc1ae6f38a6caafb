"""The units of the model: the pieces between which a pipeline may cut it.

In order: embedding of the encoder's tokens, encoder layers, encoder norm, embedding of the decoder's tokens, decoder
layers, decoder norm, head with the loss. A stage is a run of consecutive units, a `range`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.config import ModelConfig


@dataclass(frozen=True)
class Units:
    """Numbers of the units of a model with this many layers."""

    num_encoder_layers: int
    num_decoder_layers: int

    @classmethod
    def of(cls, config: ModelConfig) -> Units:
        """Those of a model."""
        return cls(config.encoder_num_layers, config.decoder_num_layers)

    encoder_embedding = 0

    @property
    def encoder_layers(self) -> range:
        """Layer i of the encoder is unit `encoder_layers[i]`."""
        return range(1, 1 + self.num_encoder_layers)

    @property
    def encoder_norm(self) -> int:
        """Norm after which the hidden state is the encoder output."""
        return 1 + self.num_encoder_layers

    @property
    def decoder_embedding(self) -> int:
        """Embedding of the decoder's tokens."""
        return 2 + self.num_encoder_layers

    @property
    def decoder_layers(self) -> range:
        """Layer i of the decoder is unit `decoder_layers[i]`."""
        start = 3 + self.num_encoder_layers
        return range(start, start + self.num_decoder_layers)

    @property
    def decoder_norm(self) -> int:
        """Norm before the head."""
        return self.decoder_layers.stop

    @property
    def head(self) -> int:
        """Projection to the vocabulary and the loss."""
        return self.decoder_layers.stop + 1

    @property
    def all(self) -> range:
        """Every unit."""
        return range(self.head + 1)
