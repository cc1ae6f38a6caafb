"""T5 (Raffel et al. 2020): an encoder and a decoder stack over one embedding, and a head over the vocabulary.

Shapes: b batch, s encoder length, t decoder length, h hidden, n heads, V rows of the embedding (padded vocabulary).
Primed ones are a tensor-parallel rank's part: n' of the heads, V' of the vocabulary; under sequence parallelism s' and
t' of the sequences, padded to a multiple of the ranks, otherwise they are s and t.

The model is a list of units (`t5_units`): embedding, encoder layers, encoder norm, embedding again, decoder layers,
decoder norm, head. The stacks take embedded hidden states and the decoder takes the encoder output explicitly, so that
a pipeline stage (`t5_stage`) can hold any run of units, under the same parameter names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.extensions.attention import AttentionRequest, choose_attention
from megatron.core.extensions.score_bias import ScoreBias, Segments
from megatron.core.models.T5.t5_units import Units
from megatron.core.parameters import local_tensor
from megatron.core.tensor_parallel import (
    Embedding,
    TensorParallel,
    TokenLoss,
    VocabParallelEmbedding,
    VocabParallelHead,
    head_loss,
    join_logits,
    vocab_parallel_logits,
)
from megatron.core.transformer.attention_bias import effective_segments, pad_masks
from megatron.core.transformer.elementwise import dropout
from megatron.core.transformer.initialization import matrix_init
from megatron.core.transformer.norm import build_norm
from megatron.core.transformer.precision import compute_dtype, residual_dtype
from megatron.core.transformer.relative_position_bias import RelativePositionBias
from megatron.core.transformer.rotary import RotaryAngles, rotary_angles
from megatron.core.transformer.transformer_layer import DecoderLayer, EncoderLayer


class T5Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits: `[b, t, V]` in the compute dtype; None when labels were given.
        loss: Loss terms `[b, t]` and their sum, which can be differentiated; None without labels.
        encoder_output: `[b, s', h]`.
    """

    logits: Tensor | None
    loss: TokenLoss | None
    encoder_output: Tensor


class T5Embedding(nn.Module):
    """Word embedding that encoder and decoder share, learned absolute positions if asked for, and dropout.

    T5 v1.0 reads the same matrix a third time as the head, for which no positions are needed.
    """

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, tensor_parallel: TensorParallel, *, has_positions: bool
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.tensor_parallel = tensor_parallel
        self.dropout = config.hidden_dropout
        self.residual_dtype = residual_dtype(compute)
        init = matrix_init(config, 1.0)
        self.word_embeddings = VocabParallelEmbedding(
            config.padded_vocab_size, hidden, init=init, tensor_parallel=tensor_parallel
        )
        self.position_embeddings: Embedding | None = None
        if has_positions and config.position_embedding_type == "learned_absolute":
            self.position_embeddings = Embedding(
                config.max_position_embeddings, hidden, axis="positions", init=init, weight_decay=False
            )

    def forward(self, *input_ids: Tensor) -> tuple[Tensor, ...]:
        """Each of the ids `[b, s]` to `[b, s', h]` in the dtype of the residual stream.

        Encoder and decoder ids together are one lookup, whose backward makes one gradient of the table's size.

        Raises:
            UserError: A sequence is longer than the table of learned positions.
        """
        # Positions are added in the table's dtype, so words are cast before them only where there are none.
        dtype = self.residual_dtype if self.position_embeddings is None else None
        words = self.word_embeddings(*input_ids, dtype=dtype)
        return tuple(self._finish(part, ids.shape[1]) for part, ids in zip(words, input_ids, strict=True))

    def _finish(self, hidden: Tensor, length: int) -> Tensor:
        if self.position_embeddings is not None:
            rows = self.position_embeddings.weight.shape[0]
            if length > rows:
                raise UserError(
                    f"--max-position-embeddings is {rows}, but a sequence has {length} tokens; "
                    f"give at least {length} or shorten the sequences"
                )
            first = self.tensor_parallel.rank * hidden.shape[1] if self.tensor_parallel.sequence_parallel else 0
            hidden = hidden + self.position_embeddings.rows(first, hidden.shape[1])
            hidden = hidden.to(self.residual_dtype or hidden.dtype)
        return dropout(hidden, self.dropout if self.training else 0.0)

    def step(self, input_ids: Tensor, position: int) -> Tensor:
        """Ids `[b, m]`, all of one position, to `[b, m, h]`, without dropout."""
        (hidden,) = self.word_embeddings(input_ids)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings.rows(position, 1)
        return hidden.to(self.residual_dtype or hidden.dtype)


class _Stack(nn.Module):
    """What both stacks share: layers, the final norm, the table of the relative position bias, recomputation."""

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        tensor_parallel: TensorParallel,
        layers: dict[str, nn.Module],
        *,
        bidirectional: bool,
        has_final_norm: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.tensor_parallel = tensor_parallel
        self.compute_dtype = compute_dtype(compute)
        self.attention_backend = compute.attention_backend
        self.compiled = compute.compile
        self.groups = recomputation_groups(compute, len(layers))
        self.dropout = config.hidden_dropout
        self.has_dropout = config.hidden_dropout > 0 or config.attention_dropout > 0
        self.relative_attention_bias: RelativePositionBias | None = None
        if config.position_embedding_type == "relative" and layers and not config.relative_attention_bias_per_layer:
            self.relative_attention_bias = RelativePositionBias(config, bidirectional=bidirectional)
        self.layers = nn.ModuleDict(layers)
        self.final_norm = build_norm(config, compute) if has_final_norm else None

    def padding(self, length: int) -> int:
        """Tokens that sequence parallelism adds to a sequence of `length`."""
        return self.tensor_parallel.padded_length(length) - length

    def rotary(self, length: int, device: torch.device, dtype: torch.dtype) -> RotaryAngles | None:
        """Rotary angles for `length` positions, or None when positions are not rotary."""
        if self.config.position_embedding_type != "rope":
            return None
        return rotary_angles(self.config, length, device, dtype)

    def prepared(self, bias: ScoreBias, dtype: torch.dtype, device: torch.device, *, has_diagonals: bool) -> ScoreBias:
        """The bias as the attention backend takes it that computes with it, made once for all layers.

        Args:
            bias: Of self- or of cross-attention.
            dtype: Of matrix products.
            device: Of activations.
            has_diagonals: Whether a position bias is part of it, or comes with the layers.
        """
        config, parallel = self.config, self.tensor_parallel
        request = AttentionRequest(
            device,
            dtype,
            config.kv_channels,
            has_diagonals=has_diagonals,
            has_segments=bias.segments is not None,
            causal=bias.causal,
            dropout=config.attention_dropout if self.training else 0.0,
            training=torch.is_grad_enabled(),
            compiled=self.compiled,
            divided=parallel.size > 1 and not parallel.sequence_parallel,
        )
        backend = choose_attention(self.attention_backend, request)
        return backend.prepare(bias._replace(backend=backend), dtype, device)

    def self_bias(
        self, length: int, segments: Segments | None, *, causal: bool, dtype: torch.dtype, device: torch.device
    ) -> ScoreBias:
        """What self-attention of `length` positions adds to its scores; `dtype` is that of matrix products."""
        bias = ScoreBias(length, length, causal=causal, segments=segments)
        own = self.relative_attention_bias
        if own is not None:
            bias = bias._replace(diagonals=own(length, length), constant_beyond=own.constant_beyond)
        has_diagonals = self.config.position_embedding_type == "relative"
        return self.prepared(bias, dtype, device, has_diagonals=has_diagonals)

    def run_layers(self, hidden: Tensor, *arguments: Any) -> Tensor:
        """All layers in turn, recomputing groups of them in the backward pass if asked for; `[b, s', h]` each way."""
        layers = list(self.layers.values())
        for group, recompute in self.groups:
            if recompute and torch.is_grad_enabled():
                hidden = checkpoint(
                    _run,
                    [layers[i] for i in group],
                    hidden,
                    *arguments,
                    use_reentrant=False,
                    preserve_rng_state=self.training and self.has_dropout,
                )
            else:
                hidden = _run([layers[i] for i in group], hidden, *arguments)
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """Final norm and dropout, where they are part of this stack."""
        if self.final_norm is None:
            return hidden
        return dropout(self.final_norm(hidden), self.dropout if self.training else 0.0)


def _run(layers: list[nn.Module], hidden: Tensor, *arguments: Any) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, *arguments)
    return hidden


def recomputation_groups(compute: ComputeConfig, num_layers: int) -> list[tuple[range, bool]]:
    """Consecutive layers of a stack (or of a stage's part of it) that are run together, and whether to recompute them.

    Recomputing keeps a group's input only and runs the group again in the backward pass. `uniform`: groups of
    `recompute_num_layers` (default 1). `block`: the first `recompute_num_layers` (default all), each by itself.
    """
    if compute.recompute_granularity != "full":
        return [(range(num_layers), False)]
    if compute.recompute_method == "block":
        count = min(compute.recompute_num_layers or num_layers, num_layers)
        return [(range(i, i + 1), True) for i in range(count)] + [(range(count, num_layers), False)]
    size = compute.recompute_num_layers or 1
    return [(range(start, min(start + size, num_layers)), True) for start in range(0, num_layers, size)]


class T5Encoder(_Stack):
    """Bidirectional stack, or the part of it that `units` names."""

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, units: range, tensor_parallel: TensorParallel
    ) -> None:
        numbers = Units.of(config)
        layers: dict[str, nn.Module] = {
            str(i): EncoderLayer(config, compute, tensor_parallel)
            for i, unit in enumerate(numbers.encoder_layers)
            if unit in units
        }
        has_norm = numbers.encoder_norm in units
        super().__init__(config, compute, tensor_parallel, layers, bidirectional=True, has_final_norm=has_norm)

    def forward(
        self, hidden: Tensor, length: int, *, mask: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """Embedded tokens `[b, s', h]` to the encoder output `[b, s', h]`.

        Args:
            hidden: `[b, s', h]`.
            length: s; sequence parallelism may have padded the sequence.
            mask: bool `[b, s]`, True for real tokens; None when there is no padding.
            segment_ids: `[b, s]`, documents of packed rows from 1, 0 for padding.
        """
        dtype, device, padding = self.compute_dtype or hidden.dtype, hidden.device, self.padding(length)
        mask, segment_ids = pad_masks(mask, segment_ids, length, padding, device)
        length += padding
        ids = effective_segments(mask, segment_ids)
        bias = self.self_bias(length, Segments.of(ids, ids, mask), causal=False, dtype=dtype, device=device)
        return self.finish(self.run_layers(hidden, bias, self.rotary(length, device, dtype)))


class T5Decoder(_Stack):
    """Causal stack with cross-attention to the encoder output, or the part of it that `units` names."""

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, units: range, tensor_parallel: TensorParallel
    ) -> None:
        numbers = Units.of(config)
        layers: dict[str, nn.Module] = {
            str(i): DecoderLayer(config, compute, tensor_parallel)
            for i, unit in enumerate(numbers.decoder_layers)
            if unit in units
        }
        has_norm = numbers.decoder_norm in units
        super().__init__(config, compute, tensor_parallel, layers, bidirectional=False, has_final_norm=has_norm)

    def forward(
        self,
        hidden: Tensor,
        length: int,
        encoder_output: Tensor | None,
        encoder_length: int,
        *,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        encoder_segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Embedded tokens `[b, t', h]` and the encoder output `[b, s', h]` to the decoder output `[b, t', h]`.

        `length` is t, `encoder_length` s; sequence parallelism may have padded the sequences. `mask` and `segment_ids`
        `[b, t]` describe the decoder's tokens, the other two `[b, s]` the encoder's. A part without layers needs no
        encoder output.

        The encoder output is brought to the ranks here, once for all layers: one collective forward, and one for the
        sum of all layers' gradients.
        """
        if not self.layers:
            return self.finish(hidden)
        assert encoder_output is not None
        encoder_output = self.tensor_parallel.enter(encoder_output)
        dtype, device, padding = self.compute_dtype or hidden.dtype, hidden.device, self.padding(length)
        if mask is not None or segment_ids is not None:  # otherwise causality hides the padding
            mask, segment_ids = pad_masks(mask, segment_ids, length, padding, device)
        length += padding
        encoder_mask, encoder_segment_ids = pad_masks(
            encoder_mask, encoder_segment_ids, encoder_length, self.padding(encoder_length), device
        )
        ids = effective_segments(mask, segment_ids)
        encoder_ids = effective_segments(encoder_mask, encoder_segment_ids)
        self_bias = self.self_bias(length, Segments.of(ids, ids, mask), causal=True, dtype=dtype, device=device)
        segments = Segments.of(ids, encoder_ids, encoder_mask)
        cross_bias = ScoreBias(length, encoder_output.shape[1], segments=segments)
        cross_bias = self.prepared(cross_bias, dtype, device, has_diagonals=False)
        rotary = self.rotary(length, device, dtype)
        return self.finish(self.run_layers(hidden, encoder_output, self_bias, cross_bias, rotary))

    def step(
        self,
        hidden: Tensor,
        cache: Tensor,
        position: int,
        biases: Sequence[ScoreBias],
        rotary: RotaryAngles | None,
        cross_keys_values: Sequence[tuple[Tensor, Tensor]],
        cross_bias: ScoreBias,
    ) -> Tensor:
        """One position of generation through all layers, without dropout: `hidden` `[b, m, h]` to the same.

        `cache` `[layers, 2, b, n, slots, d]`, `biases` and `cross_keys_values` have an entry for each layer; see
        `DecoderLayer.step` for the rest.
        """
        for layer, layer_cache, bias, keys_values in zip(
            self.layers.values(), cache.unbind(), biases, cross_keys_values, strict=True
        ):
            assert isinstance(layer, DecoderLayer)
            hidden = layer.step(hidden, layer_cache, position, bias, rotary, keys_values, cross_bias)
        assert self.final_norm is not None
        return self.final_norm(hidden)


class T5Model(nn.Module):
    """Encoder-decoder with a head over the vocabulary.

    Build it under `torch.device("meta")`, shard it (`t5_sharding`), then `to_empty` and `initialize_parameters`;
    nothing but parameters is kept on the module. Parameters may be fp32 with `compute.bf16` and `fp16`: each layer
    casts its weights. All tensor-parallel ranks are given the same batch and get the same losses and logits.

    Args:
        config: Architecture.
        compute: Precision, attention backend, recomputation.
        z_loss_weight: Weight of the z-loss in `T5Output.loss`.
        units: Units to build; all when not given. A stack without any of its units is empty, without parameters.
        tensor_parallel: The ranks that divide each layer; a single one when not given.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig | None = None,
        z_loss_weight: float = 0.0,
        units: range | None = None,
        tensor_parallel: TensorParallel | None = None,
    ) -> None:
        super().__init__()
        compute = ComputeConfig() if compute is None else compute
        parallel = TensorParallel() if tensor_parallel is None else tensor_parallel
        numbers = Units.of(config)
        self.units = numbers.all if units is None else units
        self.config = config
        self.compute = compute
        self.tensor_parallel = parallel
        self.z_loss_weight = z_loss_weight
        self.logit_scale = config.hidden_size**-0.5 if config.scale_logits else 1.0
        tied, has_head = config.share_embeddings_and_output_weights, numbers.head in self.units
        embeds = numbers.encoder_embedding in self.units or numbers.decoder_embedding in self.units
        if embeds or (tied and has_head):
            self.embedding = T5Embedding(config, compute, parallel, has_positions=embeds)
        self.encoder = T5Encoder(config, compute, self.units, parallel)
        self.decoder = T5Decoder(config, compute, self.units, parallel)
        self.lm_head: VocabParallelHead | None = None
        if has_head and not tied:
            init = matrix_init(config, config.hidden_size**-0.5, truncated=True)
            self.lm_head = VocabParallelHead(
                config.hidden_size, config.padded_vocab_size, init=init, tensor_parallel=parallel
            )

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers in the order in which they run."""
        return [*self.encoder.layers.values(), *self.decoder.layers.values()]

    def encode(self, input_ids: Tensor, *, mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """Ids `[b, s]` to the whole encoder output `[b, s, h]`; `mask` and `segment_ids` are `[b, s]`."""
        length = input_ids.shape[1]
        (hidden,) = self.embedding(input_ids)
        hidden = self.encoder(hidden, length, mask=mask, segment_ids=segment_ids)
        return self.tensor_parallel.join_sequence(hidden, length)

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
        """Ids `[b, t]` and the whole encoder output `[b, s, h]` to the whole decoder output `[b, t, h]`."""
        (hidden,) = self.embedding(input_ids)
        hidden = self.decoder(
            hidden,
            input_ids.shape[1],
            self.tensor_parallel.split_sequence(encoder_output),
            encoder_output.shape[1],
            mask=mask,
            segment_ids=segment_ids,
            encoder_mask=encoder_mask,
            encoder_segment_ids=encoder_segment_ids,
        )
        return self.tensor_parallel.join_sequence(hidden, input_ids.shape[1])

    def logits(self, decoder_output: Tensor) -> Tensor:
        """Whole decoder output `[b, t, h]` to `[b, t, V]`.

        The rows up to `--make-vocab-size-divisible-by` are ordinary logits, as in T5; those that let the vocabulary
        divide among ranks are left out.
        """
        logits = self._rank_logits(self.tensor_parallel.copy(decoder_output))
        return join_logits(logits, self.config.padded_vocab_size, self.tensor_parallel)

    def token_losses(self, decoder_output: Tensor, labels: Tensor) -> TokenLoss:
        """Losses of the decoder output `[b, t', h]` and labels `[b, t]`, without the logits ever being there whole."""
        return head_loss(
            self._head_input(decoder_output, labels.shape[1]),
            local_tensor(self._head_table()),
            labels,
            z_loss_weight=self.z_loss_weight,
            parallel=self.tensor_parallel,
            num_embeddings=self.config.padded_vocab_size,
            logit_scale=self.logit_scale,
            backend=self.compute.cross_entropy_backend,
        )

    def _head_input(self, decoder_output: Tensor, length: int) -> Tensor:
        """`[b, t', h]` to `[b, t, h]`, input of the column-parallel head."""
        hidden = self.tensor_parallel.enter(decoder_output)
        return hidden if hidden.shape[1] == length else hidden[:, :length]

    def _head_table(self) -> Tensor:
        """`[V, h]`, maybe a DTensor."""
        return (self.embedding.word_embeddings if self.lm_head is None else self.lm_head).weight

    def _rank_logits(self, hidden: Tensor) -> Tensor:
        """`[b, t, h]` to this rank's logits `[b, t, V']`."""
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        return vocab_parallel_logits(hidden, self._head_table(), self.config.padded_vocab_size, self.tensor_parallel)

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
        """Logits, or with labels the loss.

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
        length, decoder_length = encoder_input_ids.shape[1], decoder_input_ids.shape[1]
        encoder_output = self.encoder(encoder_hidden, length, mask=encoder_mask, segment_ids=encoder_segment_ids)
        decoder_output = self.decoder(
            decoder_hidden,
            decoder_length,
            encoder_output,
            length,
            mask=decoder_mask,
            segment_ids=decoder_segment_ids,
            encoder_mask=encoder_mask,
            encoder_segment_ids=encoder_segment_ids,
        )
        if labels is not None:
            return T5Output(None, self.token_losses(decoder_output, labels), encoder_output)
        logits = self._rank_logits(self._head_input(decoder_output, decoder_length))
        return T5Output(join_logits(logits, self.config.padded_vocab_size, self.tensor_parallel), None, encoder_output)
