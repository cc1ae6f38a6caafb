"""What every FP8 implementation needs: which runs it fits, said before they start.

FP8 matrix products are those of the linear layers of the blocks. `--transformer-impl local` computes them with torchao,
`transformer_engine` with its own recipes. Attention products, embeddings, norms and the head stay in bf16.
"""

from __future__ import annotations

import torch

from megatron.core.config import ComputeConfig, ModelConfig, flag_name
from megatron.core.errors import UserError

# Both dimensions of a weight, as each rank holds it, are multiples of this.
WIDTH_MULTIPLE = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
# Least compute capability: Ada, Hopper, Blackwell.
LEAST_CAPABILITY = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
# Of the recipes, those that the local implementation has.
LOCAL_RECIPES = ("tensorwise",)


def check_fp8(compute: ComputeConfig, model: ModelConfig, tensor_ranks: int, device: torch.device) -> None:
    """Raise `UserError` for an FP8 flag that does not fit the others, the model, its layout or the device.

    Args:
        compute: The `fp8_*` fields, precision and implementation.
        model: The sizes.
        tensor_ranks: By how many ranks each layer is divided.
        device: Where the products run.
    """
    _check_flags(compute)
    if compute.fp8_format is not None:
        _check_widths(compute, model, tensor_ranks)
        _check_device(compute, device)


def _check_flags(compute: ComputeConfig) -> None:
    of_delayed = {
        flag_name(name): getattr(compute, name) != getattr(ComputeConfig, name)
        for name in ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
    }
    if compute.fp8_format is None:
        without = {
            "--fp8-recipe": compute.fp8_recipe != ComputeConfig.fp8_recipe,
            "--no-fp8-wgrad": not compute.fp8_wgrad,
            "--first-last-layers-bf16": compute.first_last_layers_bf16,
        }
        _refuse(of_delayed | without, "--fp8-format")
        return
    if compute.fp8_recipe != "delayed":
        _refuse(of_delayed, "--fp8-recipe delayed")
    if not compute.bf16:
        raise UserError(f"--fp8-format {compute.fp8_format} needs --bf16 for all that is not computed in FP8; add it")
    if compute.transformer_impl == "local" and compute.fp8_recipe not in LOCAL_RECIPES:
        raise UserError(
            f"--fp8-recipe {compute.fp8_recipe} needs --transformer-impl transformer_engine; add it, or use "
            f"--fp8-recipe {LOCAL_RECIPES[0]}"
        )


def _refuse(flags: dict[str, bool], without: str) -> None:
    """Raise `UserError` for the first flag that was given."""
    for flag, given in flags.items():
        if given:
            raise UserError(f"{flag} needs {without}; add it or remove the flag")


def _check_widths(compute: ComputeConfig, model: ModelConfig, tensor_ranks: int) -> None:
    multiple = WIDTH_MULTIPLE[compute.fp8_recipe]
    heads = f"--num-attention-heads {model.num_attention_heads} x --kv-channels {model.kv_channels}"
    widths = {
        f"--hidden-size {model.hidden_size}": (model.hidden_size, 1),
        heads: (model.inner_size, tensor_ranks),
        f"--ffn-hidden-size {model.ffn_hidden_size}": (model.ffn_hidden_size, tensor_ranks),
    }
    for name, (width, ranks) in widths.items():
        local = -(-width // ranks)
        if local % multiple:
            divided = f" over --tensor-model-parallel-size {ranks}, {local} a rank," if ranks > 1 else ""
            raise UserError(
                f"{name}{divided} is not a multiple of {multiple}, which --fp8-format {compute.fp8_format} with "
                f"--fp8-recipe {compute.fp8_recipe} needs; choose another size or remove --fp8-format"
            )


def _check_device(compute: ComputeConfig, device: torch.device) -> None:
    least = LEAST_CAPABILITY[compute.fp8_recipe]
    needs = (
        f"--fp8-format {compute.fp8_format} with --fp8-recipe {compute.fp8_recipe} needs a GPU of compute capability "
        f"{least[0]}.{least[1]} or higher"
    )
    if device.type != "cuda":
        raise UserError(f"{needs}, and this run is on {device.type}; remove --fp8-format")
    capability = torch.cuda.get_device_capability(device)
    if capability < least:
        raise UserError(f"{needs}, and this one has {capability[0]}.{capability[1]}; remove --fp8-format")
