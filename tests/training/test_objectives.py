"""Every denoising objective as a user runs it: losses by denoiser on any layout, resuming, sentinels, checkpoints."""

import json
import shlex
from pathlib import Path

import pytest

from megatron.core.dist_checkpointing import read_manifest
from megatron.training.arguments import parse_args
from megatron.training.dry_run import dry_run
from megatron.training.starting_point import sample_fields
from tests.layouts.comparison import checkpoint_tensors, metrics, train

SHAPE = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 32 --num-attention-heads 2 --kv-channels 8 "
    "--ffn-hidden-size 48 --encoder-seq-length 64 --split 80,10,10 --log-interval 1 --eval-iters 1 "
    "--micro-batch-size 4 --lr-decay-iters 8"
)
UL2 = shlex.split("--objective ul2 --denoisers R:3:0.15:2 :8:0.5 S:prefix:0.25")
KINDS = ("span-3-0.15", "span-8-0.5", "prefix-0.25")
OBJECTIVES = {
    "span-corruption": ["--shuffle-block-windows", "4"],
    "span-corruption, segments": ["--packing", "segments", "--packing-window", "32"],
    "ul2": [*UL2, "--shuffle-block-windows", "4"],
    "ul2, segments": [*UL2, "--packing", "segments", "--packing-window", "32"],
    "prefix-lm": ["--objective", "prefix-lm"],
    "prefix-lm, none": ["--objective", "prefix-lm", "--packing", "none"],
    "prefix-lm, segments": ["--objective", "prefix-lm", "--packing", "segments"],
}


@pytest.fixture
def flags(byte_dataset: Path) -> list[str]:
    return [*SHAPE, "--data-path", str(byte_dataset)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_is_the_undisturbed_one(objective: str, flags: list[str], tmp_path: Path) -> None:
    run = [*flags, *OBJECTIVES[objective], "--eval-interval", "2"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    runs = [
        [*run, "--save", whole, "--train-iters", "4"],
        [*run, "--save", parts, "--train-iters", "3"],
        [*run, "--save", parts, "--train-iters", "4"],
    ]
    assert train(1, runs) == [None, None, None]
    for key in ("lm_loss", "validation_lm_loss", "validation_noise_lm_loss"):
        found, expected = metrics(tmp_path / "parts", key), metrics(tmp_path / "whole", key)
        assert expected and {step: found[step] for step in expected} == expected
    expected_tensors = checkpoint_tensors(tmp_path / "whole")
    assert all(tensor.equal(expected_tensors[name]) for name, tensor in checkpoint_tensors(tmp_path / "parts").items())


@pytest.mark.parametrize("packing", ["none", "segments"])
def test_losses_by_denoiser_are_the_same_on_every_layout(packing: str, flags: list[str], tmp_path: Path) -> None:
    run = [*flags, *UL2, "--packing", packing, "--train-iters", "2", "--eval-interval", "1", "--global-batch-size", "8"]
    layouts = {
        "one": [],
        "tp": shlex.split("--tensor-model-parallel-size 2"),
        "pp": shlex.split("--pipeline-model-parallel-size 2 --pipeline-schedule zbv"),
        "dp": [],
    }
    runs = {name: [*run, *layout, "--save", str(tmp_path / name)] for name, layout in layouts.items()}
    assert train(1, [runs.pop("one")]) == [None]
    assert train(2, list(runs.values())) == [None] * 3
    for split in ("validation", "test"):
        for kind in KINDS:
            expected = metrics(tmp_path / "one", f"{split}_lm_loss/{kind}")
            assert set(expected) == ({1, 2} if split == "validation" else {2})
            for name in runs:
                assert metrics(tmp_path / name, f"{split}_lm_loss/{kind}") == pytest.approx(expected, rel=1e-5), name
        by_kind = [metrics(tmp_path / "one", f"{split}_lm_loss/{kind}")[2] for kind in KINDS]
        assert min(by_kind) < metrics(tmp_path / "one", f"{split}_lm_loss")[2] < max(by_kind)


def test_the_best_loss_of_one_denoiser(flags: list[str], tmp_path: Path) -> None:
    run = [*flags, *UL2, "--train-iters", "2", "--eval-interval", "1", "--save", str(tmp_path / "run"), "--keep-best"]
    mistake, none = train(1, [[*run, "validation_lm_loss/nothing"], [*run, "validation_lm_loss/span-3-0.15"]])
    assert mistake is not None and "choose from validation_lm_loss, validation_lm_loss/span-3-0.15" in mistake
    assert none is None
    losses = metrics(tmp_path / "run", "validation_lm_loss/span-3-0.15")
    (kept,) = (tmp_path / "run" / "best").glob("iter_*")
    assert read_manifest(kept)["best"]["value"] == min(losses.values())


def test_more_sentinels_than_the_data_were_made_with(flags: list[str], tmp_path: Path) -> None:
    save = tmp_path / "run"
    run = [*flags, "--save", str(save), "--train-iters", "1", "--eval-iters", "0"]
    dense = ["--objective", "ul2", "--denoisers", ":1:0.45", "--encoder-seq-length", "512"]
    (mistake,) = train(1, [[*run, *dense]])
    assert mistake is not None and "has 125 sentinels; give --vocab-extra-ids" in mistake
    number = mistake.split("--vocab-extra-ids ")[1].split(",")[0]
    dense += ["--vocab-extra-ids", number]
    assert train(1, [[*run, *dense]]) == [None]
    manifest = read_manifest(save / "iter_0000001")
    assert manifest["tokenizer"]["num_sentinels"] == int(number)
    assert manifest["config"]["model"]["vocab_size"] == 259 + int(number)
    assert json.loads((save / "tokenizer" / "tokenizer_config.json").read_text())["vocab_extra_ids"] == int(number)
    assert train(1, [[*run, *dense, "--train-iters", "2"]]) == [None]
    (mistake,) = train(1, [[*run, "--train-iters", "3"]])
    assert mistake is not None
    assert f"with {number} sentinels, but this run's tokenizer has 125" in mistake and "\n" not in mistake
    (mistake,) = train(1, [[*flags, "--finetune", "--load", str(save), "--vocab-extra-ids", str(int(number) + 1)]])
    assert mistake is not None and f"give --vocab-extra-ids {number}" in mistake


def test_other_samples_are_refused(flags: list[str], tmp_path: Path) -> None:
    run = [*flags, "--save", str(tmp_path), "--train-iters", "1", "--eval-iters", "0"]
    assert train(1, [[*run, *UL2]]) == [None]
    more = ["--train-iters", "2"]
    others = {
        "objective": ["--objective", "prefix-lm", "--packing", "none"],
        "denoisers": ["--objective", "ul2", "--denoisers", "R:3:0.15:3", ":8:0.5", "S:prefix:0.25"],
        "packing": [*UL2, "--packing", "segments"],
        "shuffle_block_windows": [*UL2, "--shuffle-block-windows", "2"],
    }
    for name, mistake in zip(others, train(1, [[*run, *other, *more] for other in others.values()]), strict=True):
        assert mistake is not None and "was trained on other samples" in mistake and f"{name} " in mistake


def test_the_objective_of_a_checkpoint_is_taken_over(flags: list[str], byte_dataset: Path, tmp_path: Path) -> None:
    lengths = ["--decoder-seq-length", "80", "--shuffle-block-windows", "4"]
    run = [*flags, *UL2, *lengths, "--save", str(tmp_path), "--train-iters", "1", "--eval-iters", "0"]
    assert train(1, [run]) == [None]
    common = ["--use-checkpoint-args", "--load", str(tmp_path), "--data-path", str(byte_dataset)]
    for scope in ([], ["--finetune"]):
        data = parse_args([*common, *scope]).config.data
        assert (data.objective, data.denoisers, data.packing) == ("ul2", UL2[3:], "none")
        assert (data.decoder_seq_length, data.shuffle_block_windows) == (80, 4)
        other = parse_args([*common, *scope, "--objective", "prefix-lm"]).config.data
        assert (other.objective, other.denoisers, other.packing) == ("prefix-lm", [], "pairs")
        assert (other.decoder_seq_length, other.shuffle_block_windows) == (None, 1)
    segments = ["--packing", "segments", "--shuffle-block-windows", "1"]
    assert "packing_window" in sample_fields(parse_args([*common, *segments]).config.data)


def test_a_dry_run_needs_no_data(byte_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {
        "--objective ul2 --vocab-extra-ids 128": "512 + 512",
        "--objective prefix-lm": "512 + 512",
        "--objective span-corruption --encoder-seq-length 64 --packing segments": "64 + 14",
    }
    for given, shown in shapes.items():
        arguments = parse_args(["--preset", "t5-v1_1-small", *shlex.split(given), "--dry-run"])
        dry_run(arguments.config, arguments.dry_run)
        assert f"samples of {shown} tokens" in capsys.readouterr().out
    arguments = parse_args([*SHAPE, *UL2, "--data-path", str(byte_dataset), "--dry-run"])
    dry_run(arguments.config, arguments.dry_run)
    assert "samples of 64 + " in capsys.readouterr().out
