"""The model divided among tensor-parallel ranks computes what the whole model computes."""

from itertools import combinations

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from megatron.core.config import ComputeConfig, ModelConfig, ParallelConfig
from megatron.core.extensions.score_bias import ScoreBias
from megatron.core.inference.generation import generate
from megatron.core.inference.generation_config import GenerationConfig
from megatron.core.models.T5.special_ids import SpecialIds
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_sharding import shard_t5
from megatron.core.models.T5.t5_stage import T5Stage
from megatron.core.models.T5.t5_units import Units
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import initialize_parameters
from megatron.core.tensor_parallel import IGNORED_LABEL, TensorParallel
from megatron.core.transformer.elementwise import add_dropout, dropout
from tests.distributed import run_distributed

# Options of the model, of the computation, lengths of the batch.
CASES = {
    "t5 v1.1": ({}, {}, (8, 6)),
    "tied": ({"share_embeddings_and_output_weights": True, "activation_function": "relu"}, {}, (8, 6)),
    "odd lengths": ({}, {}, (9, 5)),
    "odd vocabulary": ({"vocab_size": 61}, {}, (8, 6)),
    "odd vocabulary, tied": ({"vocab_size": 61, "share_embeddings_and_output_weights": True}, {}, (7, 7)),
    "biases, LayerNorm, learned positions": (
        {"add_bias_linear": True, "normalization": "LayerNorm", "position_embedding_type": "learned_absolute",
         "max_position_embeddings": 9},
        {"recompute_granularity": "full"},
        (9, 7),
    ),
    "rotary, scaled": (
        {"position_embedding_type": "rope", "scale_attention_scores": True, "activation_function": "gelu"},
        {"attention_backend": "sdpa", "recompute_granularity": "selective"},
        (9, 5),
    ),
    "groups recomputed": ({}, {"recompute_granularity": "full", "recompute_num_layers": 2}, (8, 5)),
    "bias a layer": ({"relative_attention_bias_per_layer": True}, {"recompute_granularity": "full"}, (9, 5)),
}  # fmt: skip


def config(**options):
    sizes = {
        "encoder_num_layers": 3, "decoder_num_layers": 2, "hidden_size": 20, "num_attention_heads": 4, "kv_channels": 6,
        "ffn_hidden_size": 12, "vocab_size": 64, "make_vocab_size_divisible_by": 1,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **options})


def context_of(size, sequence_parallel):
    parallel = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=sequence_parallel)
    context = ParallelContext.create(parallel, torch.device("cpu"))
    return context, TensorParallel.of(context, parallel)


def build(model_config, compute, context=None, parallel=None, units=None, model_class=T5Model, dtype=torch.float64):
    with torch.device("meta"):
        model = model_class(model_config, compute, 1e-2, units, parallel).to(dtype)
    if context is not None:
        shard_t5(model, context)
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=3)
    return model


def batch(vocab_size, lengths):
    generator = torch.Generator().manual_seed(5)
    encoder, decoder, labels = (
        torch.randint(1, vocab_size, (3, n), generator=generator) for n in (lengths[0], *lengths[1:], lengths[1])
    )
    labels[0, 2] = IGNORED_LABEL
    return encoder, decoder, labels


def summed(gradient, sequence_parallel):
    """The whole gradient; under sequence parallelism the ranks hold parts of the sum for replicated parameters."""
    assert isinstance(gradient, DTensor)
    if sequence_parallel and gradient.placements[0].is_replicate():
        torch.distributed.all_reduce(gradient.to_local())
    return gradient.full_tensor()


def run(model, ids, **masks):
    losses = model(*ids, **masks).loss
    losses.total.backward()
    with torch.no_grad():
        logits = model(*ids[:2], **masks).logits
    return [losses.cross_entropy, losses.z_loss, losses.total.detach(), logits]


def masks_of(lengths, kind):
    if kind == "masks":
        return {
            "encoder_mask": torch.arange(lengths[0]) < torch.tensor([[lengths[0]], [4], [6]]),
            "decoder_mask": torch.arange(lengths[1]) < torch.tensor([[3], [lengths[1]], [5]]),
        }
    if kind == "segments":
        return {
            f"{side}_segment_ids": (torch.arange(n) * 2 // n + 1).expand(3, n)
            for side, n in zip(("encoder", "decoder"), lengths, strict=True)
        }
    return {}


def compare(size, sequence_parallel, cases, **sizes):
    context, parallel = context_of(size, sequence_parallel)
    for number, name in enumerate(cases):
        options, compute, lengths = CASES[name]
        model_config, compute = config(**options, **sizes), ComputeConfig(**compute)
        ids = batch(model_config.vocab_size, lengths)
        masks = masks_of(lengths, ("none", "masks", "segments")[number % 3])
        whole, part = build(model_config, compute), build(model_config, compute, context, parallel)
        for found, expected in zip(run(part, ids, **masks), run(whole, ids, **masks), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        expected_gradients = {n: p.grad for n, p in whole.named_parameters()}
        for parameter_name, parameter in part.named_parameters():
            found, expected = summed(parameter.grad, sequence_parallel), expected_gradients[parameter_name]
            for tensor in (found, parameter.detach().full_tensor()):  # zero where it is padded
                assert tensor.count_nonzero() == tensor[tuple(map(slice, expected.shape))].count_nonzero()
            found = found[tuple(map(slice, expected.shape))]
            error = (found - expected).norm() / max(expected.norm(), 1e-6)
            assert error < 1e-12, (name, parameter_name, sequence_parallel, error)


def check_stages(sequence_parallel):
    """Stages one after the other, cut in three ways, are the whole model."""
    model_config, compute = config(share_embeddings_and_output_weights=True), ComputeConfig()
    context, parallel = context_of(2, sequence_parallel)
    encoder_ids, decoder_ids, labels = batch(64, (9, 5))
    inputs = {"encoder_input_ids": encoder_ids, "decoder_input_ids": decoder_ids, "labels": labels}
    losses = build(model_config, compute, context, parallel)(**inputs).loss
    units = Units.of(model_config).all
    for cuts in ([5], [3, 7], units[1:]):
        passed = ()
        for start, end in zip([0, *cuts], [*cuts, len(units)], strict=True):
            stage = build(model_config, compute, context, parallel, units[start:end], T5Stage)
            passed = stage(*passed, **inputs)
            messages = [tensor for tensor in passed if tensor.ndim > 1]
            assert all(tensor.shape[1] in ((5, 3) if sequence_parallel else (9, 5)) for tensor in messages)
        assert all(torch.equal(found, expected) for found, expected in zip(passed, losses, strict=True))


def check_generation(sequence_parallel):
    model_config, compute = config(vocab_size=61), ComputeConfig()
    context, parallel = context_of(2, sequence_parallel)
    ids = batch(61, (9, 5))[0]
    found, expected = (
        generate(model.eval(), ids, SpecialIds(0, 1, 0), GenerationConfig(max_new_tokens=4)).ids
        for model in (build(model_config, compute, context, parallel), build(model_config, compute))
    )
    assert torch.equal(found, expected)


def check_low_precision(sequence_parallel):
    model_config, ids = config(), batch(64, (9, 5))
    context, parallel = context_of(2, sequence_parallel)
    expected = run(build(model_config, ComputeConfig()), ids)
    for flag in ("bf16", "fp16"):
        part = build(model_config, ComputeConfig(**{flag: True}), context, parallel, dtype=torch.float32)
        found = run(part, ids)
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(found[0].double(), expected[0], rtol=3e-2, atol=3e-2)


def _two_ranks(rank):
    for sequence_parallel in (False, True):
        compare(2, sequence_parallel, CASES)
        check_stages(sequence_parallel)
        check_generation(sequence_parallel)
        check_low_precision(sequence_parallel)


def test_two_ranks_equal_one():
    run_distributed(_two_ranks, 2)


def _four_ranks(rank):
    for sequence_parallel in (False, True):
        compare(4, sequence_parallel, ["odd vocabulary", "odd vocabulary, tied", "rotary, scaled"])


def test_four_ranks_equal_one():
    run_distributed(_four_ranks, 4)


def _three_ranks(rank):
    """Neither the feed-forward units nor the vocabulary divide."""
    cases = ["odd vocabulary", "odd vocabulary, tied", "biases, LayerNorm, learned positions", "rotary, scaled"]
    for sequence_parallel in (False, True):
        compare(3, sequence_parallel, cases, num_attention_heads=6, ffn_hidden_size=16)


def test_three_ranks_equal_one():
    run_distributed(_three_ranks, 3)


def dropout_run(model, seed):
    model.zero_grad()
    model.tensor_parallel.seed_dropout(seed)
    losses = model(*batch(64, (9, 5))).loss
    losses.total.backward()
    return [losses.cross_entropy] + [parameter.grad.to_local().clone() for parameter in model.parameters()]


def masks_of_layer(layer, parallel, dtype):
    """What dropout at rate 0.3 makes of ones, replicated and divided activations in turn."""
    ones, zeros = torch.ones(25, 20, dtype=dtype), torch.zeros(25, 20, dtype=dtype)
    attention = layer.self_attention
    attention.o = torch.nn.Identity()
    query, key = (torch.zeros(1, length, 2, 6, dtype=dtype) for length in (80, 6))
    value = 6 * torch.eye(6, dtype=dtype)[None, :, None].expand(1, 6, 2, 6)  # so the result is 6 x probabilities
    masks = []
    for _ in range(2):
        masks += [
            dropout(ones, 0.3),
            parallel.dropout(ones, 0.3, True),
            add_dropout(zeros, ones, 0.3),
            attention.attend(query, key, value, ScoreBias(80, 6)),
            layer.mlp_norm.add(zeros, ones, 0.3)[0],
            parallel.dropout(ones, 0.3, True),
        ]
    return [mask.detach() for mask in masks]


def _dropout(rank, sequence_parallel):
    context, parallel = context_of(2, sequence_parallel)
    # In fp64 dropout is torch's, in fp32 part of the operators of CPUs.
    return [dropout_results(context, parallel, dtype) for dtype in (torch.float64, torch.float32)]


def dropout_results(context, parallel, dtype):
    """Masks, losses and gradients of replicated parameters; recomputation is checked here."""
    options = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
    layer = build(config(**options), ComputeConfig(), context, parallel, dtype=dtype).encoder.layers["0"]
    parallel.seed_dropout(7)
    masks = masks_of_layer(layer, parallel, dtype)
    results = []
    for recompute in (
        {},
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "full", "recompute_num_layers": 2},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    ):
        model = build(config(**options), ComputeConfig(**recompute), context, parallel, dtype=dtype)
        results.append(dropout_run(model, seed=3))
    other_seed = dropout_run(model, seed=4)
    assert not torch.equal(other_seed[0], results[0][0])
    for result in results[1:]:
        assert all(torch.equal(found, expected) for found, expected in zip(result, results[0], strict=True))
    replicated = [
        gradient
        for gradient, parameter in zip(results[0][1:], model.parameters(), strict=True)
        if parameter.placements[0].is_replicate()
    ]
    return masks, results[0][0], replicated


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout(sequence_parallel):
    """Masks of replicated activations are equal on all ranks, of split ones not; recomputation repeats both."""
    for results, others in zip(*run_distributed(_dropout, 2, sequence_parallel), strict=True):
        (masks, losses, replicated), (other_masks, other_losses, other_replicated) = results, others
        assert torch.equal(losses, other_losses)
        for number, (mask, other) in enumerate(zip(masks, other_masks, strict=True)):
            split = sequence_parallel or number % 2 == 1
            assert torch.equal(mask, other) is not split
            assert abs(mask.mean() - 1) < 0.1 and abs((mask * other).mean() - (1 if split else 1 / 0.7)) < 0.15
        assert not any(torch.equal(mask, other) for mask, other in combinations(masks, 2))
        for gradient, other in zip(replicated, other_replicated, strict=True):
            assert torch.equal(gradient, other) is not sequence_parallel


def _collectives(rank):
    counts = {}
    for sequence_parallel in (False, True):
        context, parallel = context_of(2, sequence_parallel)
        model = build(config(), ComputeConfig(), context, parallel)
        with CommDebugMode() as forward:
            losses = model(*batch(64, (8, 6))).loss
        with CommDebugMode() as backward:
            losses.total.backward()
        counts[sequence_parallel] = [
            {str(name).removeprefix("c10d."): count for name, count in mode.get_comm_counts().items()}
            for mode in (forward, backward)
        ]
    return counts


def test_number_of_collectives():
    """An encoder layer 2 + 2, a decoder layer 3 + 3, forward + backward; under sequence parallelism halves of them."""
    blocks = 3 * 2 + 2 * 3
    for counts in run_distributed(_collectives, 2):
        forward, backward = counts[False]
        assert forward == {"allreduce_": blocks + 1, "_allgather_base_": 1}  # both embeddings; the loss
        assert backward == {"allreduce_": blocks + 2}  # encoder output, head
        forward, backward = counts[True]
        assert forward == {
            "_allgather_base_": blocks + 3,  # encoder output, head, loss
            "_reduce_scatter_base_": blocks + 1,  # both embeddings
        }
        assert backward == {"_allgather_base_": blocks + 1, "_reduce_scatter_base_": blocks + 2}
