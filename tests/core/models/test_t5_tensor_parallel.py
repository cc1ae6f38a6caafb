"""The model divided among tensor-parallel ranks computes what the whole model computes."""

import torch
from torch.distributed.tensor import DTensor

from megatron.core.config import ComputeConfig, ModelConfig, ParallelConfig
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_sharding import shard_t5
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import initialize_parameters
from megatron.core.tensor_parallel import IGNORED_LABEL, TensorParallel
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


def build(model_config, compute, context=None, parallel=None, units=None, model_class=T5Model):
    with torch.device("meta"):
        model = model_class(model_config, compute, 1e-2, units, parallel).double()
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
    (losses.cross_entropy.sum() + losses.z_loss.sum()).backward()
    with torch.no_grad():
        logits = model(*ids[:2], **masks).logits
    return [losses.cross_entropy.detach(), losses.z_loss.detach(), logits]


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


def _compare_with_one_process(rank, size):
    for sequence_parallel in (False, True):
        context, parallel = context_of(size, sequence_parallel)
        for number, (name, (options, compute, lengths)) in enumerate(CASES.items()):
            model_config, compute = config(**options), ComputeConfig(**compute)
            ids = batch(model_config.vocab_size, lengths)
            masks = masks_of(lengths, ("none", "masks", "segments")[number % 3])
            whole, part = build(model_config, compute), build(model_config, compute, context, parallel)
            for found, expected in zip(run(part, ids, **masks), run(whole, ids, **masks), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
            expected_gradients = {n: p.grad for n, p in whole.named_parameters()}
            for parameter_name, parameter in part.named_parameters():
                found, expected = summed(parameter.grad, sequence_parallel), expected_gradients[parameter_name]
                if len(found) > len(expected):  # rows that pad the vocabulary
                    assert found[len(expected) :].eq(0).all()
                    assert parameter.full_tensor()[len(expected) :].eq(0).all()
                    found = found[: len(expected)]
                error = (found - expected).norm() / max(expected.norm(), 1e-6)
                assert error < 1e-12, (name, parameter_name, sequence_parallel, error)


def test_losses_logits_and_gradients_equal_those_of_one_process():
    run_distributed(_compare_with_one_process, 2, 2)
