"""A stage of a pipeline: a run of the model's units that takes what the stage before returned.

Shapes: b batch, s encoder length, t decoder length, h hidden; s' and t' a tensor-parallel rank's part of the padded
sequences under sequence parallelism, else s and t.

Between encoder units a stage passes `(hidden,)`, `[b, s', h]`; from the encoder norm on `(encoder_output,)`,
`[b, s', h]`; between decoder units `(hidden, encoder_output)` as long as a later decoder layer reads it. Hidden states
have the dtype of the residual stream, the encoder output that of matrix products (`transformer.precision`). Every stage
is given the whole batch: tokens are read where they are needed and never sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_units import Units
from megatron.core.transformer.precision import compute_dtype, residual_dtype


class T5Stage(T5Model):
    """`T5Model` with the units of one stage, and the forward pass that a pipeline calls."""

    def forward(  # type: ignore[override]  # the signature of a stage, not of the whole model
        self,
        *received: Tensor,
        encoder_input_ids: Tensor,
        decoder_input_ids: Tensor,
        labels: Tensor,
        encoder_mask: Tensor | None = None,
        encoder_segment_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What the next stage needs, or from the last stage the terms of `TokenLoss`.

        Args:
            received: What the stage before returned; nothing for the first.
            encoder_input_ids: `[b, s]`, any integer dtype.
            decoder_input_ids: `[b, t]`.
            labels: `[b, t]`; `IGNORED_LABEL` leaves a token out.
            encoder_mask: bool `[b, s]`, True for real tokens; None when there is no padding.
            encoder_segment_ids: `[b, s]`, examples of packed rows from 1, 0 for padding.
            decoder_segment_ids: `[b, t]`, likewise.
        """
        units, numbers = self.units, Units.of(self.config)
        encoder_length, decoder_length = encoder_input_ids.shape[1], decoder_input_ids.shape[1]
        encoder_output: Tensor | None
        encoder_hidden, decoder_hidden = self._embed(encoder_input_ids, decoder_input_ids)
        if units[0] <= numbers.encoder_norm:
            hidden = received[0] if encoder_hidden is None else encoder_hidden
            encoder_output = self.encoder(hidden, encoder_length, mask=encoder_mask, segment_ids=encoder_segment_ids)
            if units[-1] <= numbers.encoder_norm:
                return (encoder_output,)
        elif units[0] == numbers.decoder_embedding:
            encoder_output = received[0]
        else:
            decoder_hidden = received[0]
            encoder_output = received[1] if len(received) > 1 else None
        assert decoder_hidden is not None
        if units[0] <= numbers.decoder_norm:
            decoder_hidden = self.decoder(
                decoder_hidden, decoder_length, encoder_output, encoder_length,
                segment_ids=decoder_segment_ids, encoder_mask=encoder_mask, encoder_segment_ids=encoder_segment_ids,
            )  # fmt: skip
        if units[-1] < numbers.decoder_layers[-1]:
            assert encoder_output is not None
            # Returning a received tensor itself breaks the split backward of the zero-bubble schedules under FSDP2.
            return decoder_hidden, encoder_output.clone()
        if units[-1] < numbers.head:
            return (decoder_hidden,)
        return tuple(self.token_losses(decoder_hidden, labels))  # torch's stages take plain tuples only

    def messages(
        self, *, encoder_input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor, **masks: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Shapes and dtypes of what `forward` takes and returns for a microbatch, as tensors on the meta device."""
        received = self._message(self.units[0], encoder_input_ids, decoder_input_ids)
        if self.units[-1] < Units.of(self.config).head:
            return received, self._message(self.units[-1] + 1, encoder_input_ids, decoder_input_ids)
        losses = torch.empty(labels.shape, dtype=torch.float32, device="meta")  # [b, t]
        return received, (losses, losses, torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True))

    def _message(self, unit: int, encoder_input_ids: Tensor, decoder_input_ids: Tensor) -> tuple[Tensor, ...]:
        """What is sent to the stage that begins with `unit`."""
        numbers, parallel = Units.of(self.config), self.tensor_parallel
        parts = parallel.size if parallel.sequence_parallel else 1

        def hidden(ids: Tensor, dtype: torch.dtype | None) -> Tensor:
            shape = (ids.shape[0], parallel.padded_length(ids.shape[1]) // parts, self.config.hidden_size)  # [b, s', h]
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        residual, products = residual_dtype(self.compute), compute_dtype(self.compute)
        if unit == numbers.encoder_embedding:
            return ()
        if unit <= numbers.encoder_norm:
            return (hidden(encoder_input_ids, residual),)
        encoder_output = hidden(encoder_input_ids, products)
        if unit == numbers.decoder_embedding:
            return (encoder_output,)
        if unit < numbers.decoder_norm:
            return hidden(decoder_input_ids, residual), encoder_output
        return (hidden(decoder_input_ids, products if unit == numbers.head else residual),)

    def _embed(self, encoder_input_ids: Tensor, decoder_input_ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Embedded tokens of the encoder and of the decoder, None for what this stage does not embed."""
        numbers = Units.of(self.config)
        for_encoder = numbers.encoder_embedding in self.units
        for_decoder = numbers.decoder_embedding in self.units
        if not for_encoder and not for_decoder:
            return None, None
        ids = [encoder_input_ids] * for_encoder + [decoder_input_ids] * for_decoder
        embedded = self.embedding(*ids)
        return embedded[0] if for_encoder else None, embedded[-1] if for_decoder else None
