"""Sums of gradients that go on while the backward pass does."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron.core.config import ParallelConfig
from megatron.core.distributed import GradientReduction, all_reduce_gradients_
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor
from tests.collectives import CountCollectives
from tests.distributed import run_distributed

WIDTH = 6
MATRIX = 4 * WIDTH * WIDTH  # bytes


class Chain(nn.Module):
    """Matrices one after the other; the first is used again at the end, another has no gradient, one is frozen."""

    def __init__(self, mesh=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(6)]
        if mesh is not None:
            places = [Shard(0), Replicate()]
            values = [distribute_tensor(value, mesh, [places[i % 2]]) for i, value in enumerate(values)]
        self.matrices = nn.ParameterList(nn.Parameter(value) for value in values)
        self.matrices[1].requires_grad_(False)

    def forward(self, x):
        for index in (0, 1, 3, 4, 5, 0):  # 2 is not used
            matrix = self.matrices[index]
            whole = matrix.full_tensor() if isinstance(matrix, DTensor) else matrix
            x = torch.tanh(x @ whole.T)
        return x.square().sum()


def _rows(rank, microbatch):
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * microbatch + rank))


def _step(model, rank, reduction, microbatches, overlaps=True):
    for number in range(microbatches):
        if reduction is not None and overlaps and number == microbatches - 1:
            reduction.start()
        model(_rows(rank, number)).backward()


def _gradients(model):
    return [None if p.grad is None else local_tensor(p.grad).clone() for p in model.parameters()]


def _compare(rank, cases):
    return [_sums(rank, *case) for case in cases]


def _sums(rank, divided, microbatches, bucket_bytes):
    context = ParallelContext.create(
        ParallelConfig(tensor_model_parallel_size=2 if divided else 1), torch.device("cpu")
    )
    mesh = context.mesh["tp"] if divided else None
    group = torch.distributed.group.WORLD
    plain, model = Chain(mesh), Chain(mesh)
    reduction = GradientReduction(model.parameters(), group, bucket_bytes)
    for overlaps in (True, False, True):
        plain.zero_grad()
        model.zero_grad()
        _step(plain, rank, None, microbatches)
        all_reduce_gradients_(plain.parameters(), group)
        _step(model, rank, reduction, microbatches, overlaps)
        reduction.finish()
        for parameter, one, other in zip(model.parameters(), _gradients(plain), _gradients(model), strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
            assert parameter.grad is None or isinstance(parameter.grad, DTensor) == divided
    assert model.matrices[1].grad is None and model.matrices[2].grad is None
    return [gradient for gradient in _gradients(model) if gradient is not None]


def test_sums_are_those_of_a_separate_all_reduce():
    """Bit for bit, on two ranks: one or several microbatches, buckets of one and of several gradients, shards."""
    sizes = ((1, MATRIX), (3, 2 * MATRIX), (2, 10 * MATRIX))
    cases = [(divided, *size) for divided in (False, True) for size in sizes]
    for case, first, second in zip(cases, *run_distributed(_compare, 2, cases), strict=True):
        if not case[0]:
            assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _when(rank):
    """Calls and bytes until the end of the backward pass, and in all; by whether a gradient is missing early."""
    found = []
    for frozen in (2, None):
        model = Chain()
        if frozen is not None:
            model.matrices[frozen].requires_grad_(False)
        reduction = GradientReduction(model.parameters(), torch.distributed.group.WORLD, 2 * MATRIX)
        with CountCollectives() as count:
            _step(model, rank, reduction, 2)
            within = count.calls["allreduce_"], count.nbytes["allreduce_"]
            buffers = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
            reduction.finish()
        found.append((within, (count.calls["allreduce_"], count.nbytes["allreduce_"]), len(buffers)))
    return found


def test_buckets_are_summed_within_the_last_backward_in_their_order():
    """Matrices (5, 4), (3, 0) when 2 is frozen; otherwise (5, 4), (3, 2), 0, of which 2 never comes: the rest waits."""
    for whole, waiting in run_distributed(_when, 2):
        assert whole == ((2, 4 * MATRIX), (2, 4 * MATRIX), 2)  # gradients lie in two buffers, and nowhere else
        assert waiting[:2] == ((1, 2 * MATRIX), (3, 4 * MATRIX))


def _misuse(rank):
    model = Chain()
    reduction = GradientReduction(model.parameters(), torch.distributed.group.WORLD, MATRIX)
    reduction.finish()  # nothing has a gradient: no call
    reduction.start()  # a step that is given up
    _step(model, rank, reduction, 1)
    with pytest.raises(AssertionError, match="second backward"):
        model(_rows(rank, 0)).backward()
    with pytest.raises(AssertionError, match="not been finished"):
        reduction.start()
    reduction.finish()


def test_a_gradient_is_not_changed_once_its_sum_has_begun():
    run_distributed(_misuse, 2)
