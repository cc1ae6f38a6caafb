"""Training in bf16, as it is and compiled, follows training in fp32 on the CPU."""

from pathlib import Path

import pytest
import torch

from megatron.core.parallel_state import ParallelContext
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain_in
from tests.training.test_pretrain import TINY, rows

STEPS = 50
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
COMPILED = pytest.param(["--compile"], marks=pytest.mark.slow, id="compiled")


def losses(device: str, flags: list[str], metrics: Path) -> dict[int, float]:
    """Training loss of every step."""
    config = parse_args([*TINY, *flags, "--train-iters", str(STEPS), "--metrics-file", str(metrics)]).config
    pretrain_in(ParallelContext(device=torch.device(device)), config)
    return rows(metrics)


@pytest.mark.parametrize("compiled", [pytest.param([], id="eager"), COMPILED])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bf16_follows_fp32_on_the_cpu(byte_dataset: Path, tmp_path: Path, device: str, compiled: list[str]) -> None:
    data = ["--data-path", str(byte_dataset)]
    expected = losses("cpu", data, tmp_path / "fp32.jsonl")
    found = losses(device, [*data, "--bf16", *compiled], tmp_path / "bf16.jsonl")
    assert expected[STEPS] < expected[1] - 1.0
    assert found == pytest.approx(expected, rel=1e-2)  # a loss that is not finite is not equal to anything
    mean = sum(found[step] - expected[step] for step in expected) / STEPS
    assert abs(mean) < 3e-3, "rounding to bf16 is no bias"
