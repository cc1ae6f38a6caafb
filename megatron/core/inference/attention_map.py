"""Picture of the cross-attention: which source tokens the model looked at when it wrote each of its own.

Shapes: L decoder layers, n heads, s source tokens, t generated tokens, h hidden, d channels of a head.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron.core.errors import UserError
from megatron.core.extensions.score_bias import ScoreBias
from megatron.core.inference.text_model import TextModel
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.tokenizers import Tokenizer
from megatron.core.transformer.attention import CrossAttention

TEMPLATE = Path(__file__).with_name("attention_map.html")
LEVELS = 2**16 - 1  # what a probability of 1 is stored as
MAX_PROBABILITIES = 12 * 2**20  # of a page, which is then 32 MiB
UNKNOWN = "\ufffd"  # what tokenizers decode bytes to that are no character
CONTEXT = 8  # tokens before a token that its text is told by


class PageToken(NamedTuple):
    """A token as the page shows it.

    Attributes:
        text: Its part of the text, with the space before a word.
        kind: Class of its look.
    """

    text: str
    kind: Literal["plain", "sentinel", "special"]


@torch.inference_mode()
def cross_attention(
    model: T5Model, encoder_input_ids: Tensor, decoder_input_ids: Tensor, encoder_mask: Tensor | None = None
) -> Tensor:
    """Attention probabilities of every decoder layer and head, by teacher forcing.

    Args:
        model: The model, in evaluation mode.
        encoder_input_ids: `[1, s]`.
        decoder_input_ids: `[1, t]`: the generated ids shifted right by one, so that row i is of the step that wrote i.
        encoder_mask: bool `[1, s]`, True for real tokens; None when there is no padding.

    Returns:
        fp32 `[L, n, t, s]`; the last dimension sums to 1.

    Raises:
        UserError: The model is divided among tensor-parallel ranks.
    """
    if model.tensor_parallel.size > 1:
        raise UserError(
            f"--tensor-model-parallel-size is {model.tensor_parallel.size}, which leaves each rank some of the heads; "
            "make attention maps with one process"
        )
    layers: list[Tensor] = []

    def keep(attention: CrossAttention, inputs: tuple[Tensor, Tensor, ScoreBias]) -> None:
        hidden, encoder_output, score_bias = inputs
        bias = score_bias.dense(torch.float32, hidden.device)
        key, _ = attention.keys_values(encoder_output)
        query = attention.q(hidden).view(*hidden.shape[:2], *key.shape[2:])
        scores = torch.einsum("btnd,bsnd->bnts", query.float() * attention.scale, key.float())
        layers.append((scores if bias is None else scores + bias).softmax(-1))

    attentions = [module for module in model.decoder.modules() if isinstance(module, CrossAttention)]
    hooks = [attention.register_forward_pre_hook(keep) for attention in attentions]
    try:
        encoder_output = model.encode(encoder_input_ids, mask=encoder_mask)
        model.decode(decoder_input_ids, encoder_output, encoder_mask=encoder_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(layers)


def attention_map_page(model: TextModel, source: Sequence[int], generated: Sequence[int]) -> str:
    """HTML page that shows a generation's cross-attention; it needs no network and no other file.

    Args:
        model: What generated.
        source: Ids that the encoder read, without padding (`TextModel.tokenize`).
        generated: Ids of its answer, at least one, without the decoder's start and padding.

    Raises:
        UserError: The model is divided among tensor-parallel ranks, or the texts are too long for a page.
    """
    decoder_input = [model.special.decoder_start_id, *generated[:-1]]
    inputs = (torch.tensor([ids], device=model.device) for ids in (source, decoder_input))
    probabilities = cross_attention(model.model, *inputs).cpu().numpy()
    return render_page(page_tokens(model.tokenizer, source), page_tokens(model.tokenizer, generated), probabilities)


def page_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[PageToken]:
    """Each id with its part of the text that all of them make.

    The last byte of a character has the character, those before it have U+FFFD.
    """
    return [_page_token(tokenizer, ids[max(i - CONTEXT, 0) : i], token) for i, token in enumerate(ids)]


def _page_token(tokenizer: Tokenizer, before: Sequence[int], token: int) -> PageToken:
    """`token`, whose text is what it adds to that of the ids before it."""
    if token == tokenizer.eos_id:
        return PageToken("</s>", "special")
    if token == tokenizer.pad_id:
        return PageToken("<pad>", "special")
    if token in tokenizer.sentinel_ids:
        return PageToken(tokenizer.detokenize([token]), "sentinel")
    prefix = tokenizer.detokenize(before).rstrip(UNKNOWN)
    text = tokenizer.detokenize([*before, token])
    text = text[len(prefix) :] if text.startswith(prefix) else tokenizer.detokenize([token])
    text = text.lstrip(UNKNOWN) or text[:1]
    return PageToken(text, "special" if token == tokenizer.unk_id or token >= tokenizer.vocab_size else "plain")


def render_page(source: Sequence[PageToken], generated: Sequence[PageToken], probabilities: np.ndarray) -> str:
    """The page of `probabilities` fp32 `[L, n, t, s]`; heads are averaged when all of them are too many for a page.

    Raises:
        UserError: They are too many even so.
    """
    layers, heads = probabilities.shape[:2]
    note = ""
    if probabilities.size > MAX_PROBABILITIES:
        probabilities = probabilities.mean(1, keepdims=True)
        note = (
            f"Heads are shown as their mean: {layers} layers of {heads} heads with these texts are more than the "
            f"{MAX_PROBABILITIES:,} probabilities that a page holds. Shorter texts show every head."
        )
    if probabilities.size > MAX_PROBABILITIES:
        raise UserError(
            f"--attention-map: {len(source):,} source and {len(generated):,} generated tokens in {layers} layers are "
            f"more than the {MAX_PROBABILITIES:,} probabilities that a page holds; shorten the prompt"
        )
    data = {
        "source": source,
        "generated": generated,
        "layers": layers,
        "heads": heads,
        "stored_heads": probabilities.shape[1],
        "note": note,
        "probabilities": base64.b64encode(np.rint(probabilities * LEVELS).astype("<u2").tobytes()).decode(),
    }
    # A "<" in the text must not end the script element that holds it.
    script = json.dumps(data).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", script)
