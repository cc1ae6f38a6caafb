"""How much memory an optimizer's state takes, without building it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.config import OptimizerConfig
from megatron.core.optimizer.adafactor import MIN_FACTORED_SIZE
from megatron.core.optimizer.adamw_scale import BUCKET_MIB
from megatron.core.parameters import ModelParameter, local_tensor


def optimizer_state_bytes(
    config: OptimizerConfig, parameters: Sequence[ModelParameter], device_type: str = "cuda"
) -> int:
    """Bytes of the fp32 state that the optimizer of `config` keeps of what this rank holds of `parameters`.

    AdamW and AdamWScale have two numbers a parameter, AdamWScale a buffer for some updates too; Adafactor has a number
    for each row and each column of a matrix, and one a parameter for what is not a matrix or too small.
    """
    sizes = [local_tensor(p.parameter.detach()).numel() for p in parameters]
    if config.optimizer == "adafactor":
        return 4 * sum(_adafactor_numbers(p, size) for p, size in zip(parameters, sizes, strict=True))
    buffer = 0
    if config.optimizer == "adamw-scale":
        buffer = _largest_bucket(sizes, BUCKET_MIB[device_type] * 2**20 // 4)
    return 4 * (2 * sum(sizes) + buffer)


def _largest_bucket(sizes: Sequence[int], limit: int) -> int:
    """Numbers of the largest of AdamWScale's buckets of consecutive parameters."""
    largest = bucket = room = 0
    for size in sizes:
        if size > room:
            bucket, room = 0, limit
        bucket, room = bucket + size, room - size
        largest = max(largest, bucket)
    return largest


def _adafactor_numbers(p: ModelParameter, local_size: int) -> int:
    if p.parameter.ndim != 2:
        return local_size
    matrices = len(p.spec.matrices)
    if min(p.shape[0] // matrices, p.shape[1]) < MIN_FACTORED_SIZE:
        return local_size
    return local_tensor(p.parameter.detach()).shape[0] + matrices * p.parameter.shape[1]
