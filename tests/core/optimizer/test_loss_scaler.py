"""The loss scale rises and falls as Megatron-LM's does, and float16 runs continue with it."""

import json
import random

import pytest

from megatron.core.config import OptimizerConfig
from megatron.core.optimizer import LossScaler
from tests.megatron_oracle import run_megatron

# Its optimizer package wants a GPU; the scaler itself needs only that its scalars lie on the CPU.
MEGATRON = """
import importlib.util, json, sys
from pathlib import Path
import torch
folder = importlib.util.find_spec("megatron").submodule_search_locations[0]
path = Path(folder, "core", "optimizer", "grad_scaler.py")
spec = importlib.util.spec_from_file_location("grad_scaler", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
make = torch.tensor
torch.tensor = lambda *args, device=None, **kwargs: make(*args, **kwargs)
*numbers, overflows = json.loads(sys.argv[1])
initial, minimum, window, hysteresis = numbers
scaler = module.DynamicGradScaler(initial, minimum, 2.0, 0.5, window, hysteresis)
scales = []
for overflow in overflows:
    scaler.update(overflow)
    scales.append(scaler.scale.item())
print(json.dumps(scales))
"""


def scaler(**fields):
    return LossScaler(OptimizerConfig(**fields))


def test_equals_megatrons():
    chance = random.Random(0)
    overflows = [chance.random() < (0.3 if step // 40 % 2 else 0.02) for step in range(400)]
    found = scaler(initial_loss_scale=2.0**16, min_loss_scale=4.0, loss_scale_window=7, hysteresis=3)
    scales = []
    for overflow in overflows:
        found.update(overflow)
        scales.append(found.scale)
    assert len(set(scales)) > 5
    assert json.loads(run_megatron(MEGATRON, json.dumps([2.0**16, 4.0, 7, 3, overflows]))) == scales


def test_falls_from_the_second_overflow_on_and_rises_after_the_window():
    found = scaler(initial_loss_scale=64.0, min_loss_scale=8.0, loss_scale_window=3)
    scales = []
    for overflow in (True, True, True, False, False, True, False, False, False, True, True, True, True, True):
        found.update(overflow)
        scales.append(found.scale)
    assert scales == [64, 32, 16, 16, 16, 8, 8, 8, 16, 16, 8, 8, 8, 8]


@pytest.mark.parametrize("found", [scaler(loss_scale=128.0), LossScaler(OptimizerConfig(), enabled=False)])
def test_a_constant_scale_stays(found):
    scale = found.scale
    assert scale in (128.0, 1.0)
    for _ in range(5):
        found.update(True)
    found.load_state(scaler().state)
    assert found.scale == scale
    dynamic = scaler()  # a run that goes on in float16 begins with a large scale, not with the constant one
    dynamic.load_state(found.state)
    assert dynamic.state == scaler().state


def test_continues_from_its_state():
    first = scaler(loss_scale_window=3)
    for overflow in (True, True, False, False):
        first.update(overflow)
    second = scaler(loss_scale_window=3)
    second.load_state(json.loads(json.dumps(first.state)))
    for overflow in (False, True, True, False):
        first.update(overflow)
        second.update(overflow)
        assert second.state == first.state
    assert scaler().scale == 2.0**32
