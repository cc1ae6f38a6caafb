"""The seam of attention: what a backend declares, and which one computes.

Each backend is one file with a `BACKEND`, imported when it is first asked for; docs/backends.md lists them.

Shapes: b batch, n heads, q queries, k keys, s either, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.core.errors import UserError
from megatron.core.extensions.packages import installed
from megatron.core.extensions.score_bias import ScoreBias

MODULES = {
    "cpu": "cpu_attention",
    "sdpa": "sdpa_attention",
    "flex": "flex_attention",
    "triton": "triton_attention",
    "transformer_engine": "transformer_engine",
    "unfused": "unfused_attention",
}


class AttentionRequest(NamedTuple):
    """What an attention is to compute.

    Attributes:
        device: Of the activations.
        dtype: Of the activations.
        head_dim: d.
        has_diagonals: Whether the scores get a position bias.
        has_segments: Whether segments or padding hide keys.
        has_mask: Whether an additive matrix hides keys, as in generation.
        causal: Whether the keys after a query are hidden.
        dropout: Of the probabilities.
        training: Whether gradients are needed.
        compiled: Whether it is part of what torch.compile compiles.
        divided: Whether tensor-parallel ranks divide the heads and are to drop different places.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    has_diagonals: bool = False
    has_segments: bool = False
    has_mask: bool = False
    causal: bool = False
    dropout: float = 0.0
    training: bool = True
    compiled: bool = False
    divided: bool = False


class AttentionOptions(NamedTuple):
    """How a call of an attention computes.

    Attributes:
        scale: Multiplies the scores.
        dropout: Share of the probabilities that is dropped.
        recompute: Compute again in the backward pass what would have to be kept for it.
        stream: Tells ranks apart that draw the same seed and are to drop different places.
        drop: Dropout `(x, p, training)` of heads that tensor-parallel ranks divide.
        draws: Context in which torch's generators draw what such ranks are to draw.
    """

    scale: float
    dropout: float
    recompute: bool
    stream: int
    drop: Callable[[Tensor, float, bool], Tensor]
    draws: Callable[[], AbstractContextManager[Any]]

    def run(self, attention: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`attention(*inputs)`, computed again in the backward pass if asked for."""
        if not (self.recompute and torch.is_grad_enabled()):
            return attention(*inputs)
        result: Tensor = checkpoint(attention, *inputs, use_reentrant=False, preserve_rng_state=self.dropout > 0.0)
        return result


def _as_it_is(bias: ScoreBias, dtype: torch.dtype, device: torch.device) -> ScoreBias:
    return bias


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nothing_more(request: AttentionRequest) -> str | None:
    return None


@dataclass(frozen=True)
class AttentionBackend:
    """A way to compute attention, and what it can compute.

    Attributes:
        name: Value of `--attention-backend`.
        attend: `(query, key, value, bias, options)` to `[b, q, n, d]`. Query is `[b, q, n, d]`, key and value are
            `[b, k, n, d]`, of any strides; or of a fused projection, `query` is `[b, s, n, 3, d]` or `key`
            `[b, k, n, 2, d]`, and what they hold is None (`separate`).
        devices: Types of devices.
        dtypes: Of activations.
        bias: Whether the position bias stays a vector or becomes a matrix for each head.
        bias_gradient: Whether the position bias gets a gradient.
        segments: Whether segments hide keys by their ids, or by a matrix; None: not at all.
        masks: Whether it takes an additive matrix that hides keys.
        dropout: Whether it drops probabilities.
        deterministic: Whether two runs on GPUs give the same bits.
        compiles: Whether torch.compile takes it without a break.
        head_dims: Smallest and largest d.
        package: Import name of the package it needs, if any.
        prepare: `(bias, dtype, device)` to what `attend` is given, once for all layers of a stack.
        refusal: Why it cannot compute a request, if anything speaks against it beyond the above.
    """

    name: str
    attend: Callable[[Tensor, Tensor | None, Tensor | None, ScoreBias, AttentionOptions], Tensor]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    bias: Literal["vector", "matrix"]
    bias_gradient: bool
    segments: Literal["ids", "matrix"] | None
    masks: bool
    dropout: bool
    deterministic: bool
    compiles: bool
    head_dims: tuple[int, int] = (1, 1 << 16)
    package: str | None = None
    prepare: Callable[[ScoreBias, torch.dtype, torch.device], ScoreBias] = _as_it_is
    refusal: Callable[[AttentionRequest], str | None] = _nothing_more

    def refuses(self, request: AttentionRequest) -> str | None:
        """Why it cannot compute this, or None when it can."""
        if self.package is not None and not installed(self.package):
            return f"needs the package {self.package}, which is not installed"
        smallest, largest = self.head_dims
        devices, dtypes = " and ".join(self.devices), ", ".join(map(_name, self.dtypes))
        reasons = (
            (
                request.device.type not in self.devices,
                f"computes on {devices}, not {request.device}",
            ),
            (
                request.dtype not in self.dtypes,
                f"computes in {dtypes}, not {_name(request.dtype)}",
            ),
            (
                not smallest <= request.head_dim <= largest,
                f"takes --kv-channels from {smallest} to {largest}, not {request.head_dim}",
            ),
            (request.dropout > 0.0 and not self.dropout, "has no --attention-dropout"),
            (
                request.has_diagonals and request.training and not self.bias_gradient,
                "gives the position bias no gradient",
            ),
            (request.has_segments and self.segments is None, "keeps no segments apart and hides no padding"),
            (request.has_mask and not self.masks, "takes no matrix of masks, which generation needs"),
            (request.compiled and not self.compiles, "does not go with --compile"),
        )
        return next((reason for applies, reason in reasons if applies), None) or self.refusal(request)


@cache
def attention_backend(name: str) -> AttentionBackend:
    """The backend of this name."""
    backend: AttentionBackend = import_module(f"megatron.core.extensions.{MODULES[name]}").BACKEND
    return backend


def _preferences(request: AttentionRequest) -> tuple[str, ...]:
    """What `auto` tries in turn; the last can compute everything."""
    if request.device.type == "cpu":
        # torch's kernel for CPUs gains less than its backward pass loses.
        return ("cpu", "unfused") if request.training else ("cpu", "sdpa")
    if request.has_diagonals or request.has_segments or request.has_mask:
        return ("triton", "sdpa")
    return ("sdpa",)  # torch's flash attention


def choose_attention(given: str, request: AttentionRequest) -> AttentionBackend:
    """The backend that `--attention-backend` means for a request.

    Raises:
        UserError: The one that was named cannot compute it.
    """
    if given != "auto":
        backend = attention_backend(given)
        if reason := backend.refuses(request):
            raise UserError(f"--attention-backend {given} {reason}; use --attention-backend auto")
        return backend
    *better, last = _preferences(request)
    for name in better:
        backend = attention_backend(name)
        if backend.refuses(request) is None:
            return backend
    return attention_backend(last)


def separate(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[b, s, n, d]` of the projections that backends are given."""
    if key is None:
        query, key, value = query.unbind(-2)
    elif value is None:
        key, value = key.unbind(-2)
    assert value is not None
    return query, key, value
