"""The formulas for what ranks send against the collectives of a real forward and backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.core.config import ComputeConfig, ModelConfig, ParallelConfig
from megatron.core.models.T5.t5_communication import data_bytes, pipeline_bytes, tensor_bytes
from megatron.core.models.T5.t5_memory import T5Memory
from megatron.core.models.T5.t5_pipeline import choose_plan
from megatron.core.models.T5.t5_sharding import shard_t5
from megatron.core.models.T5.t5_stage import T5Stage
from megatron.core.models.T5.t5_units import Units
from megatron.core.parallel_state import ParallelContext
from megatron.core.tensor_parallel import TensorParallel
from tests.collectives import CountCollectives

BATCH, ENCODER_LENGTH, DECODER_LENGTH = 2, 21, 7
CONFIG = ModelConfig(
    encoder_num_layers=4, decoder_num_layers=3, hidden_size=32, num_attention_heads=4, kv_channels=8,
    ffn_hidden_size=48, vocab_size=128,
)  # fmt: skip
UNITS = Units.of(CONFIG)


def sent_over_a_ring(compute: ComputeConfig, parallel: ParallelConfig) -> float:
    """Bytes that rank 0 sends for the whole model, but for the two numbers a token of the loss."""
    size = parallel.tensor_model_parallel_size
    torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        context = ParallelContext.create(parallel, torch.device("cpu"))
        with torch.device("meta"):
            stage = T5Stage(CONFIG, compute, 1e-4, UNITS.all, TensorParallel.of(context, parallel))
        shard_t5(stage, context)
        stage.to_empty(device="cpu")
        lengths = {
            "encoder_input_ids": ENCODER_LENGTH, "decoder_input_ids": DECODER_LENGTH, "labels": DECODER_LENGTH
        }  # fmt: skip
        batch = {name: torch.zeros(BATCH, length, dtype=torch.int32) for name, length in lengths.items()}
        with CountCollectives() as count:
            stage(**batch)[-1].backward()
    finally:
        torch.distributed.destroy_process_group()
    loss = size * 2 * BATCH * DECODER_LENGTH * 4
    halves = 2 * count.nbytes["allreduce_"] + count.nbytes["_allgather_base_"] + count.nbytes["_reduce_scatter_base_"]
    return (halves - loss) * (size - 1) / size


@pytest.mark.parametrize(
    ("compute", "parallel"),
    [
        ({}, {}),
        ({"bf16": True}, {"sequence_parallel": True}),
        ({"fp16": True}, {"sequence_parallel": True}),
        ({"recompute_granularity": "full"}, {}),
        ({"recompute_granularity": "full", "recompute_num_layers": 2}, {"sequence_parallel": True}),
    ],
)
def test_bytes_over_tensor_parallel_ranks(compute: dict[str, Any], parallel: dict[str, Any]) -> None:
    compute_config = ComputeConfig(**compute)
    parallel_config = ParallelConfig(tensor_model_parallel_size=4, **parallel)
    sizes = T5Memory(CONFIG, compute_config, parallel_config, BATCH, ENCODER_LENGTH, DECODER_LENGTH)
    assert tensor_bytes(sizes, UNITS.all) == sent_over_a_ring(compute_config, parallel_config)


def test_bytes_over_pipeline_and_data_parallel_ranks() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layout="E4|D3")
    plan = choose_plan(CONFIG, parallel, ENCODER_LENGTH, DECODER_LENGTH, 4)
    sizes = T5Memory(CONFIG, ComputeConfig(), parallel, BATCH, ENCODER_LENGTH, DECODER_LENGTH)
    encoder_output = BATCH * ENCODER_LENGTH * CONFIG.hidden_size * 4
    assert [pipeline_bytes(sizes, plan, rank) for rank in range(2)] == [encoder_output, encoder_output]
    assert tensor_bytes(sizes, UNITS.all) == 0
    assert data_bytes(sizes, [100, 20], "no_shard", 4, 8) == 120 * 8 * 3 / 4
    assert data_bytes(sizes, [120], "optim_grads", 4, 8) == 120 * 8 * 3 / 4
    assert data_bytes(sizes, [120], "optim_grads_params", 4, 8) == 120 * (16 + 1) * 4 * 3 / 4
    assert data_bytes(sizes, [120], "optim_grads_params", 4, 8, outermost=20) == (8 * (200 + 20) + 120) * 4 * 3 / 4
    assert data_bytes(sizes, [120], "no_shard", 1, 8) == 0
