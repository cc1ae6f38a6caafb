"""The head with its loss, over chunks, against the logits made whole in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.core.extensions import cpu_elementwise
from megatron.core.extensions.torch_elementwise import BLOCK_ELEMENTS
from megatron.core.tensor_parallel import IGNORED_LABEL, TokenLoss, head_loss
from megatron.core.tensor_parallel.head_loss import CHUNK_BYTES, PRODUCT_BYTES, chunk_rows

B, T, H, V = 3, 5, 8, 37
WIDE = torch.float64


def inputs(dtype=WIDE, table_dtype=None, label_dtype=torch.int64, vocab=V, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator, dtype=WIDE).to(dtype).requires_grad_()
    table = (scale * torch.randn(vocab, H, generator=generator, dtype=WIDE)).to(table_dtype or dtype).requires_grad_()
    labels = torch.randint(0, vocab, (B, T), generator=generator, dtype=label_dtype)
    labels[0, 1] = labels[2, 4] = IGNORED_LABEL
    return hidden, table, labels


def plain(hidden, table, labels, z_loss_weight=0.0, logit_scale=1.0):
    """The losses, and the gradients of their sum, with everything in float64."""
    hidden, table = (x.detach().double().requires_grad_() for x in (hidden, table))
    logits = logit_scale * hidden @ table.T
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), reduction="none").view(labels.shape)
    z_loss = (z_loss_weight * logits.logsumexp(-1).square()).masked_fill(labels == IGNORED_LABEL, 0.0)
    total = (cross_entropy + z_loss).sum()
    return TokenLoss(cross_entropy.detach(), z_loss.detach(), total.detach()[None]), torch.autograd.grad(
        total, (hidden, table)
    )


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    """All tokens at once, or a few at a time, with blocks inside as small."""
    if request.param == "chunks":
        monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * V * 4)
        monkeypatch.setitem(PRODUCT_BYTES, "cpu", 5 * H * 2)
        monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 3 * V)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize(
    ("dtype", "table_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-15),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 6e-3),
        (torch.bfloat16, torch.bfloat16, 6e-3),
        (torch.float16, torch.float32, 1e-3),
        (torch.float16, torch.float16, 1e-3),
    ],
)
def test_losses_and_gradients(monkeypatch, dtype, table_dtype, tolerance, extension):
    if not extension:
        monkeypatch.setattr(cpu_elementwise, "supports", lambda tensor: False)
    for label_dtype, z_loss_weight, logit_scale in ((torch.int64, 0.03, 1.0), (torch.int32, 0.0, 0.25)):
        hidden, table, labels = inputs(dtype, table_dtype, label_dtype)
        expected, gradients = plain(hidden, table, labels, z_loss_weight, logit_scale)
        found = head_loss(hidden, table, labels, z_loss_weight=z_loss_weight, logit_scale=logit_scale)
        (found.total * 0.25).backward()
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == (WIDE if dtype == WIDE else torch.float32) and ours.shape == theirs.shape
            assert error(ours, theirs) <= tolerance or not theirs.any()
        assert found.cross_entropy[labels == IGNORED_LABEL].eq(0).all() and hidden.grad[0, 1].eq(0).all()
        for parameter, gradient in zip((hidden, table), gradients, strict=True):
            assert parameter.grad.dtype == parameter.dtype
            assert error(parameter.grad, 0.25 * gradient) < tolerance
        with torch.no_grad():
            again = head_loss(hidden, table, labels, z_loss_weight=z_loss_weight, logit_scale=logit_scale)
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.usefixtures("chunks")
def test_gradients_are_slopes():
    """By differences, not by autograd; `gradcheck` takes every gradient twice, which in-place scaling forbids."""
    hidden, table, labels = inputs()
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(x.shape, generator=generator, dtype=WIDE) for x in (hidden, table)]

    def total(step):
        moved = [x + step * direction for x, direction in zip((hidden, table), directions, strict=True)]
        return head_loss(*moved, labels, z_loss_weight=0.1, logit_scale=0.5).total

    total(0.0).backward()
    slope = sum((x.grad * direction).sum() for x, direction in zip((hidden, table), directions, strict=True))
    with torch.no_grad():
        difference = (total(1e-5) - total(-1e-5)) / 2e-5
    torch.testing.assert_close(slope[None], difference, rtol=1e-8, atol=0)


def test_only_what_is_wanted_is_computed():
    hidden, table, labels = inputs()
    _, (hidden_gradient, table_gradient) = plain(hidden, table, labels)
    head_loss(hidden, table.detach(), labels).total.backward()
    assert error(hidden.grad, hidden_gradient) < 1e-15 and table.grad is None
    hidden.grad = None
    for _ in range(3):  # microbatches
        head_loss(hidden.detach(), table, labels).total.backward()
    assert error(table.grad, 3 * table_gradient) < 1e-15 and hidden.grad is None
    loss = head_loss(hidden, table, labels)
    assert not loss.cross_entropy.requires_grad and not loss.z_loss.requires_grad
    assert not head_loss(hidden.detach(), table.detach(), labels).total.requires_grad


def test_gradients_cannot_be_taken_twice():
    loss = head_loss(*inputs()).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tied_table_gets_both_gradients():
    _, table, labels = inputs()
    ids = labels.clamp(min=0)
    head_loss(F.embedding(ids, table), table, labels).total.backward()
    hidden = F.embedding(ids, table.detach())
    _, (hidden_gradient, table_gradient) = plain(hidden, table, labels)
    table_gradient.index_add_(0, ids.flatten(), hidden_gradient.flatten(0, 1))
    assert error(table.grad, table_gradient) < 1e-14


def test_fp16_keeps_small_and_large_gradients():
    """Probabilities below fp16's smallest number; gradients of the input and of a frequent word beyond its largest."""
    vocab = 2000
    hidden, table, labels = inputs(torch.float16, torch.float32, vocab=vocab)
    labels[:] = 7
    hidden.data[..., 0] = 8.0
    table.data[:, 1:] *= 1e-3
    table.data[:, 0] = torch.linspace(-0.6, 0.6, vocab)
    table.data[7, 0] = -300.0
    _, gradients = plain(hidden, table, labels)
    loss_scale = 2.0**5
    (head_loss(hidden, table, labels).total * loss_scale).backward()
    for parameter, gradient in zip((hidden, table), gradients, strict=True):
        assert error(parameter.grad / loss_scale, gradient) < 2e-3
    assert table.grad.count_nonzero(1).min() == H


def test_large_logits_stay_finite():
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    table = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    loss = head_loss(hidden, table, torch.tensor([[1]]))
    loss.total.backward()
    assert loss.cross_entropy.item() == 2e4 and hidden.grad.item() == 2e4
    assert table.grad.flatten().tolist() == [1.0, -1.0, 0.0]


def test_all_labels_ignored():
    hidden, table, labels = inputs(torch.float32)
    loss = head_loss(hidden, table, torch.full_like(labels, IGNORED_LABEL), z_loss_weight=0.1)
    loss.total.backward()
    assert all(term.eq(0).all() for term in (*loss, hidden.grad, table.grad))


def test_an_empty_microbatch_has_no_loss_and_no_gradient():
    hidden, table, labels = inputs(torch.float32)
    empty = hidden.detach()[:0].requires_grad_()
    loss = head_loss(empty, table, labels[:0], z_loss_weight=0.1)
    loss.total.backward()
    assert loss.cross_entropy.shape == labels[:0].shape and loss.total.item() == 0.0
    assert empty.grad.shape == empty.shape and table.grad.eq(0).all()


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers of a tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tree_leaves(result)
                 if isinstance(leaf, torch.Tensor)]  # fmt: skip
        self.numbers = max(self.numbers, *sizes, 0)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(monkeypatch, dtype):
    tokens, vocab, hidden_size, rows = 4 * 64, 600, 16, 32
    monkeypatch.setitem(CHUNK_BYTES, "cpu", rows * vocab * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 64, hidden_size, generator=generator).to(dtype).requires_grad_()
    table = torch.randn(vocab, hidden_size, generator=generator).requires_grad_()
    labels = torch.randint(vocab, (4, 64), generator=generator)
    with LargestTensor() as largest:
        head_loss(hidden, table, labels).total.backward()
    assert largest.numbers == rows * vocab < tokens * vocab


def test_the_tables_gradient_is_not_copied():
    hidden, table, labels = inputs(torch.float32)
    loss = head_loss(hidden, table, labels).total
    (address,) = {x.data_ptr() for x in loss.grad_fn.saved_tensors if x.shape == table.shape}
    loss.backward()
    assert table.grad.data_ptr() == address


def test_chunks_are_equal_and_bounded():
    assert chunk_rows(912, 32128, 4, "cpu") == 912
    rows = chunk_rows(912, 250112, 4, "cpu")
    assert rows * 250112 * 4 <= CHUNK_BYTES["cpu"] and -(-912 // rows) * rows - 912 < -(-912 // rows)
    assert chunk_rows(3, 1 << 40, 4, "cpu") == 1
    assert chunk_rows(0, 32128, 4, "cpu") == 1
