"""`--dry-run`: what it prints and refuses, and its numbers against real ranks."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest
import torch

from megatron.core.models.T5.t5_flops import training_flops_per_sequence
from megatron.core.optimizer import build_optimizer
from megatron.core.optimizer.memory import optimizer_state_bytes
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor, model_parameters
from megatron.core.tensor_parallel import TensorParallel
from megatron.training.arguments import parse_args
from megatron.training.config import RunConfig
from megatron.training.dry_run import DryRun, check_fit, dry_run
from megatron.training.model_setup import build_stages, plan_stages
from tests.distributed import run_distributed
from tests.training.test_pretrain import ROOT, run_here

# Matrices of at least 128 x 128, which Adafactor factors, and smaller ones.
SMALL = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 3 --hidden-size 128 --num-attention-heads 4 --kv-channels 16 "
    "--ffn-hidden-size 256 --vocab-size 500 --encoder-seq-length 64"
)


def look(flags: list[str], world_size: int, encoder_length: int = 64) -> DryRun:
    return DryRun(parse_args(flags).config, world_size, encoder_length, decoder_length=20)


def test_xxl_on_1024_ranks_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    command, shown = page.split("```\n$ python pretrain_t5.py ")[1].split("```")[0].split("80\n", 1)
    flags = command.replace("\\\n", " ") + "80"
    arguments = parse_args(shlex.split(flags))
    start = time.perf_counter()
    dry_run(arguments.config, arguments.dry_run)
    assert time.perf_counter() - start < 60
    printed = capsys.readouterr().out
    assert "11,135,332,352 parameters" in printed
    assert "1,024 ranks = 8 pipeline x 16 data x 8 tensor and sequence parallel" in printed
    assert "2,048 samples of 512 + 114 tokens in 32 microbatches of 4" in printed
    flops = 2048 * training_flops_per_sequence(arguments.config.model, 512, 114)
    assert f"{flops / 1e12:,.1f} TFLOP, {flops / 1024e12:,.2f} a rank" in printed
    assert printed == shown, "docs/parallelism.md shows something else"


def _held(rank: int, configs: list[RunConfig]) -> list[tuple[int, int, int]]:
    """Bytes of parameters, of the optimizer's state and of other storages it holds, that a real rank has."""
    held = []
    for config in configs:
        context = ParallelContext.create(config.parallel, torch.device("cpu"))
        plan = plan_stages(config, context, 64, 20, config.training.num_microbatches(context.dp_size))
        stages, _ = build_stages(config, context, plan, TensorParallel.of(context, config.parallel))
        for stage in stages:
            stage.to_empty(device="cpu")
        parameters = model_parameters(stages)
        optimizer = build_optimizer(config.optimizer, parameters, context)
        state = [
            local_tensor(tensor)
            for index in range(len(parameters))
            for tensor in optimizer.parameter_state(index).values()
        ]
        buffer = getattr(optimizer, "buffer", torch.empty(0))
        weights = sum(local_tensor(p.parameter.detach()).nbytes for p in parameters)
        computed = optimizer_state_bytes(config.optimizer, parameters, "cpu")
        held.append((weights, sum(tensor.nbytes for tensor in state) + buffer.nbytes, computed))
    return held


def test_weights_and_optimizer_state_are_those_of_real_ranks() -> None:
    layouts = {
        "adamw": "--tensor-model-parallel-size 2 --data-parallel-sharding-strategy optim",
        "adamw-scale": "--pipeline-model-parallel-size 2 --data-parallel-sharding-strategy optim_grads",
        "adafactor": "--tensor-model-parallel-size 2 --sequence-parallel --data-parallel-sharding-strategy optim_grads",
    }
    flags = [
        [*SMALL, "--optimizer", optimizer, "--global-batch-size", "32", *layout.split()]
        for optimizer, layout in layouts.items()
    ]
    real = run_distributed(_held, 4, [parse_args(each).config for each in flags])
    for number, each in enumerate(flags):
        run = look(each, 4)
        for rank in run.ranks():
            weights, state, computed = real[rank.pp_rank * run.ranks_per_stage][number]
            assert rank.memory.weights == weights
            assert computed == state


def test_one_rank_needs_what_the_formulas_say() -> None:
    (rank,) = look([*SMALL, "--optimizer", "adamw"], 1).ranks()
    numbers = rank.num_parameters
    assert numbers == rank.owned_parameters
    memory = rank.memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * numbers, 4 * numbers, 8 * numbers)
    assert (memory.gathered, memory.messages, rank.busy) == (0, 0, 1.0)
    assert memory.total > 16 * numbers


def test_segments_make_matrices_for_each_row() -> None:
    flags = [*SMALL, "--attention-backend", "sdpa", "--packing"]
    (one,), (many,) = (look([*flags, packing], 1).ranks() for packing in ("none", "segments"))
    rows, matrices = 8, 4 * 4 * (64**2 + 20**2)  # fp32, 4 heads
    assert many.memory.activations - one.memory.activations > (rows - 1) * matrices


def test_sharding_levels_need_less_and_less() -> None:
    flags = [*SMALL, "--bf16", "--global-batch-size", "64", "--data-parallel-sharding-strategy"]
    levels = ["no_shard", "optim", "optim_grads", "optim_grads_params"]
    memory = {level: look([*flags, level], 4).ranks()[0].memory for level in levels}
    assert memory["no_shard"].weights == pytest.approx(4 * memory["optim"].weights, rel=0.02)
    assert 0 < memory["no_shard"].gathered < memory["optim"].gathered  # 16-bit copies of what the layers multiply by
    assert memory["no_shard"].activations == memory["optim"].activations
    assert memory["optim"].workspace >= memory["optim_grads"].workspace
    assert memory["optim_grads"].gathered >= memory["optim_grads_params"].gathered > 0
    assert memory["optim"].gathered == memory["optim_grads"].gathered


def test_pipeline_copies_are_counted_once() -> None:
    (one,) = look(SMALL, 1).ranks()
    ranks = look([*SMALL, "--pipeline-model-parallel-size", "2", "--global-batch-size", "32"], 2).ranks()
    assert sum(rank.owned_parameters for rank in ranks) == one.num_parameters
    assert sum(rank.num_parameters for rank in ranks) > one.num_parameters  # the embedding on two stages
    assert all(rank.memory.messages > 0 and 0.3 < rank.busy < 1.0 for rank in ranks)


def test_what_does_not_fit_is_refused_with_a_cure() -> None:
    flags = [*SMALL, "--micro-batch-size", "16", "--dry-run", "--device-memory-gib", "0.001"]
    result = run_here(flags)
    assert result.returncode == 1
    assert result.stderr == (
        "error: --device-memory-gib 0.001 is not enough: rank 0 (pipeline rank 0) needs 0.0408 GiB, mostly "
        "activations; lower --micro-batch-size, which is 16\n"
    )
    assert result.stdout.startswith("model: ")
    assert run_here([*SMALL, "--dry-run", "--device-memory-gib", "4"]).returncode == 0


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        ("--preset t5-v1_1-small --tensor-model-parallel-size 2 --micro-batch-size 64", "add --sequence-parallel"),
        ("--preset t5-v1_1-base --bf16 --micro-batch-size 1 --data-parallel-sharding-strategy optim_grads_params",
         "add --recompute-granularity full"),
        ("--preset t5-v1_1-base --micro-batch-size 1", "use --data-parallel-sharding-strategy optim_grads_params"),
        ("--preset t5-v1_1-base --micro-batch-size 1 --data-parallel-sharding-strategy optim_grads_params",
         "raise --tensor-model-parallel-size or --pipeline-model-parallel-size"),
    ],
)  # fmt: skip
def test_the_cure_suits_what_is_large(flags: str, cure: str) -> None:
    is_long = "recompute" in cure
    run = look(shlex.split(flags), 2 if "tensor" in flags else 4, encoder_length=4096 if is_long else 64)
    with pytest.raises(Exception, match=cure):
        check_fit(run, run.ranks(), 0.01)


def test_details_of_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--dry-run", "--tensor-model-parallel-size", "2", "--dry-run-world-size", "4"]
    result = run_here([*flags, "--dry-run-rank", "3"])
    assert result.returncode == 0
    assert "rank 3: pipeline 0, data 1, tensor 1" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["256", "x", "128", "512", "x", "128", "encoder.layers.0.mlp.wi.weight"] in lines
    assert ["128", "x", "32", "128", "x", "64", "encoder.layers.0.self_attention.o.weight"] in lines
    assert run_here([*flags, "--dry-run-rank", "4"]).stderr == (
        "error: --dry-run-rank is 4, but ranks end at 3; lower it\n"
    )


def test_vocabulary_is_the_tokenizers_when_data_is_given(byte_dataset: Path) -> None:
    without = [flag for flag in SMALL if flag not in ("--vocab-size", "500")]
    assert "vocabulary 384" in run_here([*without, "--dry-run", "--data-path", str(byte_dataset)]).stdout
    assert run_here([*without, "--dry-run"]).stderr == (
        "error: --vocab-size is not known; give it, or a tokenizer to take it from\n"
    )


@pytest.mark.parametrize("objective", ["span-corruption", "ul2"])
def test_text_is_not_prepared_for_it(objective: str, byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*(flag for flag in SMALL if flag not in ("--vocab-size", "500")), "--dry-run", "--objective", objective]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "words"}\n')
    (tmp_path / "blend.yaml").write_text(f"corpora: [{{path: {byte_dataset}}}, {{path: corpus.jsonl}}]")
    sentinels = ["--tokenizer-type", "ByteTokenizer", "--vocab-extra-ids", "128"]
    expected = run_here([*flags, "--data-path", str(byte_dataset), *sentinels])
    for data in (["--data-path", str(corpus)], ["--data-config", str(tmp_path / "blend.yaml")]):
        assert run_here([*flags, *data, *sentinels]).stdout == expected.stdout
        assert "--tokenizer-model is missing" in run_here([*flags, *data]).stderr
    assert not list(tmp_path.glob("*.cache*"))


def test_flags_of_a_dry_run_need_one() -> None:
    assert run_here([*SMALL, "--dry-run-world-size", "8"]).stderr == (
        "error: --dry-run-world-size needs --dry-run; add it or remove the flag\n"
    )
