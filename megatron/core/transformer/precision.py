"""Which dtype is computed in, the one place where the precision flags mean a torch dtype.

bf16: everything between the embedding and the loss is bf16, the residual stream too. fp16: matrix products are fp16;
the residual stream, which outgrows fp16's range in T5, is fp32, and so is what is added to it.
"""

from __future__ import annotations

import torch

from megatron.core.config import ComputeConfig


def compute_dtype(compute: ComputeConfig) -> torch.dtype | None:
    """Dtype of matrix products, encoder output and logits; None: that of the parameters."""
    if compute.bf16:
        return torch.bfloat16
    return torch.float16 if compute.fp16 else None


def residual_dtype(compute: ComputeConfig) -> torch.dtype | None:
    """Dtype of hidden states between blocks; None: that of the parameters."""
    return torch.float32 if compute.fp16 else compute_dtype(compute)
