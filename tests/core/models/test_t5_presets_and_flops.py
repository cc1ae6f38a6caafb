import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.models.T5.t5_flops import model_flops_per_sequence, training_flops_per_sequence
from megatron.core.models.T5.t5_huggingface import correspondences
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_presets import PRESETS

# Published counts where there are any; the mT5 rows are the v1.1 sizes with 250,112 rows in embedding and head, UMT5's
# have 256,384 and a bias table a layer.
PARAMETERS = {
    "t5-v1_0-small": 60_506_624,
    "t5-v1_0-base": 222_903_552,
    "t5-v1_0-large": 737_668_096,
    "t5-v1_0-3b": 2_851_598_336,
    "t5-v1_0-11b": 11_307_321_344,
    "t5-v1_1-small": 76_961_152,
    "t5-v1_1-base": 247_577_856,
    "t5-v1_1-large": 783_150_080,
    "t5-v1_1-xl": 2_849_757_184,
    "t5-v1_1-xxl": 11_135_332_352,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "umt5-small": 306_601_984,
    "umt5-base": 592_043_520,
    "umt5-xl": 3_768_356_864,
    "umt5-xxl": 12_972_531_712,
    "ul2-20b": 19_459_613_696,
}
PADDED_VOCABULARIES = {"mt5": 250112, "umt5": 256384}


def test_parameter_counts_of_the_presets():
    counts = {}
    for name, fields in PRESETS.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in T5Model(ModelConfig(**fields)).parameters())
    assert counts == PARAMETERS


def test_presets_name_fields_and_pad_the_vocabulary_as_published():
    for name, fields in PRESETS.items():
        config = ModelConfig(**fields)
        assert config.padded_vocab_size == PADDED_VOCABULARIES.get(name.split("-")[0], 32128)
        tied = name.startswith(("t5-v1_0", "ul2"))
        assert config.scale_logits is config.share_embeddings_and_output_weights is tied
        assert config.hidden_dropout == (0.1 if name.startswith("t5-v1_0") else 0.0)


def test_presets_have_the_tensors_of_transformers():
    """Every tensor of every preset is one of transformers' model of that family and size, without any memory."""
    pytest.importorskip("transformers")
    from tests.huggingface import huggingface_model

    for name, fields in PRESETS.items():
        config = ModelConfig(**fields)
        with torch.device("meta"):
            ours = {name: parameter.shape for name, parameter in T5Model(config).named_parameters()}
            theirs = huggingface_model(name.rsplit("-", 1)[0], config)
        expected = {name: parameter.shape for name, parameter in theirs.named_parameters()}
        for correspondence in correspondences(config):
            with torch.device("meta"):
                parts = correspondence.split(torch.empty(ours.pop(correspondence.name)))
            for source, part in zip(correspondence.sources, parts, strict=True):
                assert part.shape == expected.pop(source), (name, source)
        assert not ours and not expected, name


@pytest.mark.parametrize(
    "name, tera", [("small", 0.106), ("base", 0.426), ("large", 1.468), ("xl", 5.346), ("xxl", 20.90)]
)
def test_training_flops_of_v1_1_at_512_and_114(name, tera):
    flops = training_flops_per_sequence(ModelConfig(**PRESETS[f"t5-v1_1-{name}"]), 512, 114)
    assert flops == pytest.approx(tera * 1e12, rel=5e-3)


@settings(deadline=None, max_examples=12)
@given(
    activation=st.sampled_from(["relu", "gelu", "gated-gelu", "gated-silu"]),
    layers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 20)),
    tied=st.booleans(),
    bias_per_layer=st.booleans(),
    lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_flops_equal_torchs_counter(activation, layers, widths, tied, bias_per_layer, lengths):
    config = ModelConfig(
        encoder_num_layers=layers[0],
        decoder_num_layers=layers[1],
        hidden_size=12,
        num_attention_heads=widths[0],
        kv_channels=widths[1],
        ffn_hidden_size=widths[2],
        activation_function=activation,
        share_embeddings_and_output_weights=tied,
        relative_attention_bias_per_layer=bias_per_layer,
        vocab_size=20,
        make_vocab_size_divisible_by=8,
    )
    batch = 2
    with torch.device("meta"):
        model = T5Model(config, ComputeConfig(attention_backend="unfused"))
        encoder_ids, decoder_ids = (torch.zeros(batch, length, dtype=torch.long) for length in lengths)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(encoder_ids, decoder_ids, decoder_ids)
    with FlopCounterMode(display=False) as training:
        model(encoder_ids, decoder_ids, decoder_ids).loss.total.backward()
    assert forward.get_total_flops() == batch * model_flops_per_sequence(config, *lengths)
    assert training.get_total_flops() == batch * training_flops_per_sequence(config, *lengths)
