"""Copies of parameters on several stages get one gradient, take one step and stay equal bit by bit."""

import pytest
import torch

from megatron.core.config import OptimizerConfig, ParallelConfig
from megatron.core.distributed import global_grad_norm, gradient_divisor
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.optimizer import build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor, model_parameters
from tests.core.pipeline_parallel.pipelines import (
    FACTOR,
    Z_LOSS_WEIGHT,
    Ranks,
    equal_cut,
    make_batch,
    materialize,
    model_config,
    relative_difference,
    whole,
)
from tests.distributed import run_distributed

STEPS, MICROBATCHES, LEARNING_RATE = 3, 4, 0.01
TIED = model_config(share_embeddings_and_output_weights=True, encoder_num_layers=3, decoder_num_layers=4)


def one_process(optimizer_name):
    context = ParallelContext(torch.device("cpu"))
    with torch.device("meta"):
        model = T5Model(TIED, None, Z_LOSS_WEIGHT)
    parameters = model_parameters([materialize(model)])
    optimizer = build_optimizer(OptimizerConfig(optimizer=optimizer_name), parameters, context)
    norms = []
    for step in range(STEPS):
        losses = model(**make_batch(2 * MICROBATCHES, step)).loss
        (losses.total * FACTOR).backward()
        norms.append(update(optimizer, parameters, context))
    return norms, {p.name: p.parameter.detach() for p in parameters}


def update(optimizer, parameters, context):
    norm = global_grad_norm(parameters, context)
    optimizer.step(LEARNING_RATE, gradient_divisor(norm, 1.0))
    optimizer.zero_grad()
    return norm.item()


def _train(rank, pipeline_ranks, optimizer_name, cases):
    parallel = ParallelConfig(pipeline_model_parallel_size=pipeline_ranks)
    context = ParallelContext.create(parallel, torch.device("cpu"))
    results = []
    for schedule, strategy in cases:
        plan = equal_cut(schedule, TIED, context)
        ranks = Ranks(context, TIED, plan, MICROBATCHES // context.dp_size, strategy=strategy)
        optimizer = build_optimizer(
            OptimizerConfig(optimizer=optimizer_name), ranks.parameters, context, ranks.shared.synchronize
        )
        norms = []
        for step in range(STEPS):
            batch = make_batch(2 * MICROBATCHES, step)
            ranks.step({name: t.chunk(context.dp_size)[context.dp_rank].contiguous() for name, t in batch.items()})
            norms.append(update(optimizer, ranks.parameters, context))
            ranks.shared.check_equal()
        results.append((norms, [(p.name, whole(p.parameter.detach()).clone()) for p in ranks.parameters]))
    return results


@pytest.mark.parametrize(
    ("optimizer_name", "pipeline_ranks", "cases"),
    [
        ("adafactor", 4, [("interleaved", "no_shard"), ("zbv", "no_shard")]),
        ("adamw-scale", 2, [("zbv", "optim_grads")]),
    ],
)
def test_copies_take_the_steps_of_one_process(optimizer_name, pipeline_ranks, cases):
    expected_norms, expected = one_process(optimizer_name)
    everywhere = run_distributed(_train, 4, pipeline_ranks, optimizer_name, cases)
    for norms, parameters in (case for results in everywhere for case in results):
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        for name, parameter in parameters:
            assert relative_difference(parameter, expected[name]) < 1e-5, name


def _differing_copy(rank):
    context = ParallelContext.create(ParallelConfig(pipeline_model_parallel_size=2), torch.device("cpu"))
    found = {}
    for schedule in ("gpipe", "zbv"):
        ranks = Ranks(context, TIED, equal_cut(schedule, TIED, context), 4)
        shared = [p for p in ranks.parameters if p.shared and p.name == "embedding.word_embeddings.weight"]
        sums = {p.name: torch.full((2,), float(rank)) for p in shared}
        ranks.shared.synchronize(sums)
        ranks.shared.check_equal()
        if rank == 0:
            bits = local_tensor(shared[-1].parameter.detach())
            bits[7, 3] = torch.nextafter(bits[7, 3], torch.tensor(9.0))
        try:
            ranks.shared.check_equal()
            message = ""
        except RuntimeError as error:
            message = str(error)
        found[schedule] = (message, [(p.shared, p.is_copy) for p in shared], [s.tolist() for s in sums.values()])
    return found


def test_a_differing_copy_is_found():
    first, second = run_distributed(_differing_copy, 2)
    for found in (first, second):
        for message, _, _ in found.values():
            assert message == "stages of the pipeline hold different copies of embedding.word_embeddings.weight"
        assert found["gpipe"][2] == [[0.0, 0.0]]  # the owner's
    assert first["gpipe"][1] == [(True, False)] and second["gpipe"][1] == [(True, True)]
    # A V puts the first and the last stage on one rank.
    assert first["zbv"][1] == [(True, False), (True, True)]
