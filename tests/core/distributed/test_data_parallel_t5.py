"""The T5 model itself: sharded, sharded in bf16, saved on one layout and continued on another."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron.core.config import ComputeConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron.core.dist_checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint
from megatron.core.distributed import DataParallel, global_grad_norm
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.optimizer import build_optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import initialize_parameters, model_parameters
from tests.distributed import run_distributed

CPU = ParallelContext(torch.device("cpu"))


def config(tied):
    return ModelConfig(
        encoder_num_layers=2, decoder_num_layers=3, hidden_size=20, num_attention_heads=3, kv_channels=6,
        ffn_hidden_size=14, vocab_size=61, make_vocab_size_divisible_by=1, share_embeddings_and_output_weights=tied,
    )  # fmt: skip


def build(context, strategy, tied, bf16, optimizer):
    compute = ComputeConfig(bf16=bf16)
    with torch.device("meta"):
        model = T5Model(config(tied), compute, z_loss_weight=1e-4)
    blocks = model.blocks
    parallel = DataParallel(model, context, compute, blocks, strategy)
    model.to_empty(device="cpu")
    initialize_parameters(model, seed=3)
    parameters = model_parameters([model])
    return model, parallel, parameters, build_optimizer(OptimizerConfig(optimizer=optimizer), parameters, context)


def steps(context, model, parallel, parameters, optimizer, first, last):
    """Train on batches first .. last - 1 and return the losses; the ranks share the rows of each batch."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(1, 61, (4, 16), generator=generator)[context.dp_rank :: context.dp_size]
        loss = torch.zeros((), dtype=torch.float64)
        for number, rows in enumerate(ids.split(1)):
            parallel.set_gradient_sync(number == len(ids) - 1)
            terms = model(rows[:, :10], rows[:, 9:15], rows[:, 10:]).loss
            terms = terms.total[0] / (4 * 6)
            terms.backward()
            loss += terms.detach()
        parallel.reduce_gradients()
        if context.dp_size > 1:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        assert torch.isfinite(global_grad_norm(parameters, context))
        optimizer.step(0.01)
        optimizer.zero_grad()
    return losses


def tensors_of(optimizer):
    named = zip(optimizer.names, optimizer.parameters, strict=True)
    return {f"model/{name}": parameter for name, parameter in named} | optimizer.named_state()


def whole(tensors):
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        for name, tensor in tensors.items()
    }


def run(context, strategy, tied, bf16, optimizer, root, resume):
    """Steps 0 to 3 and a save, or a load and steps 3 to 6; with losses and all tensors at the end."""
    model, parallel, parameters, built = build(context, strategy, tied, bf16, optimizer)
    if resume:
        load_checkpoint(latest_checkpoint(root), tensors_of(built))
        losses = steps(context, model, parallel, parameters, built, 3, 6)
    else:
        losses = steps(context, model, parallel, parameters, built, 0, 3)
        with torch.no_grad():
            model(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))  # leaves weights gathered
        save_checkpoint(root, 3, tensors_of(built), {}, context)
    return losses, whole(tensors_of(built))


def _rank(rank, *args):
    return run(ParallelContext.create(ParallelConfig(), torch.device("cpu")), *args)


@pytest.mark.parametrize(
    ("strategy", "tied", "optimizer"),
    [
        ("optim_grads", False, "adamw-scale"),
        ("optim_grads", True, "adafactor"),
        ("optim_grads_params", True, "adamw-scale"),
        ("no_shard", False, "adamw-scale"),
    ],
)
def test_two_ranks_and_one_hand_over_to_each_other(tmp_path, strategy, tied, optimizer):
    alone = [run(CPU, None, tied, False, optimizer, tmp_path / "one", resume) for resume in (False, True)]
    many = run_distributed(_rank, 2, strategy, tied, False, optimizer, tmp_path / "many", False)
    crossed = run_distributed(_rank, 2, strategy, tied, False, optimizer, tmp_path / "one", True)
    back = run(CPU, None, tied, False, optimizer, tmp_path / "many", True)
    for found, expected in [*[(m, alone[0]) for m in many], *[(c, alone[1]) for c in crossed], (back, alone[1])]:
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        for name, tensor in expected[1].items():
            if name.startswith("model/"):
                assert (found[1][name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-6, name


def test_bf16(tmp_path):
    losses, _ = run(CPU, None, False, False, "adamw-scale", tmp_path / "a", False)
    for strategy in ("no_shard", "optim_grads"):
        for other, tensors in run_distributed(
            _rank, 2, strategy, False, True, "adamw-scale", tmp_path / strategy, False
        ):
            assert other == pytest.approx(losses, rel=0.02)
            assert other != losses
            assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
