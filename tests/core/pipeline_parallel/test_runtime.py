"""Every schedule gives the losses and gradients of one process, wherever the model is cut and however it is sharded."""

import pytest
import torch

from megatron.core.config import ComputeConfig, ParallelConfig
from megatron.core.parallel_state import ParallelContext
from tests.core.pipeline_parallel.pipelines import (
    STAGES_PER_RANK,
    Ranks,
    Reference,
    equal_cut,
    make_batch,
    model_config,
    relative_difference,
)
from tests.distributed import run_distributed

SPLIT = ("interleaved-zb", "zbv", "dualpipev")  # schedules with a split backward pass
TIED = {"share_embeddings_and_output_weights": True}
LEARNED = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 12, "add_bias_linear": True}


def create(pipeline_ranks, tensor_ranks=1):
    parallel = ParallelConfig(pipeline_model_parallel_size=pipeline_ranks, tensor_model_parallel_size=tensor_ranks)
    return ParallelContext.create(parallel, torch.device("cpu"))


def own_rows(batch, context):
    """The rows of a data-parallel rank."""
    return {name: tensor.chunk(context.dp_size)[context.dp_rank].contiguous() for name, tensor in batch.items()}


def differences(ranks, batch, reference):
    """Relative differences of the sums and of the gradients, the largest of each, after a step."""
    sums = ranks.step(own_rows(batch, ranks.context))
    # A bias of keys has no gradient but rounding.
    gradients = [
        (relative_difference(gradient, reference.gradients[name]), name)
        for name, gradient in ranks.gradients()
        if not name.endswith(("qkv.bias", "kv.bias"))
    ]
    return relative_difference(sums, reference.sums), max(gradients)


def _cases(rank, pipeline_ranks, cases):
    """Differences and what else should be true for (schedule, stages a rank, model options, compute options)."""
    context = create(pipeline_ranks)
    results = []
    for schedule, stages_per_rank, options, compute_options in cases:
        config, compute = model_config(**options), ComputeConfig(**compute_options)
        num_microbatches = 2 * pipeline_ranks
        batch = make_batch(2 * num_microbatches)
        reference = Reference(config, batch, compute)
        plan = equal_cut(schedule, config, context, stages_per_rank)
        ranks = Ranks(context, config, plan, num_microbatches, compute=compute)
        worst = differences(ranks, batch, reference)
        first = [gradient.clone() for _, gradient in ranks.gradients()]
        evaluated = ranks.pipeline.evaluate(batch)
        assert (evaluated is not None) == ranks.pipeline.has_loss
        if evaluated is not None:
            torch.testing.assert_close(evaluated, reference.cross_entropy)
            assert not evaluated.requires_grad
        again = differences(ranks, batch, reference)
        assert again == worst
        for _, stages in ranks.pipeline._schedules.values():
            for stage in stages:  # nothing of a step is left, of an evaluation or of training
                received = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
                assert all(info.buffer.is_meta for infos in received for info in infos)
                assert not stage.fwd_cache and not any(stage.bwd_cache.values())
        assert all(torch.equal(a, b) for a, (_, b) in zip(first, ranks.gradients(), strict=True))
        ranks.shared.check_equal()
        owned = torch.tensor(sum(p.parameter.numel() for p in ranks.parameters if not p.is_copy))
        torch.distributed.all_reduce(owned)
        assert owned.item() == sum(gradient.numel() for gradient in reference.gradients.values())
        results.append(worst)
    return results


def check(cases, world_size):
    for results in run_distributed(_cases, world_size, world_size, cases):
        for case, (sums, gradients) in zip(cases, results, strict=True):
            assert sums < 1e-6, case
            assert gradients[0] < 1e-5, (case, gradients)


def test_two_ranks():
    schedules = [(schedule, None, options, {}) for schedule in STAGES_PER_RANK for options in ({}, TIED | LEARNED)]
    deep_decoder = {"encoder_num_layers": 1, "decoder_num_layers": 6}
    cuts = [
        ("interleaved", 5, {"encoder_num_layers": 5, "decoder_num_layers": 1}, {}),  # a stage for every unit
        ("interleaved-zb", 3, deep_decoder | TIED, {}),
        ("zbv", None, deep_decoder, {"recompute_granularity": "full"}),
        ("dualpipev", None, {"encoder_num_layers": 4, "decoder_num_layers": 1}, {"recompute_granularity": "selective"}),
        ("interleaved", 2, {}, {"recompute_granularity": "full"}),
    ]
    check(schedules + cuts, 2)


def test_four_ranks():
    check([(schedule, None, TIED, {}) for schedule in STAGES_PER_RANK], 4)


def _sharded(rank, tensor_ranks, cases):
    context = create(2, tensor_ranks)
    results = []
    for schedule, options, ranks_options in cases:
        config = model_config(**options)
        batch = make_batch(8 * context.dp_size)
        reference = Reference(config, batch, ranks_options.get("compute"))
        ranks = Ranks(context, config, equal_cut(schedule, config, context), 4, **ranks_options)
        worst = differences(ranks, batch, reference)
        ranks.pipeline.evaluate(own_rows(batch, context))
        assert differences(ranks, batch, reference) == worst
        ranks.shared.check_equal()
        results.append(worst)
    return results


def check_sharded(tensor_ranks, cases, of_losses=1e-6, of_gradients=1e-5):
    for results in run_distributed(_sharded, 4, tensor_ranks, cases):
        for case, (sums, gradients) in zip(cases, results, strict=True):
            assert sums < of_losses, case
            assert gradients[0] < of_gradients, (case, gradients)


def test_with_data_parallelism():
    pairs = [
        ("gpipe", "optim_grads"), ("1f1b", "optim"), ("interleaved", "no_shard"), ("interleaved-zb", "optim_grads"),
        ("zbv", "optim_grads_params"), ("dualpipev", "optim"),
    ]  # fmt: skip
    check_sharded(1, [(schedule, TIED, {"strategy": strategy}) for schedule, strategy in pairs])


@pytest.mark.slow
def test_with_every_level_of_data_parallelism():
    levels = ("no_shard", "optim", "optim_grads", "optim_grads_params")
    check_sharded(1, [(schedule, {}, {"strategy": level}) for schedule in STAGES_PER_RANK for level in levels])


def test_with_tensor_parallelism():
    check_sharded(
        2,
        [
            (schedule, options, {"sequence_parallel": parallel})
            for schedule, options, parallel in [
                ("1f1b", TIED, True),
                ("1f1b", LEARNED, False),
                ("interleaved", {}, True),
                ("interleaved-zb", TIED, False),
                ("zbv", TIED | LEARNED, True),
                ("dualpipev", {}, True),
            ]
        ],
    )


def test_low_precision():
    bf16, fp16 = ComputeConfig(bf16=True), ComputeConfig(fp16=True)
    check_sharded(
        1,
        [
            ("1f1b", {}, {"compute": fp16, "strategy": "no_shard"}),
            ("zbv", TIED, {"compute": bf16, "strategy": "no_shard"}),
            ("zbv", TIED, {"compute": bf16, "strategy": "optim_grads_params"}),
            ("interleaved-zb", {}, {"compute": fp16, "strategy": "optim_grads"}),
        ],
        of_losses=1e-3,
        of_gradients=5e-2,
    )
