"""Logits, loss and every gradient equal those of `transformers` with the same weights, for each family.

Runs where the package transformers is installed.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import initialize_parameters
from megatron.core.tensor_parallel import IGNORED_LABEL
from megatron.core.transformer.relative_position_bias import relative_position_bucket

pytest.importorskip("transformers")
from transformers.models.t5.modeling_t5 import T5Attention

from tests.huggingface import FAMILIES, copy_weights, huggingface_model, in_their_names

# Largest ||ours - theirs|| / ||theirs||.
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}
# Of the norm of all gradients: one that vanishes (a query with identical keys) consists of rounding alone.
ROUNDING = 1e-7

# Backends of ours and theirs, channels of a head if its kernel depends on them.
BACKENDS = {
    "unfused": ("unfused", "eager", None),
    "sdpa": ("sdpa", "sdpa", None),
    "cpu": ("cpu", "eager", None),
    "cpu, tiles": ("cpu", "eager", 16),
}
DISTANCES = torch.arange(-150, 151)
LENGTHS = st.lists(st.tuples(st.integers(2, 40), st.integers(3, 30)), min_size=1, max_size=3)
SHAPE = {
    "encoder_num_layers": 2, "decoder_num_layers": 1, "hidden_size": 60, "num_attention_heads": 3, "kv_channels": 9,
    "ffn_hidden_size": 77, "vocab_size": 71, "make_vocab_size_divisible_by": 1, "relative_attention_num_buckets": 9,
    "relative_attention_max_distance": 33,
}  # fmt: skip


@st.composite
def tables(draw):
    """Fields of `ModelConfig` of the relative position bias."""
    buckets = draw(st.integers(4, 33))
    max_distance = draw(st.integers(buckets // 2 + 1, 150))
    return {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": max_distance}


@st.composite
def shapes(draw):
    """Fields of `ModelConfig`: sizes that fit nothing."""
    return {
        "encoder_num_layers": draw(st.integers(1, 3)),
        "decoder_num_layers": draw(st.integers(1, 3)),
        "hidden_size": draw(st.integers(8, 29)),
        "num_attention_heads": draw(st.integers(1, 4)),
        "kv_channels": draw(st.integers(2, 9)),
        "ffn_hidden_size": draw(st.integers(8, 29)),
        "vocab_size": draw(st.integers(7, 71)),
        "make_vocab_size_divisible_by": draw(st.sampled_from([1, 1, 8])),
        **draw(tables().filter(lambda table: not differing_buckets(table))),
    }


def differing_buckets(table):
    """Pairs of a distance and whether it is the encoder's for which our bucket is not theirs."""
    sizes = {
        "num_buckets": table["relative_attention_num_buckets"],
        "max_distance": table["relative_attention_max_distance"],
    }
    found = []
    for bidirectional in (True, False):
        ours = relative_position_bucket(DISTANCES, bidirectional=bidirectional, **sizes)
        theirs = T5Attention._relative_position_bucket(DISTANCES, bidirectional=bidirectional, **sizes)
        found += [(distance, bidirectional) for distance in DISTANCES[ours != theirs].tolist()]
    return found


@settings(deadline=None)
@given(tables())
def test_buckets_differ_only_where_they_open(table):
    """There theirs depends on how a float32 logarithm is rounded, and ours is exact."""
    for distance, bidirectional in differing_buckets(table):
        buckets = table["relative_attention_num_buckets"] // (2 if bidirectional else 1)
        exact = buckets // 2
        opened = math.log(abs(distance) / exact) / math.log(table["relative_attention_max_distance"] / exact)
        opened *= buckets - exact
        assert abs(opened - round(opened)) < 1e-9


def pair(family, config, compute=None, attention="eager", seed=1):
    """Our model and theirs with its weights."""
    ours = T5Model(config, compute or ComputeConfig())
    initialize_parameters(ours, seed=seed)
    theirs = huggingface_model(family, config, attention)
    copy_weights(ours, theirs)
    return ours, theirs


def random_ids(config, seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, config.vocab_size, (1, length), generator=generator)[0] for length in lengths]


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def shifted(labels):
    """Decoder input of a row of labels."""
    return F.pad(labels[:-1], (1, 0))


class Examples:
    """Inputs and labels of a few examples, as a padded batch and packed into one row."""

    def __init__(self, config, lengths, seed):
        self.inputs = random_ids(config, seed, *(length for length, _ in lengths))
        self.labels = random_ids(config, seed + 1, *(length for _, length in lengths))
        self.labels[0][0] = IGNORED_LABEL  # also what is no padding may be left out
        self.num_targets = sum(int((labels != IGNORED_LABEL).sum()) for labels in self.labels)
        self.decoder_inputs = [shifted(labels.clamp(min=0)) for labels in self.labels]

    def batch(self):
        """A row each: ids, decoder ids and labels, and the two masks."""
        ids = padded(self.inputs, 0), padded(self.decoder_inputs, 0), padded(self.labels, IGNORED_LABEL)
        masks = (padded([torch.ones(len(row)) for row in rows], 0).bool() for rows in (self.inputs, self.labels))
        return ids, dict(zip(("encoder_mask", "decoder_mask"), masks, strict=True))

    def packed(self, padding):
        """One row, padded at its end: ids, decoder ids and labels, and the segment ids of both sides."""

        def joined(rows, value):
            return F.pad(torch.cat(rows), (0, padding), value=value)[None]

        def segments(rows):
            return joined([torch.full((len(row),), number) for number, row in enumerate(rows, 1)], 0)

        ids = joined(self.inputs, 0), joined(self.decoder_inputs, 0), joined(self.labels, IGNORED_LABEL)
        return ids, {
            "encoder_segment_ids": segments(self.inputs),
            "decoder_segment_ids": segments(self.labels),
        }

    def rows_of(self, batched):
        """The real positions `[tokens, ...]` of a result `[b, t, ...]` of the padded batch, in the packed order."""
        return torch.cat([row[: len(labels)] for row, labels in zip(batched, self.labels, strict=True)])

    def rows_of_packed(self, packed):
        """The same of a result `[1, t, ...]` of the packed row."""
        return packed[0, : sum(map(len, self.labels))]


class Result:
    """Of one model: logits `[tokens, V]` of the real positions, loss, gradients by their names."""

    def __init__(self, logits, loss, gradients):
        self.logits = logits.detach().float()
        self.loss = loss.detach().float()
        self.gradients = {name: gradient.float() for name, gradient in gradients}

    @property
    def whole_gradient(self):
        return torch.cat([self.gradients[name].flatten() for name in sorted(self.gradients)])


def run_ours(model, examples, packing=False):
    """The mean loss of our model, whose logits come from a second pass."""
    ids, masks = examples.packed(padding=3) if packing else examples.batch()
    loss = model(*ids, **masks).loss.total[0] / examples.num_targets
    loss.backward()
    with torch.no_grad():
        logits = model(*ids[:2], **masks).logits
    logits = examples.rows_of_packed(logits) if packing else examples.rows_of(logits)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Result(logits, loss, in_their_names(model.config, gradients))


def run_theirs(model, examples):
    """Always on a row an example: they know no packed rows."""
    (ids, decoder_ids, labels), masks = examples.batch()
    mask = masks["encoder_mask"].long()
    output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, labels=labels)
    output.loss.backward()
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return Result(examples.rows_of(output.logits), output.loss, gradients)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=4, derandomize=True)  # of 1,824 random cases two were rounded by 1.5e-5
@given(
    shape=shapes(),
    lengths=LENGTHS,
    packing=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_logits_loss_and_gradients(family, backends, shape, lengths, packing, seed):
    """Of padded rows, and of one packed row against its examples apart."""
    backend, their_backend, channels = BACKENDS[backends]
    config = ModelConfig(**{**shape, "kv_channels": channels or shape["kv_channels"]}, **FAMILIES[family])
    examples = Examples(config, lengths, seed)
    ours, theirs = pair(family, config, ComputeConfig(attention_backend=backend), their_backend, seed)
    found, expected = run_ours(ours, examples, packing), run_theirs(theirs, examples)
    limit = LIMITS["fp32"]
    assert relative_error(found.logits, expected.logits) < limit
    assert relative_error(found.loss, expected.loss) < limit
    negligible = ROUNDING * expected.whole_gradient.norm()
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference = (found.gradients[name] - gradient).norm()
        assert difference < max(limit * gradient.norm(), negligible), (name, difference, gradient.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(family):
    """Both sides in bf16. Single gradients are rounded by more than the limit: they are as near to fp32 as theirs."""
    config = ModelConfig(**SHAPE, **FAMILIES[family])
    examples = Examples(config, [(40, 30), (17, 23), (31, 12)], seed=1)
    ours = T5Model(config, ComputeConfig(bf16=True))
    initialize_parameters(ours, seed=1)
    ours.to(torch.bfloat16).float()  # weights that both have
    theirs, exact = (huggingface_model(family, config) for _ in range(2))
    for model in (theirs, exact):
        copy_weights(ours, model)
    found, expected = run_ours(ours, examples, packing=True), run_theirs(theirs.to(torch.bfloat16), examples)
    limit, exact = LIMITS["bf16"], run_theirs(exact, examples)
    assert relative_error(found.logits, expected.logits) < limit
    assert relative_error(found.loss, expected.loss) < limit
    # What is left between two roundings of one gradient is the sum of both errors.
    of_theirs = relative_error(expected.whole_gradient, exact.whole_gradient)
    assert relative_error(found.whole_gradient, exact.whole_gradient) < min(limit, 1.1 * of_theirs)
    for name, gradient in exact.gradients.items():
        of_theirs = relative_error(expected.gradients[name], gradient)
        assert relative_error(found.gradients[name], gradient) < 2 * max(limit, of_theirs), name
