"""Text generation."""

from __future__ import annotations

import torch

from megatron.core.models.T5.t5_model import T5Model


@torch.inference_mode()
def greedy_decode(
    model: T5Model, encoder_input_ids: torch.Tensor, max_length: int, start_id: int, eos_id: int
) -> torch.Tensor:
    """The likeliest token after another, the encoder run once and the decoder on the whole prefix each time.

    Args:
        model: The model, in evaluation mode.
        encoder_input_ids: Inputs without padding, `[b, s]`.
        max_length: Most tokens to generate.
        start_id: First decoder input.
        eos_id: A row ends with this token.

    Returns:
        Generated ids `[b, t]`, t <= max_length; after a row's end they are `eos_id`.
    """
    encoder_output = model.encode(encoder_input_ids)
    batch = encoder_input_ids.shape[0]
    ids = torch.full((batch, 1), start_id, dtype=torch.long, device=encoder_input_ids.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    for _ in range(max_length):
        hidden = model.decode(ids, encoder_output)
        following = model.logits(hidden[:, -1:]).argmax(-1)  # [b, 1]
        following[ended] = eos_id
        ids = torch.cat([ids, following], dim=1)
        ended |= following[:, 0] == eos_id
        if ended.all():
            break
    return ids[:, 1:]
