"""Layouts that cannot work: one line each, the same for a dry run and a run."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
import torch

from megatron.core.config import ParallelConfig
from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.training.arguments import parse_args
from megatron.training.consistency import check_equal_on_all_ranks
from megatron.training.dry_run import dry_run
from megatron.training.initialize import layout_warnings
from tests.distributed import run_distributed
from tests.training.test_pretrain import run_here

# 8 + 8 layers: 21 units.
MODEL = shlex.split("--preset t5-v1_1-small --dry-run")

BAD_LAYOUTS = {
    "world size not a product": (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --dry-run-world-size 6",
        "the number of processes is 6, not a multiple of --tensor-model-parallel-size 2 x "
        "--pipeline-model-parallel-size 2; start that many with torchrun, or lower a size",
    ),
    "heads not divisible": (
        "--tensor-model-parallel-size 4",
        "--num-attention-heads 6 is not a multiple of --tensor-model-parallel-size 4; choose a size that divides it",
    ),
    "fewer ids than tensor-parallel ranks": (
        "--tensor-model-parallel-size 6 --vocab-size 7 --make-vocab-size-divisible-by 1",
        "--tensor-model-parallel-size 6 divides the vocabulary of 7 ids into parts of 2, which leaves none for the "
        "last rank; lower it, or raise --make-vocab-size-divisible-by",
    ),
    "sequence parallel without tensor parallel": (
        "--sequence-parallel",
        "--sequence-parallel needs --tensor-model-parallel-size above 1; raise it or remove the flag",
    ),
    "global batch not divisible": (
        "--dry-run-world-size 4 --micro-batch-size 3 --global-batch-size 16",
        "--global-batch-size 16 is not a multiple of --micro-batch-size 3 x 4 data-parallel processes = 12; choose a "
        "multiple",
    ),
    "more stages than units": (
        "--pipeline-model-parallel-size 24 --global-batch-size 512",
        "--pipeline-model-parallel-size 24 with 1 stage on each rank needs 24 stages, the model has 21 units (layers, "
        "embeddings, norms and head); lower --pipeline-model-parallel-size",
    ),
    "more virtual stages than units": (
        "--pipeline-model-parallel-size 8 --num-virtual-stages-per-pipeline-rank 3 --global-batch-size 512",
        "--pipeline-model-parallel-size 8 with 3 stages on each rank needs 24 stages, the model has 21 units (layers, "
        "embeddings, norms and head); lower --num-virtual-stages-per-pipeline-rank",
    ),
    "microbatches too few for the schedule": (
        "--pipeline-model-parallel-size 4 --pipeline-schedule 1f1b --global-batch-size 16",
        "--pipeline-schedule 1f1b needs at least 4 microbatches a step on 4 pipeline ranks, not 2; raise "
        "--global-batch-size, or use --pipeline-schedule auto",
    ),
    "microbatches that the schedule cannot divide": (
        "--pipeline-model-parallel-size 2 --pipeline-schedule interleaved --global-batch-size 56",
        "--pipeline-schedule interleaved cannot divide 7 microbatches a step into 3 equal rounds over 2 pipeline "
        "ranks; choose --global-batch-size such that they are a multiple of 2",
    ),
    "stages a rank that the schedule cannot have": (
        "--pipeline-model-parallel-size 2 --pipeline-schedule zbv --num-virtual-stages-per-pipeline-rank 3 "
        "--global-batch-size 64",
        "--pipeline-schedule zbv has exactly 2 stages on each rank, not 3; change "
        "--num-virtual-stages-per-pipeline-rank (or --pipeline-layout) or the schedule",
    ),
    "split backward pass of compiled layers": (
        "--pipeline-model-parallel-size 2 --pipeline-schedule zbv --compile --global-batch-size 64",
        "--pipeline-schedule zbv splits the backward pass, which --compile cannot do; use interleaved or auto, or "
        "remove --compile",
    ),
    "layout of another depth": (
        "--pipeline-model-parallel-size 2 --pipeline-layout E8|D7 --global-batch-size 64",
        "--pipeline-layout 'E8|D7' has 7 decoder layers, the model has 8; correct the D counts",
    ),
    "virtual stages without a pipeline": (
        "--num-virtual-stages-per-pipeline-rank 2",
        "--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size above 1; raise it",
    ),
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_bad_layout(name: str) -> None:
    flags, message = BAD_LAYOUTS[name]
    with pytest.raises(UserError) as raised:
        arguments = parse_args([*MODEL, *shlex.split(flags)])
        dry_run(arguments.config, arguments.dry_run)
    assert str(raised.value) == message


def test_one_process_is_too_few_for_a_layout() -> None:
    """Also of a real run, which would otherwise train without the layout."""
    flags = [*MODEL[:2], "--pipeline-model-parallel-size", "2", "--data-path", "nowhere"]
    result = run_here(flags)
    assert result.returncode == 1
    assert result.stderr == (
        "error: the number of processes is 1, not a multiple of --tensor-model-parallel-size 1 x "
        "--pipeline-model-parallel-size 2; start that many with torchrun, or lower a size\n"
    )


def _start_with_other_flags(rank: int) -> str:
    flags = [*MODEL[:2], "--data-path", "corpus", "--lr", "0.02" if rank == 1 else "0.01"]
    config = dataclasses.asdict(parse_args(flags).config)
    data = {"fingerprint": "0123" if rank == 0 else "4567"}
    with pytest.raises(UserError) as raised:
        check_equal_on_all_ranks(ParallelContext(torch.device("cpu")), {"config": config, "dataset": data})
    return str(raised.value)


def test_ranks_started_with_other_flags_or_data() -> None:
    assert set(run_distributed(_start_with_other_flags, 2)) == {
        '--lr is 0.01 on rank 0 and 0.02 on rank 1; dataset fingerprint is "0123" on rank 0 and "4567" on rank 1; '
        "start all ranks with the same flags, data and software"
    }


def test_tensor_parallelism_between_nodes_is_pointed_out() -> None:
    assert layout_warnings(ParallelConfig(tensor_model_parallel_size=2), processes_per_node=8) == []
    (warning,) = layout_warnings(ParallelConfig(tensor_model_parallel_size=4), processes_per_node=2)
    assert warning.startswith("--tensor-model-parallel-size 4 does not divide the 2 processes of a node")
