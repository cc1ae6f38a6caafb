"""Mappings, and the head with its loss, on several ranks."""

from unittest import mock

import torch
import torch.distributed as dist

from megatron.core.config import ParallelConfig
from megatron.core.parallel_state import ParallelContext
from megatron.core.tensor_parallel import (
    IGNORED_LABEL,
    TensorParallel,
    head_loss,
    join_logits,
    mappings,
    vocab_parallel_logits,
)
from megatron.core.tensor_parallel.head_loss import CHUNK_BYTES
from tests.distributed import run_distributed


def draw(rank, *shape, dtype=torch.float64):
    """Small whole numbers, so that sums are exact in every dtype."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def both_ways(function, x, gradient):
    x = x.clone().requires_grad_()
    result = function(x)
    result.backward(gradient(result.shape))
    return result.detach(), x.grad


def check_mappings(rank, dtype):
    group = dist.group.WORLD
    size = group.size()
    for dim in (0, 1, -1):
        shape = [2, 3, 5]
        shape[dim] *= size
        wholes = [draw(r, *shape, dtype=dtype) for r in range(size)]  # what each rank has
        gradients = [draw(10 + r, *shape, dtype=dtype) for r in range(size)]
        part = lambda tensor, dim=dim: tensor.chunk(size, dim)[rank]  # noqa: E731
        own, own_gradient = wholes[rank], gradients[rank]
        joined, joined_gradient = (torch.cat([w.chunk(size, dim)[r] for r, w in enumerate(x)], dim) for x in
                                   (wholes, gradients))  # fmt: skip
        expected = {  # input, gradient of the output, output, gradient of the input
            mappings.copy_to_ranks: (own, own_gradient, own, sum(gradients)),
            mappings.reduce_from_ranks: (own, own_gradient, sum(wholes), own_gradient),
            mappings.gather_for_product: (part(own), own_gradient, joined, part(sum(gradients))),
            mappings.gather_for_all: (part(own), own_gradient, joined, part(own_gradient)),
            mappings.reduce_scatter_from_ranks: (own, part(own_gradient), part(sum(wholes)), joined_gradient),
            mappings.split_among_ranks: (own, part(own_gradient), part(own), joined_gradient),
        }
        for mapping, (x, gradient, result, x_gradient) in expected.items():
            dims = () if mapping in (mappings.copy_to_ranks, mappings.reduce_from_ranks) else (dim,)
            before = gradient.clone()
            found = both_ways(lambda x: mapping(x, *dims, group), x, lambda _: gradient)  # noqa: B023
            assert torch.equal(found[0], result) and torch.equal(found[1], x_gradient), (mapping.__name__, dim)
            assert torch.equal(gradient, before), mapping.__name__


def check_head_loss(parallel, num_embeddings, chunk_bytes):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator)
    whole = torch.randn(parallel.round_up(num_embeddings), 4, dtype=torch.float64, generator=generator)
    whole[num_embeddings:] = 50.0  # must not matter
    labels = torch.randint(0, num_embeddings, (3, 5), generator=generator)
    labels[0, 1] = IGNORED_LABEL
    weight = mappings.own_part(whole, 0, parallel.group).requires_grad_()
    local_hidden = hidden.clone().requires_grad_()
    logits = vocab_parallel_logits(parallel.copy(local_hidden), weight, num_embeddings, parallel)
    with mock.patch.dict(CHUNK_BYTES, cpu=chunk_bytes):
        found = head_loss(
            parallel.copy(local_hidden), weight, labels,
            z_loss_weight=0.1, parallel=parallel, num_embeddings=num_embeddings,
        )  # fmt: skip
    found.total.backward()
    valid = whole[:num_embeddings].clone().requires_grad_()
    hidden.requires_grad_()
    all_logits = hidden @ valid.T
    expected = head_loss(hidden, valid, labels, z_loss_weight=0.1)
    expected.total.backward()
    torch.testing.assert_close(join_logits(logits, num_embeddings, parallel), all_logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(local_hidden.grad, hidden.grad)
    gradient = torch.nn.functional.pad(valid.grad, (0, 0, 0, len(whole) - num_embeddings))
    torch.testing.assert_close(weight.grad, mappings.own_part(gradient, 0, parallel.group))


def _rank(rank):
    config = ParallelConfig(tensor_model_parallel_size=2)
    parallel = TensorParallel.of(ParallelContext.create(config, torch.device("cpu")), config)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        check_mappings(rank, dtype)
    for num_embeddings, chunk_bytes in ((7, 1 << 20), (8, 1 << 20), (7, 3 * 4 * 8)):
        check_head_loss(parallel, num_embeddings, chunk_bytes)


def test_mappings_and_head_loss():
    run_distributed(_rank, 2)


def test_one_rank_does_nothing():
    parallel, x = TensorParallel(sequence_parallel=True), draw(0, 2, 3, 4)
    assert not parallel.sequence_parallel and parallel.padded_length(3) == parallel.round_up(3) == 3
    for function in (parallel.enter, parallel.leave, parallel.copy, parallel.join_last, parallel.split_sequence):
        assert function(x) is x
    torch.manual_seed(5)
    expected = torch.nn.functional.dropout(x, 0.4)
    parallel.seed_dropout(5)
    assert torch.equal(parallel.dropout(x, 0.4, True), expected)
    assert parallel.dropout(x, 0.4, False) is x
