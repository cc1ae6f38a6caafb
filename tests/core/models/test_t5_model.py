"""Properties of the whole model: padding, packing, recomputation, precision, dropout, construction, first loss."""

import math
from pathlib import Path

import pytest
import torch

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.extensions import cpu_attention, cpu_elementwise
from megatron.core.extensions.attention import separate
from megatron.core.extensions.score_bias import ScoreBias
from megatron.core.models.T5.t5_model import T5Model, recomputation_groups
from megatron.core.parameters import initialize_parameters
from megatron.core.transformer.transformer_layer import DecoderLayer, EncoderLayer
from tests.programs import load_program

SIZES = {
    "encoder_num_layers": 2,
    "decoder_num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 40,
    "vocab_size": 60,
    "make_vocab_size_divisible_by": 16,
}
POSITIONS = ["relative", "learned_absolute", "rope", "none"]
# Backend of attention, dtype and channels of a head, on which the kernels of the backend cpu depend.
COMPUTATIONS = {
    "unfused": ("unfused", torch.float64, 8),
    "sdpa": ("sdpa", torch.float64, 8),
    "cpu": ("cpu", torch.float32, 8),
    "cpu, tiles": ("cpu", torch.float32, 16),
}


def build(z_loss_weight=0.0, dtype=torch.float32, compute=None, **fields):
    with torch.device("meta"):
        model = T5Model(ModelConfig(**{**SIZES, **fields}), compute, z_loss_weight).to(dtype)
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=1)
    return model


def build_for(computation, z_loss_weight=0.0, compute=None, **fields):
    """A model that computes as one of `COMPUTATIONS` says."""
    backend, dtype, channels = COMPUTATIONS[computation]
    compute = ComputeConfig(attention_backend=backend, **(compute or {}))
    return build(z_loss_weight, dtype, compute, kv_channels=channels, **fields)


def ids(*shape, seed=0):
    return torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("position", POSITIONS)
def test_padded_rows_equal_unpadded_rows(position, computation):
    model = build_for(computation, position_embedding_type=position)
    encoder_ids, decoder_ids = ids(1, 9), ids(1, 5)
    alone = model(encoder_ids, decoder_ids)
    padded_encoder, padded_decoder = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)
    padded_encoder[0, :9], padded_decoder[0, :5] = encoder_ids, decoder_ids
    padded_encoder[1], padded_decoder[1] = ids(14, seed=1), ids(8, seed=2)
    padded = model(padded_encoder, padded_decoder, encoder_mask=padded_encoder != 0, decoder_mask=padded_decoder != 0)
    torch.testing.assert_close(padded.logits[0, :5], alone.logits[0])
    torch.testing.assert_close(padded.encoder_output[0, :9], alone.encoder_output[0])


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_packed_loss_and_gradients_equal_separate_rows(computation):
    model = build_for(computation, 0.01)
    rows = [(ids(1, s, seed=s), ids(1, t, seed=t), ids(1, t, seed=t + 9)) for s, t in ((7, 3), (4, 4), (6, 2))]
    for row in rows:
        sum(term.sum() for term in model(*row).loss).backward()
    expected = gradients(model)
    model.zero_grad()
    packed = [torch.nn.functional.pad(torch.cat(parts, dim=1), (0, 2)) for parts in zip(*rows, strict=True)]
    packed[2][:, -2:] = -100
    segments = [
        torch.tensor([[i + 1 for i, row in enumerate(rows) for _ in range(row[side].shape[1])] + [0, 0]])
        for side in (0, 1)
    ]
    output = model(*packed, encoder_segment_ids=segments[0], decoder_segment_ids=segments[1])
    sum(term.sum() for term in output.loss).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_decoder_is_causal_and_encoder_is_not():
    for position in POSITIONS:
        model = build(position_embedding_type=position)
        encoder_ids, decoder_ids = ids(1, 6), ids(1, 6, seed=1)
        changed = decoder_ids.clone()
        changed[0, 4] = (changed[0, 4] + 1) % 60
        before, after = model(encoder_ids, decoder_ids).logits, model(encoder_ids, changed).logits
        assert torch.equal(before[:, :4], after[:, :4])
        assert not torch.allclose(before[:, 4:], after[:, 4:])
        changed = encoder_ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % 60
        assert not torch.allclose(model.encode(encoder_ids)[:, 0], model.encode(changed)[:, 0])


def test_encode_and_decode_equal_forward():
    model = build(position_embedding_type="learned_absolute")
    encoder_ids, decoder_ids = ids(2, 7), ids(2, 4, seed=1)
    encoder_mask = torch.arange(7) < torch.tensor([[7], [5]])
    output = model(encoder_ids, decoder_ids, encoder_mask=encoder_mask)
    encoded = model.encode(encoder_ids, mask=encoder_mask)
    torch.testing.assert_close(encoded, output.encoder_output)
    decoded = model.decode(decoder_ids, encoded, encoder_mask=encoder_mask)
    torch.testing.assert_close(model.logits(decoded), output.logits)


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_changes_no_gradient(granularity, computation):
    dropout = {"hidden_dropout": 0.3, "attention_dropout": 0.0 if computation == "cpu, tiles" else 0.3}
    results = []
    for recompute in (None, granularity):
        model = build_for(computation, 0.01, {"recompute_granularity": recompute}, **dropout)
        calls = []
        for module in model.modules():
            if isinstance(module, EncoderLayer | DecoderLayer):
                module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)
        sum(term.sum() for term in model(ids(2, 9), ids(2, 6, seed=1), ids(2, 6, seed=2)).loss).backward()
        results.append(gradients(model))
        assert len(calls) == (10 if recompute == "full" else 5)
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize(
    ("method", "num_layers", "expected"),
    [
        ("uniform", None, [[0], [1], [2], [3], [4]]),
        ("uniform", 2, [[0, 1], [2, 3], [4]]),
        ("uniform", 9, [[0, 1, 2, 3, 4]]),
        ("block", None, [[0], [1], [2], [3], [4]]),
        ("block", 2, [[0], [1]]),
        ("block", 9, [[0], [1], [2], [3], [4]]),
    ],
)
def test_which_layers_are_recomputed(method, num_layers, expected):
    options = {"recompute_method": method, "recompute_num_layers": num_layers}
    groups = recomputation_groups(ComputeConfig(recompute_granularity="full", **options), 5)
    assert [list(group) for group, recompute in groups if recompute] == expected
    assert [i for group, _ in groups for i in group] == list(range(5))


@pytest.mark.parametrize(
    ("method", "num_layers", "calls"), [("uniform", 2, [2, 2, 2, 2, 2]), ("block", 1, [2, 1, 2, 1, 1])]
)
def test_groups_of_layers_are_recomputed(method, num_layers, calls):
    options = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": num_layers}
    results = []
    for compute in (ComputeConfig(), ComputeConfig(**options)):
        model, counts = build(0.01, compute=compute, hidden_dropout=0.3, attention_dropout=0.3), [0] * 5
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, i=i, counts=counts: counts.__setitem__(i, counts[i] + 1))
        torch.manual_seed(5)
        sum(term.sum() for term in model(ids(2, 9), ids(2, 6, seed=1), ids(2, 6, seed=2)).loss).backward()
        results.append(gradients(model))
    assert counts == calls
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def test_selective_recomputation_keeps_no_scores():
    def largest_saved(recompute):
        compute = ComputeConfig(recompute_granularity=recompute)
        model, sizes = build(compute=compute, position_embedding_type="none"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(ids(1, 200), ids(1, 4))
        return max(sizes)

    assert largest_saved(None) == 2 * 200 * 200
    assert largest_saved("selective") < 2 * 200 * 200


def test_bf16_is_close_to_fp32():
    outputs = {}
    for bf16 in (False, True):
        model = build(1e-4, compute=ComputeConfig(bf16=bf16))
        output = model(ids(4, 40), ids(4, 30, seed=1), ids(4, 30, seed=2))
        (output.loss.total / output.loss.cross_entropy.numel()).backward()
        outputs[bf16] = output, gradients(model)
    (exact, exact_gradients), (rounded, rounded_gradients) = outputs[False], outputs[True]
    assert rounded.encoder_output.dtype == torch.bfloat16 and rounded.loss.cross_entropy.dtype == torch.float32
    torch.testing.assert_close(rounded.loss.cross_entropy.mean(), exact.loss.cross_entropy.mean(), rtol=2e-3, atol=0)
    for name, gradient in exact_gradients.items():
        assert rounded_gradients[name].dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), rounded_gradients[name].flatten(), dim=0)
        assert cosine > 0.99, (name, cosine)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("recompute", [None, "full"])
def test_fp16_trains_close_to_fp32(position, recompute):
    """Losses of some steps under a loss scale; the residual stream is fp32, the encoder output fp16."""
    losses = {}
    for fp16 in (False, True):
        compute = ComputeConfig(fp16=fp16, recompute_granularity=recompute)
        model = build(1e-4, compute=compute, position_embedding_type=position)
        optimizer, scale = torch.optim.AdamW(model.parameters(), lr=3e-3), 2.0**10 if fp16 else 1.0
        batch = ids(4, 21), ids(4, 15, seed=1), ids(4, 15, seed=2)
        mask = torch.arange(21) < torch.tensor([[21], [4], [9], [13]])
        losses[fp16] = []
        for _ in range(8):
            output = model(*batch, encoder_mask=mask)
            loss = output.loss.total[0] / output.loss.cross_entropy.numel()
            (loss * scale).backward()
            for parameter in model.parameters():
                parameter.grad.div_(scale)
            optimizer.step()
            optimizer.zero_grad()
            losses[fp16].append(loss.item())
    assert output.encoder_output.dtype == torch.float16 and output.loss.cross_entropy.dtype == torch.float32
    (hidden,) = model.embedding(batch[0])
    assert model.encoder.layers["0"](hidden, ScoreBias(hidden.shape[1], hidden.shape[1]), None).dtype == torch.float32
    assert losses[True] == pytest.approx(losses[False], rel=2e-3)
    assert losses[True][-1] < losses[True][0] - 0.1


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("backend", "channels"), [("unfused", 8), ("sdpa", 8), ("cpu", 8), ("cpu", 32)])
def test_bf16_parameters_compute_in_bf16_with_every_option(position, backend, channels):
    fields = {"position_embedding_type": position, "normalization": "LayerNorm", "add_bias_linear": True}
    fields["kv_channels"] = channels
    model = build(dtype=torch.bfloat16, compute=ComputeConfig(bf16=True, attention_backend=backend), **fields)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    output = model(ids(2, 9), ids(2, 6, seed=1), encoder_mask=mask)
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()


def dropout_calls(monkeypatch, model, training):
    calls, dropout = [], torch.nn.functional.dropout

    def record(x, p=0.5, training=True, inplace=False):
        if training and p:
            calls.append((tuple(x.shape), p))
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", record)
    record_operators(monkeypatch, calls)
    model.train(training)(ids(2, 9), ids(2, 6, seed=1))
    return calls


def record_operators(monkeypatch, calls):
    """Shape and rate of what the operators of CPUs drop, as of torch's dropout of the same tensors."""

    def of_elementwise(x, p, *_):
        return x.shape, p

    def of_sum(residual, branch, p):
        return branch.shape, p

    def of_norm(residual, branch, weight, epsilon, dtype, p):
        return branch.shape, p

    def of_attention(query, key, value, *_, dropout, **__):
        query, key, _ = separate(query, key, value)
        return (query.shape[0], query.shape[2], query.shape[1], key.shape[1]), dropout

    def record(module, name, dropped):
        operator = getattr(module, name)

        def recorded(*arguments, **options):
            shape, p = dropped(*arguments, **options)
            if p:
                calls.append((tuple(shape), p))
            return operator(*arguments, **options)

        monkeypatch.setattr(module, name, recorded)

    record(cpu_elementwise, "dropout", of_elementwise)
    record(cpu_elementwise, "dropout_add", of_sum)
    record(cpu_elementwise, "add_rms_norm", of_norm)
    record(cpu_attention, "attention", of_attention)


# fp64 has torch's own dropout; LayerNorm has no operator that it is part of.
@pytest.mark.parametrize(
    ("dtype", "normalization"),
    [(torch.float64, "RMSNorm"), (torch.float32, "RMSNorm"), (torch.float32, "LayerNorm")],
)
def test_dropout_places(monkeypatch, dtype, normalization):
    model = build(dtype=dtype, hidden_dropout=0.1, attention_dropout=0.2, normalization=normalization)
    n, h, f = 2, 32, 40
    attention = lambda q, k: [((2, n, q, k), 0.2), ((2, q, h), 0.1)]  # noqa: E731
    feed_forward = lambda length: [((2, length, f), 0.1), ((2, length, h), 0.1)]  # noqa: E731
    expected = [((2, 9, h), 0.1), ((2, 6, h), 0.1)]  # the embeddings of both stacks
    expected += 2 * [*attention(9, 9), *feed_forward(9)] + [((2, 9, h), 0.1)]  # the last one after the final norm
    expected += 3 * [*attention(6, 6), *attention(6, 9), *feed_forward(6)] + [((2, 6, h), 0.1)]
    with monkeypatch.context() as patches:
        assert dropout_calls(patches, model, training=True) == expected
    with monkeypatch.context() as patches:
        assert dropout_calls(patches, model, training=False) == []


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_evaluation_is_free_of_dropout(computation):
    dropped = build_for(computation, hidden_dropout=0.5, attention_dropout=0.5).eval()
    expected = build_for(computation)(ids(2, 9), ids(2, 6)).logits
    torch.testing.assert_close(dropped(ids(2, 9), ids(2, 6)).logits, expected)
    assert not torch.allclose(dropped.train()(ids(2, 9), ids(2, 6)).logits, expected, atol=0.1)


def test_int32_ids_are_accepted():
    model = build()
    batch = ids(2, 9), ids(2, 6, seed=1), ids(2, 6, seed=2)
    narrow = model(*(tensor.int() for tensor in batch)).loss.cross_entropy
    assert torch.equal(narrow, model(*batch).loss.cross_entropy)


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_are_not_views(tied):
    """FSDP2 hooks what its modules return, and warns that an in-place operation on a view drops the hook."""
    model = build(share_embeddings_and_output_weights=tied)
    output = model(ids(2, 9), ids(2, 6), ids(2, 6))
    outputs = [*output.loss, output.encoder_output, model(ids(2, 9), ids(2, 6)).logits]
    assert not any(tensor._is_view() for tensor in outputs)


def test_sequence_beyond_the_learned_positions_is_refused():
    model = build(position_embedding_type="learned_absolute", max_position_embeddings=8)
    model(ids(1, 8), ids(1, 8))
    with pytest.raises(UserError, match="--max-position-embeddings is 8, but a sequence has 9 tokens"):
        model(ids(1, 8), ids(1, 9))


def test_meta_device_build_keeps_nothing_but_parameters():
    for position in POSITIONS:
        with torch.device("meta"):
            model = T5Model(ModelConfig(**SIZES, position_embedding_type=position))
        assert not list(model.buffers())
        tensors = [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
        assert not tensors
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_first_loss(tied):
    """T5X's initialisation gives logits of unit variance, and a random label then costs ln V + 1/2 on average.

    A tied head adds the score of the input token, whose embedding is still in the residual stream, the more the fewer
    layers there are.
    """
    activation = "relu" if tied else "gated-gelu"
    model = build(
        decoder_num_layers=6, hidden_size=256, kv_channels=64, num_attention_heads=4, ffn_hidden_size=512,
        vocab_size=4096, share_embeddings_and_output_weights=tied, activation_function=activation,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, 4096, (16, 64), generator=generator)
    encoder_ids = torch.randint(2, 4096, (16, 64), generator=generator)
    decoder_ids = torch.nn.functional.pad(labels[:, :-1], (1, 0))
    with torch.no_grad():
        loss = model(encoder_ids, decoder_ids, labels).loss.cross_entropy.mean().item()
        logits = model(encoder_ids, decoder_ids).logits
    assert abs(logits.std().item() - 1.0) < 0.05
    assert abs(loss - (math.log(4096) + 0.5)) < (0.25 if tied else 0.1)


def load_mini_t5():
    path = Path(__file__).parents[3] / "examples" / "mini_t5.py"
    return load_program(path), path


def copy_into_mini(model, mini):
    """Our weights into the model of one page; fused rows are (head, matrix, channel)."""
    n, d = model.config.num_attention_heads, model.config.kv_channels
    mini.embedding.data.copy_(model.embedding.word_embeddings.weight)
    for ours, theirs in ((model.encoder, mini.encoder), (model.decoder, mini.decoder)):
        theirs.bias.table.data.copy_(ours.relative_attention_bias.weight)
        theirs.norm.weight.data.copy_(ours.final_norm.weight)
        for source, target in zip(ours.layers.values(), theirs.layers, strict=True):
            norms = [module.weight for name, module in source.named_children() if name.endswith("norm")]
            for norm, weight in zip(target.norms, norms, strict=True):
                norm.weight.data.copy_(weight)
            qkv = source.self_attention.qkv.weight.unflatten(0, (n, 3, d))
            for i, name in enumerate("qkv"):
                getattr(target.self_attention, name).data.copy_(qkv[:, i])
            target.self_attention.o.data.copy_(source.self_attention.o.weight.unflatten(1, (n, d)))
            if target.cross_attention is not None:
                kv = source.cross_attention.kv.weight.unflatten(0, (n, 2, d))
                target.cross_attention.q.data.copy_(source.cross_attention.q.weight.unflatten(0, (n, d)))
                target.cross_attention.k.data.copy_(kv[:, 0])
                target.cross_attention.v.data.copy_(kv[:, 1])
                target.cross_attention.o.data.copy_(source.cross_attention.o.weight.unflatten(1, (n, d)))
            target.wi.data.copy_(source.mlp.wi.weight)
            target.wo.data.copy_(source.mlp.wo.weight)


def test_mini_t5_gives_the_same_logits():
    module, path = load_mini_t5()
    source = path.read_text()
    assert len(source.splitlines()) < 150 and "megatron" not in source and "distributed" not in source
    model = build(
        encoder_num_layers=2, decoder_num_layers=2, hidden_size=module.HIDDEN, num_attention_heads=module.HEADS,
        kv_channels=module.HEAD_DIM, ffn_hidden_size=module.INNER, vocab_size=module.VOCAB,
        activation_function="relu", share_embeddings_and_output_weights=True,
    )  # fmt: skip
    with torch.no_grad():  # norm weights start at 1, which would hide a mistake
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    mini = module.MiniT5()
    copy_into_mini(model, mini)
    encoder_ids, decoder_ids = ids(2, 180), ids(2, 150, seed=1)
    with torch.no_grad():
        expected = model(encoder_ids, decoder_ids).logits
        torch.testing.assert_close(mini(encoder_ids, decoder_ids), expected, rtol=1e-4, atol=1e-4)


def test_mini_t5_demonstration_learns(capsys):
    load_mini_t5()[0].main()
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith("step 50") and last.endswith("b'<for inviting=last>'")
