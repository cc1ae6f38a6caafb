"""Decoding one position after another, with the keys and values of earlier ones kept.

Shapes: b prompts, m rows of a prompt (beams or samples), s encoder length, t most decoder positions, n heads of this
rank, d channels of a head, h hidden, V vocabulary.

All rows of a prompt lie beside each other in the cache, slot `position * m + row`, and nothing in it ever moves. When
beams change places, the small table `ancestors` says which slots a row may see, and the mask that is made of it
hides the others. So the m rows are m queries on the same keys, which are read once; and so it is with the keys and
values of the encoder output, which no row has a copy of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.errors import UserError
from megatron.core.extensions.score_bias import ScoreBias, Segments, additive_mask, masked_score
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.transformer.rotary import RotaryAngles
from megatron.core.transformer.transformer_layer import DecoderLayer


@dataclass
class DecoderState:
    """What decoding keeps from one position to the next; start with `DecoderState.start`.

    Attributes:
        position: Positions decoded so far.
        ancestors: `[b, m, t]`: at each position decoded so far, which of the prompt's rows a row descends from.
        keys_values: `[layers, 2, b, n, t * m, d]`.
        cross_keys_values: Of each layer, two of `[b, s, n, d]`.
        cross_bias: Hides the encoder's padding.
        position_biases: `[layers or 1, n, 1, t * m]`, the bias of the last position to all of them, or None.
        rotary: Angles of all positions, or None.
    """

    position: int
    ancestors: Tensor
    keys_values: Tensor
    cross_keys_values: list[tuple[Tensor, Tensor]]
    cross_bias: ScoreBias
    position_biases: Tensor | None
    rotary: RotaryAngles | None

    @classmethod
    def start(
        cls, model: T5Model, encoder_output: Tensor, encoder_mask: Tensor | None, max_length: int, beams: int = 1
    ) -> DecoderState:
        """Before the first position.

        Args:
            model: A whole model in evaluation mode.
            encoder_output: `[b, s, h]`.
            encoder_mask: bool `[b, s]`, True for real tokens; None when there is no padding.
            max_length: Most positions to decode, t.
            beams: Rows of a prompt, m.

        Raises:
            UserError: The model has fewer learned positions.
        """
        config, dtype, device = model.config, encoder_output.dtype, encoder_output.device
        if config.position_embedding_type == "learned_absolute" and max_length > config.max_position_embeddings:
            raise UserError(
                f"--max-new-tokens is {max_length}, but the model has {config.max_position_embeddings} positions "
                "(--max-position-embeddings); give at most as many"
            )
        layers = decoder_layers(model)
        batch, attention = len(encoder_output), layers[0].self_attention
        slots = (batch, attention.num_heads, max_length * beams, attention.head_dim)
        encoder_output = model.tensor_parallel.copy(encoder_output)
        return cls(
            position=0,
            ancestors=torch.zeros(batch, beams, max_length, dtype=torch.long, device=device),
            keys_values=torch.empty(len(layers), 2, *slots, dtype=dtype, device=device),
            cross_keys_values=[_cross_keys_values(layer, encoder_output) for layer in layers],
            cross_bias=ScoreBias(
                beams, encoder_output.shape[1], mask=additive_mask(Segments.of(None, None, encoder_mask), dtype)
            ),
            position_biases=_position_biases(model, max_length, beams, dtype),
            rotary=model.decoder.rotary(max_length, device, dtype),
        )

    def reorder(self, parents: Tensor) -> None:
        """Let row i of a prompt go on from where its row `parents[:, i]` is; `parents` is `[b, m]`."""
        self.ancestors = self.ancestors.gather(1, parents[:, :, None].expand_as(self.ancestors))

    def biases(self) -> list[ScoreBias]:
        """What each layer adds to its scores at this position: bias of positions, mask of other rows' slots."""
        batch, beams, _ = self.ancestors.shape
        count, slots = len(self.keys_values), (self.position + 1) * beams
        bias = None
        if self.position_biases is not None:
            bias = self.position_biases[:, None, :, :, -slots:]  # [layers or 1, 1, n, 1, slots]
        if beams > 1:
            rows = torch.arange(beams, device=self.ancestors.device)
            visible = self.ancestors[:, :, : self.position + 1, None] == rows  # [b, m, positions, m]
            dtype = self.keys_values.dtype
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            mask = mask.masked_fill_(~visible, masked_score(dtype)).view(batch, 1, beams, slots)
            bias = mask[None] if bias is None else bias + mask
        if bias is None:
            return [ScoreBias(beams, slots)] * count
        return [ScoreBias(beams, slots, mask=mask) for mask in bias.expand(count, *bias.shape[1:]).unbind()]


def decode_step(model: T5Model, state: DecoderState, tokens: Tensor) -> Tensor:
    """Decode position `state.position` and advance it.

    Args:
        model: The model of the state.
        state: Changed in place.
        tokens: `[b * m]`, the decoder's input at this position.

    Returns:
        Logits of the next tokens, `[b * m, V]`, the same on all tensor-parallel ranks.
    """
    assert not model.tensor_parallel.sequence_parallel, "a single position cannot be divided along the sequence"
    batch, beams, length = state.ancestors.shape
    assert state.position < length, f"the state has room for {length} positions"
    at = state.position
    state.ancestors[:, :, at] = torch.arange(beams, device=tokens.device)
    rotary = None if state.rotary is None else RotaryAngles(*(angles[at : at + 1] for angles in state.rotary))
    hidden = model.embedding.step(tokens.view(batch, beams), at)
    hidden = model.decoder.step(
        hidden, state.keys_values, at, state.biases(), rotary, state.cross_keys_values, state.cross_bias
    )
    state.position += 1
    return model.logits(hidden).flatten(0, 1)


def decoder_layers(model: T5Model) -> list[DecoderLayer]:
    """The decoder's layers in order."""
    return [layer for layer in model.decoder.layers.values() if isinstance(layer, DecoderLayer)]


def _cross_keys_values(layer: DecoderLayer, encoder_output: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[b, s, n, d]`, in memory `[b, n, s, d]`, which products with single positions want."""
    key, value = (part.transpose(1, 2).contiguous() for part in layer.cross_attention.keys_values(encoder_output))
    return key.transpose(1, 2), value.transpose(1, 2)


def _position_biases(model: T5Model, length: int, beams: int, dtype: torch.dtype) -> Tensor | None:
    """Bias of the last position `[layers or 1, n, 1, length * beams]`, the same for all rows' slots of a position."""
    tables = [model.decoder.relative_attention_bias]
    tables += [layer.relative_attention_bias for layer in decoder_layers(model)]
    rows = [table.last_row(length, dtype).repeat_interleave(beams, -1) for table in tables if table is not None]
    return torch.stack(rows)[:, :, None] if rows else None
