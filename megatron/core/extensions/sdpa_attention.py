"""torch's scaled_dot_product_attention, with everything that is added to the scores in one matrix for all layers."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.core.extensions.attention import AttentionBackend, AttentionOptions, AttentionRequest, separate
from megatron.core.extensions.score_bias import ScoreBias

# cuDNN's backward gives NaN gradients for unscaled scores with a bias at some lengths (pytorch issue 196678).
CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float, causal: bool = False
) -> Tensor:
    """`query` `[b, n, q, d]`, `key`, `value` `[b, n, k, d]`, `bias` `[b or 1, n or 1, q or 1, k]` to `[b, n, q, d]`."""
    with sdpa_kernel(CUDA_BACKENDS) if query.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, causal, scale=scale)


def _causal_by_flag(bias: ScoreBias) -> bool:
    """Whether a flag says all, which leaves torch its flash attention; it counts positions from the first key."""
    return bias.is_empty and bias.causal and bias.query_length == bias.key_length


def _prepare(bias: ScoreBias, dtype: torch.dtype, device: torch.device) -> ScoreBias:
    return bias if _causal_by_flag(bias) else bias.as_matrix(dtype, device)


def _attend(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: ScoreBias, options: AttentionOptions
) -> Tensor:
    query, key, value = separate(query, key, value)
    causal = _causal_by_flag(bias)
    matrix = None if causal else bias.dense(query.dtype, query.device)
    inputs = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), matrix)
    with options.draws() if options.dropout else nullcontext():  # torch draws the mask
        return options.run(sdpa_attention, *inputs, options.scale, options.dropout, causal).transpose(1, 2)


def _refusal(request: AttentionRequest) -> str | None:
    # Masks that differ between ranks cannot be drawn inside of torch's attention when it is compiled.
    if request.compiled and request.dropout > 0.0 and request.divided:
        return "takes --attention-dropout under tensor parallelism with --compile only beside --sequence-parallel"
    return None


BACKEND = AttentionBackend(
    name="sdpa",
    attend=_attend,
    devices=("cpu", "cuda", "meta"),
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    bias="matrix",
    bias_gradient=True,
    segments="matrix",
    masks=True,
    dropout=True,
    deterministic=False,
    compiles=True,
    prepare=_prepare,
    refusal=_refusal,
)
