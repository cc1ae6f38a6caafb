"""Stages run one after the other compute what the whole model computes, wherever it is cut."""

import pytest
import torch

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_stage import T5Stage
from megatron.core.models.T5.t5_units import Units
from megatron.core.parameters import initialize_parameters

BATCH = {
    "encoder_input_ids": torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1)),
    "decoder_input_ids": torch.randint(1, 61, (2, 5), generator=torch.Generator().manual_seed(2)),
    "labels": torch.randint(1, 61, (2, 5), generator=torch.Generator().manual_seed(3)),
    "encoder_mask": torch.arange(9).expand(2, 9) < 7,
}


def config(**options):
    return ModelConfig(
        encoder_num_layers=2, decoder_num_layers=3, hidden_size=20, num_attention_heads=3, kv_channels=6,
        ffn_hidden_size=14, vocab_size=61, make_vocab_size_divisible_by=1, **options,
    )  # fmt: skip


def build(model_class, model_config, *units):
    with torch.device("meta"):
        model = model_class(model_config, ComputeConfig(), 1e-4, *units)
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=3)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["relative", "learned_absolute"])
def test_every_cut(tied, positions):
    model_config = config(share_embeddings_and_output_weights=tied, position_embedding_type=positions)
    whole = build(T5Model, model_config)
    losses = whole(**BATCH).loss
    units = Units.of(model_config).all
    cuts = [[cut] for cut in units[1:]] + [[3, 5], list(units[1:])]
    for cut in cuts:
        stages = [
            build(T5Stage, model_config, units[start:end])
            for start, end in zip([0, *cut], [*cut, len(units)], strict=True)
        ]
        passed = ()
        for stage in stages:
            passed = stage(*passed, **BATCH)
        for found, expected in zip(passed, losses, strict=True):
            assert torch.equal(found, expected), cut
        names = {name for stage in stages for name, _ in stage.named_parameters()}
        assert names == {name for name, _ in whole.named_parameters()}
        passed[-1].backward()
        assert all(parameter.grad is not None for stage in stages for parameter in stage.parameters())
