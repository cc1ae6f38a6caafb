"""T5 (Raffel et al. 2020): an encoder and a decoder stack over one embedding, and a head over the vocabulary.

Shapes: b batch, s encoder length, t decoder length, h hidden, n heads, V rows of the embedding (padded vocabulary).

The model is a list of units (`t5_units`): embedding, encoder layers, encoder norm, embedding again, decoder layers,
decoder norm, head. The stacks take embedded hidden states and the decoder takes the encoder output explicitly, so that
a pipeline stage (`t5_stage`) can hold any run of units, under the same parameter names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.models.T5.t5_units import Units
from megatron.core.tensor_parallel import Embedding, Linear, TokenLoss, vocab_cross_entropy
from megatron.core.transformer.attention_bias import causal_bias, effective_segments, masked_bias, visible_keys
from megatron.core.transformer.initialization import matrix_init
from megatron.core.transformer.norm import build_norm
from megatron.core.transformer.relative_position_bias import RelativePositionBias
from megatron.core.transformer.rotary import RotaryAngles, rotary_angles
from megatron.core.transformer.transformer_layer import DecoderLayer, EncoderLayer


class T5Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits: `[b, t, V]` in the compute dtype; None when labels were given.
        loss: Unreduced loss terms `[b, t]`; None without labels.
        encoder_output: `[b, s, h]`.
    """

    logits: Tensor | None
    loss: TokenLoss | None
    encoder_output: Tensor


class T5Embedding(nn.Module):
    """Word embedding that encoder and decoder share, learned absolute positions if asked for, and dropout.

    T5 v1.0 reads the same matrix a third time as the head, for which no positions are needed.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, has_positions: bool) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.dropout = config.hidden_dropout
        self.compute_dtype = torch.bfloat16 if compute.bf16 else None
        init = matrix_init(config, 1.0)
        self.word_embeddings = Embedding(config.padded_vocab_size, hidden, axis="vocab", init=init)
        self.position_embeddings: Embedding | None = None
        if has_positions and config.position_embedding_type == "learned_absolute":
            self.position_embeddings = Embedding(
                config.max_position_embeddings, hidden, axis="positions", init=init, weight_decay=False
            )

    def forward(self, *input_ids: Tensor) -> tuple[Tensor, ...]:
        """Each of the ids `[b, s]` to `[b, s, h]` in the compute dtype.

        Encoder and decoder ids together are one lookup, whose backward makes one gradient of the table's size.

        Raises:
            UserError: A sequence is longer than the table of learned positions.
        """
        words = self.word_embeddings(torch.cat([ids.flatten() for ids in input_ids]))
        parts = words.split([ids.numel() for ids in input_ids])
        return tuple(self._finish(part.unflatten(0, ids.shape)) for part, ids in zip(parts, input_ids, strict=True))

    def _finish(self, hidden: Tensor) -> Tensor:
        if self.position_embeddings is not None:
            length, rows = hidden.shape[1], self.position_embeddings.weight.shape[0]
            if length > rows:
                raise UserError(
                    f"--max-position-embeddings is {rows}, but a sequence has {length} tokens; "
                    f"give at least {length} or shorten the sequences"
                )
            hidden = hidden + self.position_embeddings.weight[:length]
        if self.compute_dtype is not None:
            hidden = hidden.to(self.compute_dtype)
        return F.dropout(hidden, self.dropout, self.training)


class _Stack(nn.Module):
    """What both stacks share: layers, the final norm, the table of the relative position bias, recomputation."""

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        layers: dict[str, nn.Module],
        *,
        bidirectional: bool,
        has_final_norm: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = compute.recompute_granularity == "full"
        self.dropout = config.hidden_dropout
        self.relative_attention_bias: RelativePositionBias | None = None
        if config.position_embedding_type == "relative" and layers:
            self.relative_attention_bias = RelativePositionBias(config, bidirectional=bidirectional)
        self.layers = nn.ModuleDict(layers)
        self.final_norm = build_norm(config) if has_final_norm else None

    def rotary(self, hidden: Tensor) -> RotaryAngles | None:
        """Rotary angles for the positions of `hidden` `[b, s, h]`, or None when positions are not rotary."""
        if self.config.position_embedding_type != "rope":
            return None
        return rotary_angles(self.config, hidden.shape[1], hidden.device, hidden.dtype)

    def run_layers(self, hidden: Tensor, *arguments: Any) -> Tensor:
        """All layers in turn, recomputing each in the backward pass if asked for; `[b, s, h]` to `[b, s, h]`."""
        for layer in self.layers.values():
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, *arguments, use_reentrant=False)
            else:
                hidden = layer(hidden, *arguments)
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """Final norm and dropout, where they are part of this stack."""
        if self.final_norm is None:
            return hidden
        return F.dropout(self.final_norm(hidden), self.dropout, self.training)


class T5Encoder(_Stack):
    """Bidirectional stack, or the part of it that `units` names."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, units: range) -> None:
        numbers = Units.of(config)
        layers: dict[str, nn.Module] = {
            str(i): EncoderLayer(config, compute) for i, unit in enumerate(numbers.encoder_layers) if unit in units
        }
        has_norm = numbers.encoder_norm in units
        super().__init__(config, compute, layers, bidirectional=True, has_final_norm=has_norm)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """Embedded tokens `[b, s, h]` to the encoder output `[b, s, h]`.

        Args:
            hidden: `[b, s, h]`.
            mask: bool `[b, s]`, True for real tokens; None when there is no padding.
            segment_ids: `[b, s]`, documents of packed rows from 1, 0 for padding.
        """
        bias = None
        if self.relative_attention_bias is not None:
            bias = self.relative_attention_bias(hidden.shape[1], hidden.dtype)
        segments = effective_segments(mask, segment_ids)
        bias = masked_bias(bias, visible_keys(segments, segments, mask), hidden.dtype)
        return self.finish(self.run_layers(hidden, bias, self.rotary(hidden)))


class T5Decoder(_Stack):
    """Causal stack with cross-attention to the encoder output, or the part of it that `units` names."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, units: range) -> None:
        numbers = Units.of(config)
        layers: dict[str, nn.Module] = {
            str(i): DecoderLayer(config, compute) for i, unit in enumerate(numbers.decoder_layers) if unit in units
        }
        has_norm = numbers.decoder_norm in units
        super().__init__(config, compute, layers, bidirectional=False, has_final_norm=has_norm)

    def forward(
        self,
        hidden: Tensor,
        encoder_output: Tensor | None,
        *,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        encoder_segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Embedded tokens `[b, t, h]` and the encoder output `[b, s, h]` to the decoder output `[b, t, h]`.

        `mask` and `segment_ids` `[b, t]` describe the decoder's tokens, the other two `[b, s]` the encoder's. A part
        without layers needs no encoder output.
        """
        if self.relative_attention_bias is not None:
            bias = self.relative_attention_bias(hidden.shape[1], hidden.dtype)
        else:
            bias = causal_bias(hidden.shape[1], hidden.device, hidden.dtype)
        segments = effective_segments(mask, segment_ids)
        encoder_segments = effective_segments(encoder_mask, encoder_segment_ids)
        self_bias = masked_bias(bias, visible_keys(segments, segments, mask), hidden.dtype)
        cross_bias = masked_bias(None, visible_keys(segments, encoder_segments, encoder_mask), hidden.dtype)
        return self.finish(self.run_layers(hidden, encoder_output, self_bias, cross_bias, self.rotary(hidden)))


class T5Model(nn.Module):
    """Encoder-decoder with a head over the vocabulary.

    Build it under `torch.device("meta")`, then `to_empty` and `initialize_parameters`; nothing but parameters is kept
    on the module. Parameters may be fp32 with `compute.bf16`: each layer casts its weights.

    Args:
        config: Architecture.
        compute: Dtype, attention backend, recomputation.
        z_loss_weight: Weight of the z-loss in `T5Output.loss`.
        units: Units to build; all when not given. A stack without any of its units is empty, without parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig | None = None,
        z_loss_weight: float = 0.0,
        units: range | None = None,
    ) -> None:
        super().__init__()
        compute = ComputeConfig() if compute is None else compute
        numbers = Units.of(config)
        self.units = numbers.all if units is None else units
        self.config = config
        self.z_loss_weight = z_loss_weight
        self.logit_scale = config.hidden_size**-0.5 if config.scale_logits else 1.0
        tied, has_head = config.share_embeddings_and_output_weights, numbers.head in self.units
        embeds = numbers.encoder_embedding in self.units or numbers.decoder_embedding in self.units
        if embeds or (tied and has_head):
            self.embedding = T5Embedding(config, compute, has_positions=embeds)
        self.encoder = T5Encoder(config, compute, self.units)
        self.decoder = T5Decoder(config, compute, self.units)
        self.lm_head: Linear | None = None
        if has_head and not tied:
            init = matrix_init(config, config.hidden_size**-0.5, truncated=True)
            self.lm_head = Linear(config.hidden_size, config.padded_vocab_size, axes=("vocab", "embed"), init=init)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers in the order in which they run."""
        return [*self.encoder.layers.values(), *self.decoder.layers.values()]

    def encode(self, input_ids: Tensor, *, mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """Ids `[b, s]` to the encoder output `[b, s, h]`; the keywords are those of `T5Encoder.forward`."""
        (hidden,) = self.embedding(input_ids)
        return self.encoder(hidden, mask=mask, segment_ids=segment_ids)

    def decode(
        self,
        input_ids: Tensor,
        encoder_output: Tensor,
        *,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        encoder_segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Ids `[b, t]` and the encoder output `[b, s, h]` to the decoder output `[b, t, h]`."""
        (hidden,) = self.embedding(input_ids)
        return self.decoder(
            hidden,
            encoder_output,
            mask=mask,
            segment_ids=segment_ids,
            encoder_mask=encoder_mask,
            encoder_segment_ids=encoder_segment_ids,
        )

    def logits(self, decoder_output: Tensor) -> Tensor:
        """`[b, t, h]` to `[b, t, V]`; the rows that pad the vocabulary are ordinary logits, as in T5."""
        if self.logit_scale != 1.0:
            decoder_output = decoder_output * self.logit_scale
        if self.lm_head is not None:
            return self.lm_head(decoder_output)
        return F.linear(decoder_output, self.embedding.word_embeddings.weight.to(decoder_output.dtype))

    def forward(
        self,
        encoder_input_ids: Tensor,
        decoder_input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        encoder_mask: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        encoder_segment_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
    ) -> T5Output:
        """Logits, or with labels the unreduced loss.

        Args:
            encoder_input_ids: `[b, s]`, any integer dtype.
            decoder_input_ids: `[b, t]`: the labels shifted right by one, starting with the pad id.
            labels: `[b, t]`; `IGNORED_LABEL` leaves a token out.
            encoder_mask: bool `[b, s]`, True for real tokens; None when there is no padding.
            decoder_mask: bool `[b, t]`, likewise.
            encoder_segment_ids: `[b, s]`, documents of packed rows from 1, 0 for padding.
            decoder_segment_ids: `[b, t]`, likewise; decoder segment i reads encoder segment i.
        """
        encoder_hidden, decoder_hidden = self.embedding(encoder_input_ids, decoder_input_ids)
        encoder_output = self.encoder(encoder_hidden, mask=encoder_mask, segment_ids=encoder_segment_ids)
        decoder_output = self.decoder(
            decoder_hidden,
            encoder_output,
            mask=decoder_mask,
            segment_ids=decoder_segment_ids,
            encoder_mask=encoder_mask,
            encoder_segment_ids=encoder_segment_ids,
        )
        logits = self.logits(decoder_output)
        if labels is None:
            return T5Output(logits, None, encoder_output)
        return T5Output(None, vocab_cross_entropy(logits, labels, self.z_loss_weight), encoder_output)
