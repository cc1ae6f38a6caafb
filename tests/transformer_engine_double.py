"""A stand-in for the package transformer_engine: its names, signatures and conditions, and its arithmetic in torch.

What it has is what our adapter uses, as release 2.20 has it; a test compares the two. FP8 is rounding to e4m3 or e5m2
and back, with one scale a tensor whatever the recipe. `CALLS` says what was computed how.
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CALLS: list[tuple[str, Any]] = []
_REGIONS: list[Any] = []  # recipes of the open ones, None where FP8 is off
_SEEN: set[int] = set()  # linear layers of the outermost open region


# transformer_engine.common.recipe


class Format(enum.Enum):
    E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    reduce_amax: bool = True


@dataclass
class Float8CurrentScaling:
    fp8_format: Format = Format.HYBRID


@dataclass
class MXFP8BlockScaling:
    fp8_format: Format = Format.E4M3


@dataclass
class Float8BlockScaling:
    fp8_format: Format = Format.E4M3


# transformer_engine.pytorch


class autocast:  # noqa: N801
    def __init__(self, enabled: bool = True, recipe: Any = None, amax_reduction_group: Any = None) -> None:
        self._recipe = recipe if enabled else None
        self._group = amax_reduction_group

    def __enter__(self) -> autocast:
        if not _REGIONS:
            _SEEN.clear()
        _REGIONS.append(self._recipe)
        return self

    def __exit__(self, *_: Any) -> None:
        _REGIONS.pop()
        if isinstance(self._recipe, DelayedScaling) and not _REGIONS and torch.is_grad_enabled():
            CALLS.append(("update", self._group))


UNAVAILABLE: set[str] = set()


def is_fp8_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    return (True, "") if return_reason else True


def is_mxfp8_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    reason = "Device compute capability 10.0 or higher required for MXFP8 execution." if "mxfp8" in UNAVAILABLE else ""
    return (not reason, reason) if return_reason else not reason


def is_fp8_block_scaling_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    return (True, "") if return_reason else True


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self._workspace: Tensor | None = None

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        recipe = _REGIONS[-1] if _REGIONS else None
        weight = self.weight
        assert inp.dtype == weight.dtype and inp.shape[-1] == weight.shape[1]
        CALLS.append(("linear", (tuple(inp.shape), recipe, is_first_microbatch)))
        if recipe is None:
            return F.linear(inp, weight)
        for tensor in (inp, weight):
            assert tensor.shape[:-1].numel() % 8 == 0 and tensor.shape[-1] % 16 == 0, tensor.shape
        if isinstance(recipe, DelayedScaling):
            assert id(self) not in _SEEN, "a layer may run once in a region"
            _SEEN.add(id(self))
        forward, backward = recipe.fp8_format.value
        rounded = self._workspace if is_first_microbatch is False else _rounded(weight.detach(), forward)
        assert rounded is not None
        if is_first_microbatch:
            self._workspace = rounded
        result: Tensor = _Fp8Linear.apply(inp, weight, rounded, forward, backward)
        return result


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.finfo(dtype).max / x.abs().max().float().clamp(min=1e-30)
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rounded: Tensor, forward: torch.dtype, backward: torch.dtype
    ) -> Tensor:
        x = _rounded(x, forward)
        ctx.save_for_backward(x, rounded)
        ctx.dtype = backward
        return F.linear(x, rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = _rounded(gradient, ctx.dtype)
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2), None, None, None


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert qkv_format == "bshd" and attn_mask_type in ("causal", "no_mask")
        self.shape = num_attention_heads, kv_channels
        self.causal, self.kind = attn_mask_type == "causal", attention_type
        self.scale, self.dropout = softmax_scale, attention_dropout

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
    ) -> Tensor:
        batch, queries, *shape = query_layer.shape
        keys = key_layer.shape[1]
        assert tuple(shape) == self.shape and (queries == keys or self.kind == "cross")
        assert not _REGIONS or _REGIONS[-1] is None
        assert (core_attention_bias is None) == (core_attention_bias_type == "no_bias")
        CALLS.append(("attention", (self.kind, self.causal, core_attention_bias is not None)))
        bias = core_attention_bias
        if bias is not None:
            assert bias.shape[0] in (1, batch) and bias.shape[1] in (1, shape[0])
            assert bias.shape[2:] == (queries, keys) and bias.dtype == query_layer.dtype and bias.is_contiguous()
        if self.causal:
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
            bias = torch.zeros(queries, keys, dtype=query_layer.dtype) if bias is None else bias
            bias = bias.masked_fill(hidden, -torch.inf)
        heads = (each.transpose(1, 2) for each in (query_layer, key_layer, value_layer))
        context = F.scaled_dot_product_attention(*heads, bias, self.dropout, scale=self.scale)
        return context.transpose(1, 2).flatten(2)


# transformer_engine.pytorch.constants and the compiled module

TE_DType = {torch.float32: 4, torch.float16: 5, torch.bfloat16: 6}


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int, zero: bool
) -> tuple[Tensor, None, Tensor]:
    assert ln_out is None and quantizer is None and otype == TE_DType[input.dtype] and not zero
    assert input.dim() == 2 and input.is_contiguous() and weight.dtype == input.dtype
    CALLS.append(("rms norm", tuple(input.shape)))
    x = input.float()
    scales = (x.square().mean(-1) + eps).rsqrt()
    return (x * scales[:, None] * weight.float()).to(input.dtype), None, scales


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero: bool
) -> tuple[Tensor, Tensor]:
    assert dz.dim() == 2 and dz.is_contiguous() and dz.dtype == x.dtype
    normed = x.float() * rsigma[:, None]
    scaled = dz.float() * gamma.float()
    gradient = rsigma[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return gradient.to(x.dtype), (dz.float() * normed).sum(0).to(gamma.dtype)


def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert ln_out is None and quantizer is None and otype == TE_DType[input.dtype] and not zero
    assert input.dim() == 2 and input.is_contiguous() and weight.dtype == bias.dtype == input.dtype
    x = input.float()
    means = x.mean(-1)
    scales = (x.var(-1, correction=0) + eps).rsqrt()
    normed = (x - means[:, None]) * scales[:, None]
    return (normed * weight.float() + bias.float()).to(input.dtype), means, scales


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert dz.dim() == x.dim() == 2 and dz.is_contiguous() and x.is_contiguous() and dz.dtype == x.dtype
    normed = (x.float() - mu[:, None]) * rsigma[:, None]
    scaled = dz.float() * gamma.float()
    means = scaled.mean(-1, keepdim=True) + normed * (scaled * normed).mean(-1, keepdim=True)
    gradients = (dz.float() * normed).sum(0), dz.float().sum(0)
    return (rsigma[:, None] * (scaled - means)).to(x.dtype), *(each.to(gamma.dtype) for each in gradients)


# In place of the package

MODULES = {
    "transformer_engine": (),
    "transformer_engine.common": (),
    "transformer_engine.common.recipe": (
        "Format", "DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling", "Float8BlockScaling",
    ),
    "transformer_engine.pytorch": (
        "autocast", "Linear", "DotProductAttention",
        "is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available",
    ),
    "transformer_engine.pytorch.constants": ("TE_DType",),
    "transformer_engine_torch": ("rmsnorm_fwd", "rmsnorm_bwd", "layernorm_fwd", "layernorm_bwd"),
}  # fmt: skip


def forget() -> None:
    """Clear what the adapter and its neighbours remember of the package."""
    from megatron.core.extensions import attention, packages, transformer_engine

    for function in (
        packages.installed, attention.attention_backend, transformer_engine.problem,
        transformer_engine._norm_kernels, transformer_engine._core_attention,
    ):  # fmt: skip
        function.cache_clear()
    CALLS.clear()


@contextmanager
def on_cpu() -> Iterator[list[tuple[str, Any]]]:
    """Inside, the package seems to be there and to compute on CPUs, FP8 included; gives `CALLS`."""
    fp8 = importlib.import_module("megatron.core.extensions.fp8")
    adapter = importlib.import_module("megatron.core.extensions.transformer_engine")
    with pytest.MonkeyPatch.context() as patch:
        for name, members in MODULES.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            for member in members:
                setattr(module, member, globals()[member])
            patch.setitem(sys.modules, name, module)
        patch.setattr(adapter, "DEVICES", ("cpu",))
        patch.setattr(adapter, "BACKEND", replace(adapter.BACKEND, devices=("cpu",)))
        patch.setattr(fp8, "_check_device", lambda *_: None)
        forget()
        yield CALLS
    forget()
