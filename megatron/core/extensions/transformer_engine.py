"""NVIDIA's Transformer Engine: its linear layers, norms and attention, and its FP8 recipes.

Parameters stay ours: each call hands the layer's weight to a module or kernel that owns none, so that names, fused
layouts, sharding, optimizers and checkpoints are the same with and without the package, and collectives stay ours, too.

Written for release 2.20; `tests/core/extensions/test_transformer_engine.py` compares what is called with the package.

Shapes: b batch, n heads, q queries, k keys, d channels of a head; i inputs and o outputs of a linear layer, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module, metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.config import ComputeConfig, ParallelConfig
from megatron.core.errors import UserError
from megatron.core.extensions.attention import AttentionBackend, AttentionOptions, AttentionRequest, separate
from megatron.core.extensions.packages import installed
from megatron.core.extensions.score_bias import ScoreBias

PACKAGE = "transformer_engine"
FLAG = "--transformer-impl transformer_engine"
LOCAL = "use --transformer-impl local"
DEVICES = ("cuda",)
# Rows of a product's input are padded with zeros to a multiple of this: FP8 products contract over them for the
# gradient of the weight, and MXFP8 has one scale for 32 of them.
ROW_MULTIPLE = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}


# The package


@cache
def problem() -> str | None:
    """Why the package does not load, or None when it does.

    `pip install transformer-engine` alone brings neither its core library nor its extension for torch.
    """
    if not installed(PACKAGE):
        return f"needs the package {PACKAGE}, which is not installed"
    try:
        package = import_module("transformer_engine.pytorch")
    except Exception as error:  # whatever a broken installation raises: RuntimeError, OSError, AssertionError, ...
        parts = {
            "its core library (transformer-engine-cu12 or transformer-engine-cu13)": ("cu12", "cu13"),
            "its extension for torch (transformer-engine-torch)": ("torch",),
        }
        missing = [part for part, names in parts.items() if not any(map(_has_distribution, names))]
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"without {' and '.join(missing)}" if missing else f"and cannot be imported: {lines[0]}"
        return f"needs the package {PACKAGE}, which is installed {reason}"
    return None if hasattr(package, "autocast") else f"needs a newer release of the package {PACKAGE}, such as 2.20"


def _has_distribution(suffix: str) -> bool:
    try:
        metadata.version(f"transformer-engine-{suffix}")
    except metadata.PackageNotFoundError:
        return False
    return True


def check_package(compute: ComputeConfig) -> None:
    """Raise `UserError` when `--transformer-impl transformer_engine` is given and the package does not load."""
    if compute.transformer_impl == "transformer_engine" and (reason := problem()) is not None:
        raise UserError(f"{FLAG} {reason}; complete the installation (docs/how-to/fp8.md) or {LOCAL}")


def check(compute: ComputeConfig, parallel: ParallelConfig, device: torch.device) -> None:
    """Raise `UserError` when `--transformer-impl transformer_engine` cannot compute this run; nothing for others."""
    if compute.transformer_impl != "transformer_engine":
        return
    if device.type not in DEVICES:
        raise UserError(f"{FLAG} computes on {' and '.join(DEVICES)}, and this run is on {device.type}; {LOCAL}")
    check_package(compute)
    if compute.fp8_format is not None:
        _check_recipe(compute.fp8_recipe)
    schedule, delayed = parallel.pipeline_schedule, compute.fp8_recipe == "delayed" and compute.fp8_format is not None
    refusals = (
        (compute.compile, "--compile", "its layers are kernels already"),
        (compute.gradient_accumulation_fusion, "--gradient-accumulation-fusion", "that is for the local layers"),
        (schedule in ("interleaved-zb", "zbv", "dualpipev"), f"--pipeline-schedule {schedule}",
         "its layers compute weight gradients at once and leave nothing to put off"),
        (not compute.fp8_wgrad, "--no-fp8-wgrad", "its recipes cannot leave weight gradients out"),
        (delayed and compute.recompute_granularity == "full", "--recompute-granularity full",
         "--fp8-recipe delayed would scale what it recomputes differently; --fp8-recipe tensorwise would not"),
        (delayed and compute.cuda_graphs, "--cuda-graphs", "--fp8-recipe delayed changes its scales after each pass"),
    )  # fmt: skip
    for applies, flag, why in refusals:
        if applies:
            raise UserError(f"{flag} does not go with {FLAG} ({why}); remove one of them")


def _check_recipe(name: str) -> None:
    """Raise `UserError` for a recipe that the package does not have on this GPU, with this CUDA."""
    package: Any = import_module("transformer_engine.pytorch")
    kinds = {"mxfp8": package.is_mxfp8_available, "blockwise": package.is_fp8_block_scaling_available}
    available, reason = kinds.get(name, package.is_fp8_available)(return_reason=True)
    if not available:
        raise UserError(f"--fp8-recipe {name} is not to be had here: {reason.rstrip('.')}; choose another or remove it")


def check_norm(device: torch.device, compiled: bool) -> None:
    """Raise `UserError` when `--norm-backend transformer_engine` cannot compute on this device or be compiled."""
    flag, otherwise = "--norm-backend transformer_engine", "use --norm-backend auto"
    if device.type not in DEVICES:
        raise UserError(f"{flag} needs a GPU, and this run is on {device.type}; {otherwise}")
    if (reason := problem()) is not None:
        raise UserError(f"{flag} {reason}; install it or {otherwise}")
    if compiled:
        raise UserError(f"{flag} does not go with --compile, which cannot trace its kernels; {otherwise}")


# FP8


class Recipe:
    """How a run rounds to FP8, by the `fp8_*` flags.

    Args:
        compute: The flags; `fp8_format` is set.
        group: Ranks over which `delayed` takes the largest numbers: those that compute the same layers.
    """

    def __init__(self, compute: ComputeConfig, group: ProcessGroup | None = None) -> None:
        assert compute.fp8_format is not None
        recipes: Any = import_module("transformer_engine.common.recipe")
        number_format = {"e4m3": recipes.Format.E4M3, "hybrid": recipes.Format.HYBRID}[compute.fp8_format]
        self.name = compute.fp8_recipe
        if compute.fp8_recipe == "delayed":
            self._recipe = recipes.DelayedScaling(
                margin=compute.fp8_margin,
                fp8_format=number_format,
                amax_history_len=compute.fp8_amax_history_len,
                amax_compute_algo=compute.fp8_amax_compute_algo,
                # Without a group it would be all ranks, though pipeline ranks hold other layers.
                reduce_amax=group is not None and group.size() > 1,
            )
        else:
            kinds = {"tensorwise": "Float8CurrentScaling", "mxfp8": "MXFP8BlockScaling"}
            kind = getattr(recipes, kinds.get(compute.fp8_recipe, "Float8BlockScaling"))
            self._recipe = kind(fp8_format=number_format)
        self._group = group

    @property
    def remembers(self) -> bool:
        """Whether scales depend on earlier steps. They are then brought up to date where a region ends."""
        return self.name == "delayed"

    def region(self, enabled: bool = True) -> AbstractContextManager[Any]:
        """Inside, the package's layers compute in FP8, or not."""
        package: Any = import_module("transformer_engine.pytorch")
        context: AbstractContextManager[Any] = package.autocast(
            enabled=enabled, recipe=self._recipe, amax_reduction_group=self._group
        )
        return context


class PassRegion:
    """Makes each forward pass of a module a region, as a recipe that remembers needs it.

    Others have a region around each product instead, which recomputed layers then enter again.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._open: list[AbstractContextManager[Any]] = []

    def attach(self, module: torch.nn.Module) -> None:
        """Open and close a region around the forward passes of `module`."""
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: torch.nn.Module, inputs: Any) -> None:
        region = self._recipe.region()
        region.__enter__()
        self._open.append(region)

    def _leave(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        self._open.pop().__exit__(None, None, None)


# Linear layers


class LinearProduct:
    """The product of one linear layer, `x W^T (+ b)`, as `Linear.product`.

    Args:
        recipe: The run's; None without FP8.
        fp8: Whether this layer takes part in it.
    """

    def __init__(self, recipe: Recipe | None = None, fp8: bool = False) -> None:
        self.fp8 = fp8
        self._module: torch.nn.Module | None = None  # no submodule of the layer, which owns the weight
        self._region: Callable[[], AbstractContextManager[Any]] = nullcontext
        if recipe is not None and fp8 != recipe.remembers:  # inside of its pass region only the others need one
            self._region = lambda: recipe.region(enabled=fp8)
        self._multiple = ROW_MULTIPLE[recipe.name] if recipe is not None and fp8 else 1
        self._is_first: bool | None = None

    def begin_step(self) -> None:
        """Say that weights have changed. From then on, FP8 weights are kept from one microbatch to the next.

        They take two bytes a weight. Products without gradients neither use nor renew them.
        """
        self._is_first = True

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[..., i]`, `weight` `[o, i]` of any floating dtype, `bias` `[o]` in the dtype of `x`: `[..., o]`."""
        rows = x.flatten(0, -2)
        padding = -len(rows) % self._multiple
        if padding:
            rows = F.pad(rows, (0, 0, 0, padding))
        is_first = self._is_first if torch.is_grad_enabled() else None
        if is_first:
            self._is_first = False
        module, weights = self._built(weight.shape, x.dtype), {"weight": weight.to(x.dtype)}
        with self._region():
            product: Tensor = torch.func.functional_call(module, weights, (rows,), {"is_first_microbatch": is_first})
        if padding:
            product = product[:-padding]
        product = product.unflatten(0, x.shape[:-1])
        return product if bias is None else product + bias

    def _built(self, shape: torch.Size, dtype: torch.dtype) -> torch.nn.Module:
        """The package's module for weights of this shape, as a rank holds and FSDP2 gathers them."""
        if self._module is None:
            package: Any = import_module("transformer_engine.pytorch")
            # On the meta device: its own weight is never used.
            self._module = package.Linear(shape[1], shape[0], bias=False, params_dtype=dtype, device="meta")
        assert self._module is not None
        return self._module


# Norms. The package's modules look their weight up again in the backward pass, when it is no longer there; these are
# the kernels that they call.


def _rows(x: Tensor) -> Tensor:
    """`[..., h]` to contiguous `[r, h]`."""
    return x.reshape(-1, x.shape[-1]).contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        kernels, dtypes = _norm_kernels()
        rows = _rows(x)
        normed, _, scales = kernels.rmsnorm_fwd(rows, weight, epsilon, None, None, dtypes[x.dtype], 0, False)
        ctx.save_for_backward(x, weight, scales)
        result: Tensor = normed.view(x.shape)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        kernels, _ = _norm_kernels()
        x_gradient, weight_gradient = kernels.rmsnorm_bwd(_rows(gradient), _rows(x), scales, weight, 0, False)
        return x_gradient.view(x.shape), weight_gradient, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        kernels, dtypes = _norm_kernels()
        rows = _rows(x)
        arguments = (rows, weight, bias, epsilon, None, None, dtypes[x.dtype], 0, False)
        normed, means, scales = kernels.layernorm_fwd(*arguments)
        ctx.save_for_backward(x, weight, means, scales)
        result: Tensor = normed.view(x.shape)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, means, scales = ctx.saved_tensors
        kernels, _ = _norm_kernels()
        arguments = (_rows(gradient), _rows(x), means, scales, weight, 0, False)
        x_gradient, weight_gradient, bias_gradient = kernels.layernorm_bwd(*arguments)
        return x_gradient.view(x.shape), weight_gradient, bias_gradient, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight`, `[..., h]` to `[..., h]` in `dtype`.

    Rounds once, after the product with the weight, where T5X and our own norm round before it, too.

    Args:
        x: Any of fp32, bf16, fp16.
        weight: `[h]`, any floating dtype.
        epsilon: Added to the mean square.
        dtype: Of the result.
    """
    normed: Tensor = _RMSNorm.apply(x, weight.to(x.dtype), epsilon)
    return normed.to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """`(x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias`, otherwise as `rms_norm`."""
    normed: Tensor = _LayerNorm.apply(x, weight.to(x.dtype), bias.to(x.dtype), epsilon)
    return normed.to(dtype)


@cache
def _norm_kernels() -> tuple[Any, Any]:
    """The compiled module, and its numbers of torch's dtypes."""
    constants: Any = import_module("transformer_engine.pytorch.constants")  # loads the compiled module
    return import_module("transformer_engine_torch"), constants.TE_DType


# Attention. Of the package's three implementations, flash attention takes no bias, cuDNN's takes one beside bf16 and
# fp16 and returns its gradient, and plain products take everything; it chooses by itself.


@cache
def _core_attention(num_heads: int, head_dim: int, kind: str, causal: bool, scale: float, dropout: float) -> Any:
    """The module for all layers of a kind; its construction takes longer than its call."""
    package: Any = import_module("transformer_engine.pytorch")
    return package.DotProductAttention(
        num_attention_heads=num_heads,
        kv_channels=head_dim,
        attention_dropout=dropout,
        qkv_format="bshd",
        attn_mask_type="causal" if causal else "no_mask",
        attention_type=kind,
        softmax_scale=scale,
    )


def _prepare(bias: ScoreBias, dtype: torch.dtype, device: torch.device) -> ScoreBias:
    """Everything but the causal mask as one matrix, with a row for each query, as cuDNN wants it."""
    matrix = bias._replace(causal=False).dense(dtype, device)
    if matrix is not None:
        matrix = matrix.expand(-1, -1, bias.query_length, -1).contiguous()
    return ScoreBias(
        bias.query_length, bias.key_length, mask=matrix, causal=bias.causal, backend=bias.backend, prepared=True
    )


def _core(query: Tensor, key: Tensor, value: Tensor, matrix: Tensor | None, attention: Any) -> Tensor:
    package: Any = import_module("transformer_engine.pytorch")
    with package.autocast(enabled=False):  # in FP8 are the linear layers only
        context: Tensor = attention(
            query,
            key,
            value,
            core_attention_bias_type="no_bias" if matrix is None else "post_scale_bias",
            core_attention_bias=matrix,
        )
    return context.view(query.shape)  # [b, q, n d] -> [b, q, n, d]


def _attend(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: ScoreBias, options: AttentionOptions
) -> Tensor:
    if bias.prepared is None or bias.diagonals is not None:  # the second: a table of the layer's own
        bias = _prepare(bias, query.dtype, query.device)
    kind = "self" if bias.query_length == bias.key_length else "cross"
    query, key, value = separate(query, key, value)
    num_heads, head_dim = query.shape[-2:]
    attention = _core_attention(num_heads, head_dim, kind, bias.causal, options.scale, options.dropout)
    with options.draws() if options.dropout else nullcontext():  # torch's generators draw the mask
        return options.run(_core, query, key, value, bias.mask, attention)


def _refusal(request: AttentionRequest) -> str | None:
    return problem()


BACKEND = AttentionBackend(
    name="transformer_engine",
    attend=_attend,
    devices=DEVICES,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    bias="matrix",
    bias_gradient=True,
    segments="matrix",
    masks=True,
    dropout=True,
    deterministic=False,
    compiles=False,
    package=PACKAGE,
    prepare=_prepare,
    refusal=_refusal,
)
