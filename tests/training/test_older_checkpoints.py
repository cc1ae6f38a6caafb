"""Checkpoints from before some fields of the configuration existed are continued as if they recorded them."""

import shlex
from pathlib import Path

import pytest

from megatron.core.dist_checkpointing import read_manifest
from megatron.core.dist_checkpointing.format import MANIFEST, encode_manifest
from megatron.training.arguments import parse_args
from tests.layouts.comparison import checkpoint_tensors, metrics, train

# By group, what the first format of checkpoints did not have.
NEWER = {
    "model": {"relative_attention_bias_per_layer"},
    "data": {
        "valid_data_path", "test_data_path", "task_config", "inputs_key", "targets_key", "task_prefix", "packing",
        "mixture_max_examples", "mixture_temperature", "packing_window", "truncate_targets", "data_cache_path",
        "data_config", "train_data_path", "denoisers", "text_key", "mixture_max_epochs", "mixture_budget_tokens",
        "shuffle_block_windows",
    },
    "training": {"eval_metrics", "eval_examples", "eval_num_beams"},
    "checkpoint": {"keep_best", "save_hf", "save_hf_dtype"},
}  # fmt: skip
FLAGS = shlex.split(
    "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 16 --num-attention-heads 2 --kv-channels 8 "
    "--ffn-hidden-size 24 --encoder-seq-length 48 --split 90,10,0 --log-interval 1 --eval-iters 0 --micro-batch-size 4 "
    "--lr-decay-iters 4"
)


@pytest.fixture
def old(byte_dataset: Path, tmp_path: Path) -> Path:
    """`--save` of a run of two steps by a version without the newer fields."""
    save = tmp_path / "old"
    assert train(1, [[*FLAGS, "--data-path", str(byte_dataset), "--save", str(save), "--train-iters", "2"]]) == [None]
    path = save / "iter_0000002"
    manifest = read_manifest(path)
    for group, names in NEWER.items():
        for name in names:
            del manifest["config"][group][name]
    (path / MANIFEST).write_bytes(encode_manifest(manifest))
    return save


def test_a_run_is_continued(old: Path, byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--data-path", str(byte_dataset), "--train-iters", "4", "--save"]
    assert train(1, [[*flags, str(old)], [*flags, str(tmp_path / "undisturbed")]]) == [None, None]
    assert metrics(old, "lm_loss") == metrics(tmp_path / "undisturbed", "lm_loss")
    expected = checkpoint_tensors(tmp_path / "undisturbed")
    assert all(tensor.equal(expected[name]) for name, tensor in checkpoint_tensors(old).items())


def test_newer_fields_have_the_values_that_they_stood_for(old: Path, byte_dataset: Path) -> None:
    config = parse_args(["--use-checkpoint-args", "--load", str(old), "--data-path", str(byte_dataset)]).config
    assert config.model.relative_attention_bias_per_layer is False and config.data.packing == "none"
    flags = [*FLAGS, "--data-path", str(byte_dataset), "--finetune", "--load", str(old), "--train-iters", "1"]
    (mistake,) = train(1, [[*flags, "--relative-attention-bias-per-layer"]])
    assert mistake is not None and "relative_attention_bias_per_layer False -> True" in mistake
    assert train(1, [flags]) == [None]
