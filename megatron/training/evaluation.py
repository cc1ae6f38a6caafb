"""Validation loss on a fixed set of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron.core.datasets.loader import T5Loader
from megatron.core.datasets.t5_dataset import SpecialTokens
from megatron.core.parallel_state import ParallelContext
from megatron.training.model_setup import DistributedModel


class EvaluationResult(NamedTuple):
    """Mean cross-entropies in nats.

    Attributes:
        lm_loss: Per target token.
        noise_lm_loss: Per masked token, without sentinels and end-of-sequence, which are easy.
        num_targets: Target tokens in `lm_loss`.
        num_noise_tokens: Target tokens in `noise_lm_loss`.
    """

    lm_loss: float
    noise_lm_loss: float
    num_targets: int
    num_noise_tokens: int


def special_token_mask(special: SpecialTokens, padded_vocab_size: int, device: torch.device) -> torch.Tensor:
    """Which ids are sentinels or end-of-sequence: bool `[padded_vocab_size]`."""
    mask = torch.zeros(padded_vocab_size, dtype=torch.bool, device=device)
    mask[torch.tensor([special.eos_id, *special.sentinel_ids], device=device)] = True
    return mask


@torch.no_grad()
def evaluate(
    model: DistributedModel,
    loader: T5Loader,
    num_samples: int,
    is_special: torch.Tensor,
    context: ParallelContext,
    interrupted: Callable[[], bool] = lambda: False,
) -> EvaluationResult | None:
    """Evaluate on samples 0 .. `num_samples` of the loader's dataset, each exactly once over all ranks.

    Args:
        model: The model; in training mode afterwards.
        loader: Of the dataset to evaluate on.
        num_samples: How many.
        is_special: Of `special_token_mask`.
        context: The layout.
        interrupted: Asked before each batch, on all ranks together, whether to give up; same answer on all.

    Returns:
        The losses, or None when it was given up.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=context.device)
    model.train_mode(False)
    for batch in loader.evaluation_batches(num_samples, model.evaluation_microbatches):
        if interrupted():
            model.train_mode(True)
            return None
        inputs = batch.to(context.device)
        losses = model.token_losses(inputs)
        if losses is None or not model.counts_loss:
            continue
        counted = inputs.labels >= 0
        noise = counted & ~is_special[inputs.labels.clamp(min=0)]
        totals += torch.stack(
            [losses.sum(dtype=torch.float64), (losses * noise).sum(dtype=torch.float64), counted.sum(), noise.sum()]
        )
    if context.world_size > 1:
        torch.distributed.all_reduce(totals)
    model.train_mode(True)
    loss, noise_loss, targets, noise_tokens = totals.tolist()
    return EvaluationResult(loss / targets, noise_loss / noise_tokens, int(targets), int(noise_tokens))
