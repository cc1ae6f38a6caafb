"""Linear products in FP8 by torchao's autograd function, with our weights: no module of torchao's, no state.

Inputs, weights and output gradients are cast with one scale each, made from their own largest number, so nothing has to
be saved for a run to go on as it was. The casts are torch operations of their own: FP8 pays only where torch.compile
fuses them. What is kept for the backward pass is in bf16.

Shapes: r rows, i input features, o output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from megatron.core.config import ComputeConfig
from megatron.core.errors import UserError
from megatron.core.extensions.packages import require

if TYPE_CHECKING:
    from torchao.float8.config import Float8LinearConfig

# The product that gives the weight's gradient sums over rows, and FP8 products sum over multiples of this.
ROW_MULTIPLE = 16


def check(compute: ComputeConfig) -> None:
    """Raise `UserError` when torchao, as it is used here, is missing; `fp8.check_fp8` has what FP8 needs besides."""
    setting = f"--fp8-format {compute.fp8_format}"
    otherwise = "use --transformer-impl transformer_engine, or remove --fp8-format"
    require(setting, "torchao", otherwise)
    try:
        from torchao.float8.config import Float8LinearConfig

        linear_with(Float8LinearConfig())
    except ImportError as error:
        reason = str(error).splitlines()[0]
        cure = f"install it or {otherwise}"
        raise UserError(f"{setting} needs a release of torchao such as 0.18 ({reason}); {cure}") from None


def product(compute: ComputeConfig, *, emulate: bool = False) -> Callable[..., Tensor]:
    """`x W^T (+ b)` in FP8, for any number of layers: inputs and weights in E4M3, output gradients as `--fp8-format`.

    Args:
        compute: The `fp8_*` fields; the recipe is tensorwise.
        emulate: Round to FP8, but multiply in fp32: for devices that have no FP8 products.
    """
    assert compute.fp8_format is not None and compute.fp8_recipe == "tensorwise"
    from torchao.float8.config import CastConfig, Float8LinearConfig, ScalingType, e4m3_dtype, e5m2_dtype

    of_gradients = CastConfig(target_dtype=e5m2_dtype if compute.fp8_format == "hybrid" else e4m3_dtype)
    x_for_weight, gradient_for_weight = None, None  # as for the other products
    if not compute.fp8_wgrad:
        x_for_weight = CastConfig(ScalingType.DISABLED, target_dtype=e4m3_dtype)
        gradient_for_weight = CastConfig(ScalingType.DISABLED, target_dtype=of_gradients.target_dtype)
    return linear_with(
        Float8LinearConfig(
            cast_config_grad_output=of_gradients,
            cast_config_input_for_grad_weight=x_for_weight,
            cast_config_grad_output_for_grad_weight=gradient_for_weight,
            emulate=emulate,
        )
    )


def linear_with(config: Float8LinearConfig) -> Callable[..., Tensor]:
    """`x W^T (+ b)` with torchao's configuration.

    Its function is one that torchao's own layer is made of and does not promise to keep; it is called from here only.
    """
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    # Of the product, the input's gradient and the weight's.
    parts = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    products = LinearMMConfig(*(ScaledMMConfig(config.emulate, part.use_fast_accum, False, False) for part in parts))

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.flatten(0, -2)  # [r, i]
        missing = -len(rows) % ROW_MULTIPLE
        if missing:  # with zeros, which change no scale and no sum
            rows = F.pad(rows, (0, 0, 0, missing))
        # In the dtype of x also where weights are fp32: FSDP2 has cast them before, and all layouts are to agree.
        result = matmul_with_hp_or_float8_args.apply(rows, weight.to(x.dtype).t(), products, config)
        result = result[: len(result) - missing].unflatten(0, x.shape[:-1])
        return result if bias is None else result + bias

    return linear
