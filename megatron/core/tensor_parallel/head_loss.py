"""Projection to the vocabulary with the loss, over chunks of tokens, so that the logits never exist whole.

The gradients are computed in the forward pass, while a chunk's logits are there: the gradient of the sum of the losses
with respect to the input and to the table. The backward pass scales them by the gradient of that sum. So nothing of the
logits' size is kept, and no product is computed twice; only the sum over all tokens can be differentiated.

Gradients with respect to logits have the logits' dtype, in fp16 with a fixed factor, as the loss scale comes too late
for them. The table's gradient is summed over the chunks in fp32.

Where ranks divide the vocabulary, a chunk needs one all-gather of two numbers a token between its loss and its
gradients.

Shapes: b batch, t sequence, h hidden, r tokens of a chunk, V' this rank's rows of the table, v those that are no
padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.core.tensor_parallel.cross_entropy import (
    joined_statistics,
    label_statistics,
    logits_gradient_,
    statistics_dtype,
)
from megatron.core.tensor_parallel.handle import TensorParallel

IGNORED_LABEL = -100
# A chunk's logits take at most this much: few chunks, each of which reads and writes the table's gradient once.
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
# Of the gradient of the table, computed at once and added to the sum: a part of the last cache of a CPU.
PRODUCT_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
# bf16 products on CPUs that sum over at least so many numbers are cut into so many pieces.
LONG_SUM, LONG_SUM_PIECES = 1 << 14, 8
# fp16 gradients of logits are this much larger: probabilities of rare words are below fp16's smallest number. Those of
# labels are about -1 before, so that there is room above.
FP16_GRADIENT_SCALE = 2.0**10


class TokenLoss(NamedTuple):
    """Loss terms of a microbatch; the trainer divides their sum by the global number of target tokens.

    Attributes:
        cross_entropy: `[b, t]` in nats, fp32; 0 where the label is `IGNORED_LABEL`. Not differentiable.
        z_loss: `[b, t]`, fp32, weight included; 0 where the label is `IGNORED_LABEL`. Not differentiable.
        total: `[1]`, fp32: the sum of both over all tokens, which is what can be differentiated.
    """

    cross_entropy: Tensor
    z_loss: Tensor
    total: Tensor


def chunk_rows(num_tokens: int, table_rows: int, number_bytes: int, device_type: str) -> int:
    """Tokens of a chunk, r: all chunks but the last have so many. The same on all tensor-parallel ranks.

    Args:
        num_tokens: Of the microbatch, b t.
        table_rows: Of a rank, padding included: V'.
        number_bytes: Bytes of a logit.
        device_type: `cuda` or `cpu`.
    """
    most = max(1, CHUNK_BYTES.get(device_type, 64 << 20) // (table_rows * number_bytes))
    num_chunks = -(-num_tokens // most)
    return max(1, -(-num_tokens // max(1, num_chunks)))


class _Pass:
    """One pass over the chunks: losses, and gradients of their sum if wanted.

    Args:
        hidden: `[b t, h]`.
        table: `[V', h]`, in the dtype it is kept in.
        labels: `[b t]`, any integer dtype.
        z_loss_weight: Weight of the squared log-partition function.
        parallel: The ranks.
        num_embeddings: Rows of all ranks' tables that are no padding.
        logit_scale: Factor of the logits.
        backend: Value of `--cross-entropy-backend`.
    """

    def __init__(
        self,
        hidden: Tensor,
        table: Tensor,
        labels: Tensor,
        z_loss_weight: float,
        parallel: TensorParallel,
        num_embeddings: int,
        logit_scale: float,
        backend: str,
    ) -> None:
        first_id = parallel.rank * len(table)
        valid = min(len(table), num_embeddings - first_id)
        assert valid > 0, f"{num_embeddings} ids leave nothing for rank {parallel.rank} of {parallel.size}"
        assert not labels.is_cpu or not labels.numel() or int(labels.max()) < num_embeddings, "a label has no logit"
        self.hidden, self.table, self.parallel = hidden, table, parallel
        self.z_loss_weight, self.logit_scale, self.backend = z_loss_weight, logit_scale, backend
        self.weight = table[:valid].to(hidden.dtype)  # [v, h]
        self.ignored = labels == IGNORED_LABEL
        # Of this rank's rows; elsewhere if it is none of them.
        self.target = labels.long().masked_fill(self.ignored, -1) - first_id
        self.dtype = statistics_dtype(hidden.dtype)
        self.gradient_scale = FP16_GRADIENT_SCALE if hidden.dtype == torch.float16 else 1.0
        self.hidden_gradient: Tensor | None = None  # [b t, h]
        self.table_gradient: Tensor | None = None  # [V', h]

    def run(self, of_hidden: bool, of_table: bool) -> tuple[Tensor, Tensor]:
        """Cross-entropy and z-loss `[b t]`; computes the gradients that are asked for."""
        if of_hidden:
            self.hidden_gradient = self.hidden.new_empty(self.hidden.shape, dtype=_gradient_dtype(self.hidden))
        if of_table:
            self.table_gradient = self.table.new_empty(self.table.shape, dtype=self.dtype)
            # Chunks write the rows that mean something; an empty microbatch has no chunk.
            self.table_gradient[len(self.weight) if len(self.hidden) else 0 :].zero_()
        losses = self.hidden.new_empty(2, len(self.hidden), dtype=self.dtype)
        size = chunk_rows(len(self.hidden), len(self.table), self.hidden.element_size(), self.hidden.device.type)
        for start in range(0, len(self.hidden), size):
            self._chunk(slice(start, start + size), losses)
        return losses[0], losses[1]

    def _chunk(self, rows: slice, losses: Tensor) -> None:
        hidden, target, ignored = self.hidden[rows], self.target[rows], self.ignored[rows]
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        logits = hidden @ self.weight.T  # [r, v]
        log_z, label_logits = joined_statistics(label_statistics(logits, target, self.backend), self.parallel)
        losses[0, rows] = (log_z - label_logits).masked_fill_(ignored, 0.0)
        losses[1, rows] = (self.z_loss_weight * log_z.square()).masked_fill_(ignored, 0.0)
        if self.hidden_gradient is None and self.table_gradient is None:
            return
        # d logits = softmax * (1 + 2 weight log_z) - onehot; rows of ignored labels are 0
        label_scale = torch.where(ignored, 0.0, self.gradient_scale).to(self.dtype)
        softmax_scale = label_scale * (1.0 + 2.0 * self.z_loss_weight * log_z)
        logits_gradient_(logits, target, log_z, label_scale, softmax_scale, self.backend)
        if self.hidden_gradient is not None:
            self.hidden_gradient[rows] = _product(logits, self.weight)
        if self.table_gradient is not None:
            _add_product(self.table_gradient[: len(self.weight)], logits, hidden, first=rows.start == 0)


def _gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Of the input's gradient until it is scaled: T5's tables are large enough to leave fp16's range."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _product(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y`, of 16-bit numbers in fp32 where that costs nothing, and always of fp16, whose range it may leave."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return x @ y
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=torch.float32)
    if x.dtype == torch.float16:
        return x.float() @ y.float()
    # oneDNN's bf16 products lose a third of their speed over sums as long as a vocabulary.
    count = LONG_SUM_PIECES if x.shape[1] >= LONG_SUM and x.shape[1] % LONG_SUM_PIECES == 0 else 1
    if count == 1:
        return x @ y
    pieces = torch.bmm(x.unflatten(1, (count, -1)).transpose(0, 1), y.unflatten(0, (count, -1)))
    return pieces.sum(0, dtype=torch.float32)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor, *, first: bool) -> None:
    """Add `gradient^T hidden` to `total` `[v, h]`, or put it there first, of `[r, v]` and `[r, h]`."""
    if gradient.dtype == total.dtype:
        # Before the first, `total` is not initialised; a factor of 0 ignores that.
        torch.addmm(total, gradient.T, hidden, beta=0.0 if first else 1.0, out=total)
        return
    rows = max(1, PRODUCT_BYTES.get(total.device.type, 64 << 20) // (total.shape[1] * gradient.element_size()))
    for start in range(0, len(total), rows):
        product = _product(gradient[:, start : start + rows].T, hidden)
        if first:
            total[start : start + rows] = product
        else:
            total[start : start + rows] += product


class _HeadLoss(torch.autograd.Function):
    """The outputs are tensors of their own, not views: FSDP2 hooks what a model returns, and a view could lose it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, labels: Tensor, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = _Pass(hidden.flatten(0, -2), table, labels.flatten(), *options)
        cross_entropy, z_loss, total = _losses(work, labels.shape, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(work.hidden_gradient, work.table_gradient)
        ctx.hidden_scale, ctx.table_scale = work.logit_scale / work.gradient_scale, 1.0 / work.gradient_scale
        ctx.hidden_shape, ctx.hidden_dtype, ctx.table_dtype = hidden.shape, hidden.dtype, table.dtype
        ctx.mark_non_differentiable(cross_entropy, z_loss)
        ctx.set_materialize_grads(False)
        return cross_entropy, z_loss, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        factor = gradients[2]
        assert factor is not None
        # Scaled in place: torch refuses a second backward pass, which would find them changed.
        hidden_gradient, table_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = _scaled(hidden_gradient, factor * ctx.hidden_scale, ctx.hidden_dtype)
            hidden_gradient = hidden_gradient.view(ctx.hidden_shape)
        if table_gradient is not None:
            table_gradient = _scaled(table_gradient, factor * ctx.table_scale, ctx.table_dtype)
        return hidden_gradient, table_gradient, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * factor` in `dtype`, in place if it has that; `factor` is `[1]` and keeps its precision."""
    result = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=result)


def _losses(work: _Pass, shape: torch.Size, of_hidden: bool, of_table: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens, `shape` each, and their sum `[1]`."""
    cross_entropy, z_loss = work.run(of_hidden, of_table)
    total = cross_entropy.sum(dtype=torch.float64) + z_loss.sum(dtype=torch.float64)
    return cross_entropy.reshape(shape).clone(), z_loss.reshape(shape).clone(), total.to(work.dtype)[None].clone()


def head_loss(
    hidden: Tensor,
    table: Tensor,
    labels: Tensor,
    *,
    z_loss_weight: float = 0.0,
    parallel: TensorParallel | None = None,
    num_embeddings: int | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> TokenLoss:
    """Cross-entropy and z-loss of every token and their sum, the same on all tensor-parallel ranks.

    Args:
        hidden: Input of a column-parallel product, `[b, t, h]`, any floating dtype; products and the gradients of
            logits have it. Its gradient is this rank's share of a sum over the ranks.
        table: This rank's rows of the vocabulary's table `[V', h]`, of any floating dtype; its gradient has that too.
        labels: Integer ids `[b, t]`; `IGNORED_LABEL` leaves the token out of the loss and of the gradient.
        z_loss_weight: Weight of the squared log-partition function.
        parallel: The ranks that divide the table; a single one if not given.
        num_embeddings: Rows of all ranks' tables that mean something; all of them if not given.
        logit_scale: Factor of the logits.
        backend: Kernels of the loss, a value of `--cross-entropy-backend`.
    """
    parallel = TensorParallel() if parallel is None else parallel
    num_embeddings = parallel.size * len(table) if num_embeddings is None else num_embeddings
    options = (z_loss_weight, parallel, num_embeddings, logit_scale, backend)
    if torch.is_grad_enabled() and (hidden.requires_grad or table.requires_grad):
        return TokenLoss(*_HeadLoss.apply(hidden, table, labels, options))
    work = _Pass(hidden.detach().flatten(0, -2), table.detach(), labels.flatten(), *options)
    return TokenLoss(*_losses(work, labels.shape, False, False))
