"""Initial values: the distribution of every logical matrix, and the same values on every layout."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.core.config import ModelConfig
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import (
    INIT_BLOCK_ROWS,
    initialize_parameters,
    local_slice,
    local_tensor,
    named_parameter_specs,
)

H, N, D, F, V, BUCKETS = 256, 4, 32, 320, 1000, 32


def build(seed=0, initialize=True, **fields):
    config = ModelConfig(
        **{
            "encoder_num_layers": 1, "decoder_num_layers": 2, "hidden_size": H, "num_attention_heads": N,
            "kv_channels": D, "ffn_hidden_size": F, "vocab_size": V, "make_vocab_size_divisible_by": 8, **fields,
        }
    )  # fmt: skip
    with torch.device("meta"):
        model = T5Model(config)
    if initialize:
        model.to_empty(device="cpu")
        initialize_parameters(model, seed)
    return model


def test_the_number_of_threads_changes_no_value():
    threads = torch.get_num_threads()
    try:
        models = []
        for count in (1, 3):
            torch.set_num_threads(count)
            models.append(build(hidden_size=520, vocab_size=1100))  # blocks that torch itself would divide
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second), name
        assert first.requires_grad and first.is_leaf


def logical_matrices(model):
    """(parameter name, matrix name) -> its values."""
    parameters = dict(model.named_parameters())
    for name, spec in named_parameter_specs(model).items():
        index = spec.matrix_of_rows(0, parameters[name].shape[0])
        for i, matrix in enumerate(spec.matrices):
            yield (name, matrix), parameters[name].detach()[index == i]


def expected_std(name, matrix, scaled=False):
    """T5X's standard deviations, by the ends of the names."""
    if matrix == "q" or name.endswith("cross_attention.q.weight"):
        return H**-0.5 if scaled else (H * D) ** -0.5
    table = {
        "word_embeddings.weight": 1.0,
        "position_embeddings.weight": 1.0,
        "qkv.weight": H**-0.5,
        "kv.weight": H**-0.5,
        "o.weight": (N * D) ** -0.5,
        "wi.weight": H**-0.5,
        "wo.weight": F**-0.5,
        "lm_head.weight": H**-0.5,
        "relative_attention_bias.weight": (2 / (N + BUCKETS)) ** 0.5,
    }
    return next(std for end, std in table.items() if name.endswith(f".{end}") or name == end)


def is_constant(name):
    return "norm" in name or (name.endswith("bias") and "relative" not in name)


@pytest.mark.parametrize(
    "fields", [{}, {"scale_attention_scores": True, "position_embedding_type": "learned_absolute"}]
)
def test_every_logical_matrix_has_t5xs_standard_deviation(fields):
    for (name, matrix), values in logical_matrices(build(**fields)):
        if is_constant(name):
            assert values.eq(1.0).all(), name
            continue
        std = expected_std(name, matrix, scaled=bool(fields))
        # Five standard errors of an estimated deviation and of a mean.
        assert abs(values.std().item() / std - 1) < 5 / (2 * values.numel()) ** 0.5, (name, matrix)
        assert abs(values.mean().item()) < 5 * std / values.numel() ** 0.5, (name, matrix)
        highest = values.abs().max().item() / std
        if "mlp" in name or "lm_head" in name:
            assert 2.1 < highest <= 2 / 0.87962566 + 1e-5, name  # truncated at two deviations of the parent normal
        elif "relative" in name:
            assert highest <= 3**0.5 + 1e-5, name  # uniform
        else:
            assert highest > 3.0, name


def test_biases_start_at_zero_and_norms_at_one():
    model = build(add_bias_linear=True, normalization="LayerNorm")
    for (name, _), values in logical_matrices(model):
        if is_constant(name):
            assert values.eq(0.0 if name.endswith("bias") else 1.0).all(), name
    biases = [name for name, _ in model.named_parameters() if name.endswith(("wi.bias", "qkv.bias"))]
    assert len(biases) == 6


def test_init_method_std():
    for (name, matrix), values in logical_matrices(build(init_method_std=0.02)):
        if is_constant(name):
            continue
        layers = 1 if name.startswith("encoder") else 2
        residual = name.endswith((".o.weight", ".wo.weight"))
        std = 0.02 / (2 * layers) ** 0.5 if residual else 0.02
        assert abs(values.std().item() / std - 1) < 5 / (2 * values.numel()) ** 0.5, (name, matrix)


def test_logical_matrices_of_fused_projections():
    specs = named_parameter_specs(build(initialize=False))
    assert specs["encoder.layers.0.self_attention.qkv.weight"].matrices == ("q", "k", "v")
    assert specs["decoder.layers.1.cross_attention.kv.weight"].matrices == ("k", "v")
    assert specs["encoder.layers.0.self_attention.qkv.weight"].block == D
    assert specs["encoder.layers.0.mlp.wi.weight"].matrix_of_rows(0, 4).tolist() == [0, 1, 0, 1]
    assert specs["decoder.layers.1.cross_attention.kv.weight"].matrix_of_rows(D - 1, 3).tolist() == [0, 1, 1]


def test_weight_decay_is_for_matrices_only():
    fields = {"add_bias_linear": True, "normalization": "LayerNorm"}
    without = {
        name
        for position in ("relative", "learned_absolute")
        for name, spec in named_parameter_specs(
            build(initialize=False, position_embedding_type=position, **fields)
        ).items()
        if not spec.weight_decay
    }
    ends = ("norm.weight", ".bias", "relative_attention_bias.weight", "position_embeddings.weight")
    assert without and all(name.endswith(ends) for name in without)
    assert "embedding.word_embeddings.weight" not in without


def test_seed_and_name_decide_the_values():
    first, again, other = build(seed=7), build(seed=7), build(seed=8)
    for (name, parameter), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(parameter, same)
        assert is_constant(name) or not torch.equal(parameter, different)
    layers = first.blocks[-2:]
    assert not torch.equal(layers[0].mlp.wi.weight, layers[1].mlp.wi.weight)
    block = first.embedding.word_embeddings.weight[:INIT_BLOCK_ROWS]
    assert not torch.equal(block, first.embedding.word_embeddings.weight[INIT_BLOCK_ROWS : 2 * INIT_BLOCK_ROWS])


@pytest.mark.parametrize(("world", "rank"), [(2, 1), (3, 0), (5, 4), (6, 2), (7, 6)])
def test_a_ranks_rows_equal_the_rows_of_the_whole(world, rank):
    """A rank of a world that needs no other process: FSDP2 shards on torch's fake process group.

    Each world has another size: torch keeps meshes in its caches, which take two of a size for the same one.
    """
    whole = dict(build(seed=3).named_parameters())
    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        model = build(initialize=False)
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.blocks:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        initialize_parameters(model, seed=3)
        for name, parameter in model.named_parameters():
            start, count = local_slice(parameter, 0)
            assert count <= -(-parameter.shape[0] // world)
            assert torch.equal(local_tensor(parameter)[:count], whole[name][start : start + count]), name
    finally:
        torch.distributed.destroy_process_group()
