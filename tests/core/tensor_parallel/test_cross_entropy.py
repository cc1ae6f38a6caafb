import pytest
import torch
import torch.nn.functional as F

from megatron.core.tensor_parallel import IGNORED_LABEL, cross_entropy, vocab_cross_entropy


def inputs(dtype, b=3, t=5, vocab=17, seed=0, label_dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(b, t, vocab, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (b, t), generator=generator, dtype=label_dtype)
    labels[0, 1] = labels[2, 4] = IGNORED_LABEL
    return logits, labels


def plain(logits, labels, z_loss_weight):
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cross_entropy = F.cross_entropy(wide.flatten(0, 1), labels.flatten().long(), reduction="none").view(labels.shape)
    return cross_entropy, (z_loss_weight * wide.logsumexp(-1).square()).masked_fill(labels == IGNORED_LABEL, 0.0)


@pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_values_and_gradient_equal_torch(monkeypatch, dtype, label_dtype, chunk_elements):
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", chunk_elements)
    logits, labels = inputs(dtype, label_dtype=label_dtype)
    reference = logits.detach().clone().requires_grad_()
    weights = torch.rand(2, *labels.shape, generator=torch.Generator().manual_seed(1))  # a gradient for each term
    actual, expected = vocab_cross_entropy(logits, labels, 0.03), plain(reference, labels, 0.03)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours, theirs)
    for terms in (actual, expected):
        sum((weight * term).sum() for weight, term in zip(weights, terms, strict=True)).backward()
    torch.testing.assert_close(logits.grad, reference.grad)
    assert logits.grad[0, 1].eq(0).all() and logits.grad[2, 4].eq(0).all()


def test_gradcheck():
    logits, labels = inputs(torch.float64, vocab=6)
    torch.autograd.gradcheck(lambda x: tuple(vocab_cross_entropy(x, labels, 0.1)), (logits,))


def test_one_term_alone():
    logits, labels = inputs(torch.float64)
    reference = logits.detach().clone().requires_grad_()
    vocab_cross_entropy(logits, labels, 0.5).z_loss.sum().backward()
    plain(reference, labels, 0.5)[1].sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad)


def test_large_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss = vocab_cross_entropy(logits, torch.tensor([[1]]))
    loss.cross_entropy.sum().backward()
    assert loss.cross_entropy.item() == 2e4
    assert logits.grad.tolist() == [[[1.0, -1.0, 0.0]]]


def test_all_labels_ignored():
    logits, labels = inputs(torch.float32)
    loss = vocab_cross_entropy(logits, torch.full_like(labels, IGNORED_LABEL), 0.1)
    (loss.cross_entropy + loss.z_loss).sum().backward()
    assert loss.cross_entropy.eq(0).all() and loss.z_loss.eq(0).all() and logits.grad.eq(0).all()
