"""Logits and loss equal Hugging Face's T5 with the same weights. Runs where the package transformers is installed."""

import pytest
import torch

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import initialize_parameters

transformers = pytest.importorskip("transformers")

SIZES = {
    "encoder_num_layers": 2,
    "decoder_num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 3,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "vocab_size": 96,
    "make_vocab_size_divisible_by": 32,
}


def split(fused, heads, names, head_dim):
    """Rows `(head, name, d)` to one matrix a name."""
    parts = fused.unflatten(0, (heads, len(names), head_dim)).unbind(1)
    return {name: part.flatten(0, 1) for name, part in zip(names, parts, strict=True)}


def to_huggingface(model):
    """Our parameters under Hugging Face's names."""
    config, ours, theirs = model.config, dict(model.named_parameters()), {}
    heads, head_dim = config.num_attention_heads, config.kv_channels
    for stack, layers in (("encoder", config.encoder_num_layers), ("decoder", config.decoder_num_layers)):
        theirs[f"{stack}.final_layer_norm.weight"] = ours[f"{stack}.final_norm.weight"]
        bias = ours[f"{stack}.relative_attention_bias.weight"].T
        theirs[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
        for i in range(layers):
            source, target = f"{stack}.layers.{i}", f"{stack}.block.{i}.layer"
            qkv = split(ours[f"{source}.self_attention.qkv.weight"], heads, "qkv", head_dim)
            qkv["o"] = ours[f"{source}.self_attention.o.weight"]
            theirs |= {f"{target}.0.SelfAttention.{name}.weight": weight for name, weight in qkv.items()}
            theirs[f"{target}.0.layer_norm.weight"] = ours[f"{source}.self_attention_norm.weight"]
            last = 1
            if stack == "decoder":
                last = 2
                cross = split(ours[f"{source}.cross_attention.kv.weight"], heads, "kv", head_dim)
                cross["q"] = ours[f"{source}.cross_attention.q.weight"]
                cross["o"] = ours[f"{source}.cross_attention.o.weight"]
                theirs |= {f"{target}.1.EncDecAttention.{name}.weight": weight for name, weight in cross.items()}
                theirs[f"{target}.1.layer_norm.weight"] = ours[f"{source}.cross_attention_norm.weight"]
            theirs[f"{target}.{last}.layer_norm.weight"] = ours[f"{source}.mlp_norm.weight"]
            wi = ours[f"{source}.mlp.wi.weight"]
            if config.gated:
                theirs[f"{target}.{last}.DenseReluDense.wi_0.weight"] = wi[0::2]
                theirs[f"{target}.{last}.DenseReluDense.wi_1.weight"] = wi[1::2]
            else:
                theirs[f"{target}.{last}.DenseReluDense.wi.weight"] = wi
            theirs[f"{target}.{last}.DenseReluDense.wo.weight"] = ours[f"{source}.mlp.wo.weight"]
    return {name: weight.detach().clone() for name, weight in theirs.items()}


def huggingface_model(model):
    config, tied = model.config, model.config.share_embeddings_and_output_weights
    hf_config = transformers.T5Config(
        vocab_size=config.padded_vocab_size,
        d_model=config.hidden_size,
        d_kv=config.kv_channels,
        d_ff=config.ffn_hidden_size,
        num_heads=config.num_attention_heads,
        num_layers=config.encoder_num_layers,
        num_decoder_layers=config.decoder_num_layers,
        feed_forward_proj=config.activation_function,
        dropout_rate=0.0,
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )
    theirs = transformers.T5ForConditionalGeneration(hf_config).eval()
    embedding = model.embedding.word_embeddings.weight.detach().clone()
    # transformers 5 ties the head whatever the config says, so it is untied by hand.
    head = embedding if model.lm_head is None else model.lm_head.weight.detach().clone()
    theirs.shared.weight.data.copy_(embedding)
    theirs.encoder.embed_tokens = theirs.decoder.embed_tokens = theirs.shared
    theirs.lm_head.weight = torch.nn.Parameter(head)
    result = theirs.load_state_dict(to_huggingface(model), strict=False)
    assert not result.unexpected_keys
    assert {name.rsplit(".", 2)[-2] for name in result.missing_keys} <= {"shared", "embed_tokens", "lm_head"}
    return theirs


@pytest.mark.parametrize("backend", ["unfused", "sdpa"])
@pytest.mark.parametrize("activation, tied", [("relu", True), ("gated-gelu", False), ("gated-silu", False)])
def test_logits_and_loss(activation, tied, backend):
    config = ModelConfig(**SIZES, activation_function=activation, share_embeddings_and_output_weights=tied)
    ours = T5Model(config, ComputeConfig(attention_backend=backend)).eval()
    initialize_parameters(ours, seed=1)
    theirs = huggingface_model(ours)
    generator = torch.Generator().manual_seed(0)
    # Long enough for distances beyond relative_attention_max_distance.
    encoder_ids, labels = (torch.randint(2, 96, (2, length), generator=generator) for length in (150, 140))
    encoder_mask = torch.ones(2, 150, dtype=torch.bool)
    encoder_mask[1, 120:] = False
    labels[0, -5:] = -100
    decoder_ids = torch.nn.functional.pad(labels[:, :-1].clamp(min=0), (1, 0))
    with torch.no_grad():
        expected = theirs(input_ids=encoder_ids, attention_mask=encoder_mask.long(), labels=labels)
        logits = ours(encoder_ids, decoder_ids, encoder_mask=encoder_mask).logits
        loss = ours(encoder_ids, decoder_ids, labels, encoder_mask=encoder_mask).loss.cross_entropy
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.sum() / (labels != -100).sum(), expected.loss, rtol=1e-5, atol=1e-5)
