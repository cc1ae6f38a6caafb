"""Cross-entropy over the vocabulary with the z-loss of T5X, one value a token.

With `log_z = logsumexp(logits)`, the cross-entropy is `log_z - logits[label]` and the z-loss `weight * log_z**2`. Both
are computed in fp32 (fp64 for fp64 logits) from the logits as they are, a few rows at a time, so that the only tensors
of the logits' size are the logits and their gradient.

Where ranks divide the vocabulary, each keeps its own logits: it sends two numbers a token, the logarithm of its part of
the partition function and the label's logit if it has it, in one all-gather. The backward pass needs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.core.tensor_parallel.handle import TensorParallel
from megatron.core.tensor_parallel.mappings import all_gather

IGNORED_LABEL = -100
# Elements handled at once: large enough to fill a GPU, small beside the logits of a training batch.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


class TokenLoss(NamedTuple):
    """Unreduced loss terms; the trainer divides their sum by the global number of target tokens.

    Attributes:
        cross_entropy: `[b, t]` in nats, fp32; 0 where the label is `IGNORED_LABEL`.
        z_loss: `[b, t]`, fp32, weight included; 0 where the label is `IGNORED_LABEL`.
    """

    cross_entropy: Tensor
    z_loss: Tensor


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of `[b * t, vocab]`."""
    rows = max(1, CHUNK_ELEMENTS.get(logits.device.type, 1 << 22) // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        yield slice(start, min(start + rows, logits.shape[0]))


class _VocabCrossEntropy(torch.autograd.Function):
    """From logits `[b, t, vocab]` (this rank's part) and labels `[b, t]`.

    The outputs are tensors of their own, not views: FSDP2 hooks what a model returns, and a view could lose the hook.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, z_loss_weight: float, parallel: TensorParallel, first_id: int
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_z = torch.empty(labels.shape, dtype=dtype, device=logits.device)
        flat_logits, flat_log_z = logits.flatten(0, -2), log_z.flatten()
        for rows in _row_chunks(flat_logits):
            torch.logsumexp(flat_logits[rows].to(dtype), dim=-1, out=flat_log_z[rows])
        ignored = labels == IGNORED_LABEL
        target = labels.masked_fill(ignored, 0).long()
        elsewhere = None
        if parallel.size > 1:
            target = target - first_id
            elsewhere = (target < 0) | (target >= logits.shape[-1])
            target = target.masked_fill(elsewhere, 0)
        label_logits = logits.gather(-1, target[..., None]).squeeze(-1).to(dtype)
        if elsewhere is not None:
            own = torch.stack((log_z, label_logits.masked_fill_(elsewhere, 0.0)))  # [2, b, t]
            every = all_gather(own[None], 0, parallel.group)  # [tp, 2, b, t]
            log_z, label_logits = every[:, 0].logsumexp(0), every[:, 1].sum(0)
        ctx.save_for_backward(logits, target, ignored, log_z, elsewhere)
        ctx.z_loss_weight = z_loss_weight
        cross_entropy = (log_z - label_logits).masked_fill_(ignored, 0.0)
        return cross_entropy, (z_loss_weight * log_z.square()).masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """d logits = softmax * (g_ce + 2 * weight * log_z * g_z) - onehot * g_ce; rows of ignored labels are 0."""
        logits, target, ignored, log_z, elsewhere = ctx.saved_tensors
        grad_cross_entropy, grad_z_loss = grads
        grad_label = grad_cross_entropy.masked_fill(ignored, 0.0)
        grad_log_z = (grad_label + 2.0 * ctx.z_loss_weight * log_z * grad_z_loss).masked_fill_(ignored, 0.0)
        if elsewhere is not None:
            grad_label.masked_fill_(elsewhere, 0.0)
        # [b, t] -> [b * t, 1] each
        target, log_z, grad_label, grad_log_z = (x.reshape(-1, 1) for x in (target, log_z, grad_label, grad_log_z))
        flat_logits = logits.flatten(0, -2)
        grad_logits = torch.empty_like(flat_logits)
        for rows in _row_chunks(flat_logits):
            softmax = (flat_logits[rows] - log_z[rows]).exp_()  # fp32 by promotion
            softmax.mul_(grad_log_z[rows]).scatter_add_(1, target[rows], -grad_label[rows])
            grad_logits[rows] = softmax
        return grad_logits.view(logits.shape), None, None, None, None


def vocab_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    z_loss_weight: float = 0.0,
    tensor_parallel: TensorParallel | None = None,
    num_embeddings: int | None = None,
) -> TokenLoss:
    """Cross-entropy and z-loss of every token, the same on all tensor-parallel ranks.

    Args:
        logits: `[b, t, vocab]`, any floating dtype; of several ranks each has those of `vocab_parallel_logits`.
        labels: Integer ids `[b, t]`; `IGNORED_LABEL` leaves the token out of the loss and of the gradient.
        z_loss_weight: Weight of the squared log-partition function.
        tensor_parallel: The ranks that divide the vocabulary; a single one if not given.
        num_embeddings: Logits of all ranks together, needed when there are several.
    """
    parallel = TensorParallel() if tensor_parallel is None else tensor_parallel
    first_id = 0
    if parallel.size > 1:
        assert num_embeddings is not None
        first_id = parallel.rank * (parallel.round_up(num_embeddings) // parallel.size)
    return TokenLoss(*_VocabCrossEntropy.apply(logits, labels, z_loss_weight, parallel, first_id))
