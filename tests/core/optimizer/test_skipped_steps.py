"""Steps that the device skips by itself: no bit changes, and the steps after them are as if they had not been."""

import math

import pytest
import torch

from megatron.core.config import ComputeConfig, ModelConfig, OptimizerConfig
from megatron.core.distributed import gradient_divisor, measure_gradients
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.optimizer import Optimizer, build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ModelParameter, initialize_parameters, model_parameters

CPU = ParallelContext(torch.device("cpu"))
# Adafactor factors the moments of some matrices and keeps those of others whole.
MODEL = ModelConfig(encoder_num_layers=1, hidden_size=128, num_attention_heads=4, kv_channels=32, vocab_size=384)


def build(name: str) -> tuple[list[ModelParameter], Optimizer]:
    model = T5Model(MODEL, ComputeConfig())
    initialize_parameters(model, seed=1)
    for parameter in model.parameters():
        parameter.data.view(-1)[0] = -0.0  # which an addition of zero changes
    parameters = model_parameters([model])
    config = OptimizerConfig(optimizer=name, weight_decay=0.0 if name == "adafactor" else 0.1)  # type: ignore[arg-type]
    return parameters, build_optimizer(config, parameters, CPU)


def bits(optimizer: Optimizer) -> list[torch.Tensor]:
    tensors = [*optimizer.parameters, *optimizer.named_state().values()]
    return [tensor.detach().clone().view(torch.int32) for tensor in tensors]


def step(parameters: list[ModelParameter], optimizer: Optimizer, seed: int, faulty: bool, by_itself: bool) -> None:
    """One clipped step; with a fault, in all parameters, the optimizer is called only if it decides by itself."""
    generator = torch.Generator().manual_seed(seed)
    for index, parameter in enumerate(p.parameter for p in parameters):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if faulty:
            parameter.grad.view(-1)[3] = (math.nan, math.inf, -math.inf)[index % 3]
    norm = measure_gradients(parameters, CPU).total
    assert norm.isfinite().item() != faulty
    divisor = gradient_divisor(norm, max_norm=1.0)
    if by_itself:
        optimizer.step(1e-2, divisor, skip=norm.isfinite().logical_not())
    elif not faulty:
        optimizer.step(1e-2, divisor)


@pytest.mark.parametrize("faulty_step", [0, 2])
@pytest.mark.parametrize("name", ["adamw", "adamw-scale", "adafactor"])
def test_a_skipped_step_leaves_no_trace(name: str, faulty_step: int) -> None:
    host, device = build(name), build(name)
    for number in range(4):
        faulty = number == faulty_step
        before = bits(device[1])
        step(*host, number, faulty, by_itself=False)
        step(*device, number, faulty, by_itself=True)
        after = bits(device[1])
        assert all(map(torch.equal, before, after)) == faulty
        for one, other in zip(
            [*host[1].parameters, *host[1].named_state().values()],
            [*device[1].parameters, *device[1].named_state().values()],
            strict=True,
        ):
            assert torch.equal(one, other)
    assert device[1].step_count.item() == 3
