"""What only a GPU can show. `bash tests/run.sh -m gpu`; docs/gpu-status.md says what has been seen to pass."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.core.config import ComputeConfig, ModelConfig, OptimizerConfig
from megatron.core.dist_checkpointing import CheckpointSaver, load_checkpoint
from megatron.core.extensions.packages import installed
from megatron.core.inference.generation import generate
from megatron.core.inference.generation_config import GenerationConfig
from megatron.core.inference.kv_cache import DecoderState, decode_step
from megatron.core.models.T5.special_ids import SpecialIds
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.optimizer import build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import initialize_parameters, model_parameters
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain_in
from tests.training.test_pretrain import ROOT, TINY, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRITON = pytest.mark.skipif(not installed("triton"), reason="needs triton")
CONFIG = ModelConfig(encoder_num_layers=2, hidden_size=64, num_attention_heads=4, kv_channels=32, vocab_size=384)


def build(device: str, compute: ComputeConfig) -> T5Model:
    with torch.device("meta"):
        model = T5Model(CONFIG, compute, z_loss_weight=1e-4)
    model.to_empty(device=device)
    initialize_parameters(model, seed=1)
    return model


def loss_and_gradients(device: str, compute: ComputeConfig, lengths: tuple[int, int]) -> dict[str, torch.Tensor]:
    model = build(device, compute)
    generator = torch.Generator().manual_seed(2)
    encoder = torch.randint(3, 384, (3, lengths[0]), generator=generator).to(device)
    labels = torch.randint(3, 384, (3, lengths[1]), generator=generator).to(device)
    losses = model(encoder, labels.roll(1, 1), labels).loss
    loss = losses.total[0] / losses.cross_entropy.numel()
    loss.backward()
    gradients = {name: parameter.grad.cpu().float() for name, parameter in model.named_parameters()}
    return gradients | {"loss": loss.detach().cpu()}


@pytest.mark.parametrize("backend", ["sdpa", "unfused", "auto", "flex", pytest.param("triton", marks=TRITON)])
@pytest.mark.parametrize("lengths", [(64, 14), (512, 114), (192, 64)])
def test_attention_backends_give_the_cpu_gradients(backend: str, lengths: tuple[int, int]) -> None:
    expected = loss_and_gradients("cpu", ComputeConfig(attention_backend="unfused"), lengths)
    found = loss_and_gradients("cuda", ComputeConfig(attention_backend=backend), lengths)  # type: ignore[arg-type]
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name


def test_bf16_is_close_to_fp32() -> None:
    expected = loss_and_gradients("cpu", ComputeConfig(), (512, 114))
    found = loss_and_gradients("cuda", ComputeConfig(bf16=True), (512, 114))
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 5e-2 * value.norm(), name


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-scale", "adafactor"])
def test_optimizers_step_as_on_the_cpu(optimizer: str) -> None:
    after = []
    for device in ("cpu", "cuda"):
        model = build(device, ComputeConfig())
        config = OptimizerConfig(optimizer=optimizer)  # type: ignore[arg-type]
        stepper = build_optimizer(config, model_parameters([model]), ParallelContext(device=torch.device(device)))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            stepper.step(1e-2)
        after.append({name: parameter.detach().cpu() for name, parameter in model.named_parameters()})
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-5, atol=1e-6)


def test_training_gives_the_cpu_losses(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--train-iters", "20"]
    for device in ("cpu", "cuda"):
        config = parse_args([*flags, "--metrics-file", str(tmp_path / f"{device}.jsonl")]).config
        pretrain_in(ParallelContext(device=torch.device(device)), config)
    assert rows(tmp_path / "cuda.jsonl") == pytest.approx(rows(tmp_path / "cpu.jsonl"), rel=1e-3)


@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_torchrun_trains_and_saves_with_nccl(byte_dataset: Path, tmp_path: Path, precision: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    flags = [*TINY, "--data-path", str(byte_dataset), "--train-iters", "4", "--save", str(tmp_path), *precision]
    result = subprocess.run(
        [*command, str(ROOT / "pretrain_t5.py"), *flags], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "metrics.jsonl", "memory_gib")[4] > 0
    assert (tmp_path / "iter_0000004" / "manifest.json").exists()


def test_checkpoints_are_copied_through_pinned_memory(tmp_path):
    """What is saved is what was there when it was ordered, whatever the GPU is given once the copies are made."""
    saver = CheckpointSaver(tmp_path, ParallelContext(torch.device("cuda")), asynchronous=True)
    tensors = {"large": torch.randn(4096, 1024, device="cuda"), "step": torch.tensor(1.0, device="cuda")}
    tensors["transposed"] = torch.randn(300, 200, device="cuda").T
    expected = {name: tensor.cpu() for name, tensor in tensors.items()}
    saver.prepare(tensors)
    for iteration in (1, 2):
        saver.save(iteration, tensors, {}, wait_for_copies=False)
        saver.wait_for_copies()
        for tensor in tensors.values():
            tensor.add_(1.0)
    assert all(buffer.is_pinned() for buffer in saver.copies.buffers.values())
    saver.close()
    assert [outcome.error for outcome in saver.outcomes()] == [None, None]
    for iteration in (1, 2):
        loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        load_checkpoint(tmp_path / f"iter_000000{iteration}", loaded)
        for name, tensor in loaded.items():
            assert torch.equal(tensor.cpu(), expected[name] + (iteration - 1)), name


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}])
def test_generation_gives_the_cpu_tokens(options: dict[str, int]) -> None:
    ids = torch.randint(3, 384, (4, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(20) < torch.tensor([20, 7, 1, 15])[:, None]
    config = GenerationConfig(max_new_tokens=40, repetition_penalty=1.2, **options)
    found, expected = (
        generate(build(device, ComputeConfig()).eval(), ids.to(device), SpecialIds(0, 1, 0), config,
                 encoder_mask=mask.to(device))
        for device in ("cuda", "cpu")
    )  # fmt: skip
    assert torch.equal(found.ids.cpu(), expected.ids)


@torch.inference_mode()
def test_the_host_does_not_wait_for_single_tokens() -> None:
    model = build("cuda", ComputeConfig(bf16=True)).eval()
    state = DecoderState.start(model, model.encode(torch.full((4, 20), 7, device="cuda")), None, 10, beams=3)
    tokens, parents = torch.full((12,), 5, device="cuda"), torch.zeros(4, 3, dtype=torch.long, device="cuda")
    decode_step(model, state, tokens)  # whatever is set up at the first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(9):
            tokens = decode_step(model, state, tokens).argmax(-1)
            state.reorder(parents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
