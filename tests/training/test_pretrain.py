"""`pretrain_t5.py` as a user runs it: one process, two processes, stopping and continuing, mistakes."""

import contextlib
import io
import json
import math
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.core.datasets.indexed_dataset import encode_manifest
from megatron.core.errors import UserError
from megatron.core.extensions import packages
from megatron.core.parallel_state import ParallelContext
from megatron.core.tokenizers import load_tokenizer
from megatron.training.arguments import parse_args
from megatron.training.initialize import choose_device
from megatron.training.training import Trainer, pretrain_in
from tests.distributed import run_distributed

ROOT = Path(__file__).parents[2]
TINY = shlex.split(
    "--encoder-num-layers 2 --decoder-num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 8 "
    "--encoder-seq-length 64 --lr 1e-2 --log-interval 1 --eval-interval 5 --eval-iters 2 --split 90,10,0"
)


def launch(
    arguments: list[str], processes: int = 0, cwd: Path | None = None, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run the program, under torchrun when `processes` is given."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(ROOT / "pretrain_t5.py"), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def rows(metrics: Path, key: str = "lm_loss") -> dict[int, float]:
    """Values of `key` by iteration."""
    parsed = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [(row["iteration"], row[key]) for row in parsed if key in row]
    assert len(dict(found)) == len(found), "an iteration was reported twice"
    return dict(found)


def run_here(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the program in this process, which spares the seconds of importing torch."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        patch.setattr(sys, "argv", ["pretrain_t5.py", *arguments])
        runpy.run_path(str(ROOT / "pretrain_t5.py"), run_name="__main__")
    return subprocess.CompletedProcess(arguments, int(stopped.value.code or 0), out.getvalue(), err.getvalue())


def train(arguments: list[str], processes: int = 0) -> None:
    result = launch(arguments, processes) if processes else run_here(arguments)
    assert result.returncode == 0, result.stderr


def test_loss_falls_from_ln_v_and_metrics_are_complete(byte_dataset: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    flags = [*TINY, "--data-path", str(byte_dataset), "--train-iters", "60", "--metrics-file", str(metrics)]
    result = launch(flags)
    assert result.returncode == 0, result.stderr
    losses = rows(metrics)
    assert sorted(losses) == list(range(1, 61))
    assert abs(losses[1] - (math.log(384) + 0.5)) < 0.35  # logits of variance 1
    assert losses[60] < losses[1] - 1.0
    first = json.loads(metrics.read_text().splitlines()[0])
    expected = {
        "iteration", "consumed_samples", "consumed_tokens", "lm_loss", "z_loss", "grad_norm", "learning_rate",
        "step_time_ms", "tokens_per_s", "tflops_per_s", "mfu", "memory_gib", "fill_rate", "data_wait_ms",
        "skipped_iterations",
    }  # fmt: skip
    assert expected <= set(first)
    assert first["mfu"] is None and first["fill_rate"] == 1.0 and first["consumed_samples"] == 8
    assert set(rows(metrics, "validation_noise_lm_loss")) == set(range(5, 61, 5))
    assert "ETA" in result.stdout and "validation at step 60" in result.stdout


def _train_here(rank: int, runs: list[list[str]]) -> None:
    """Train in this process, or in this rank of a process group that exists already."""
    for flags in runs:
        config = parse_args(flags).config
        pretrain_in(ParallelContext.create(config.parallel, torch.device("cpu")), config)


@pytest.mark.parametrize("optimizer", ["adamw-scale", "adafactor", "adamw"])
def test_two_processes_train_as_one(byte_dataset: Path, tmp_path: Path, optimizer: str) -> None:
    """Under every sharding strategy, with gradient accumulation."""
    common = [*TINY, "--data-path", str(byte_dataset), "--train-iters", "6", "--optimizer", optimizer]
    common += ["--global-batch-size", "8"]
    one = tmp_path / "one.jsonl"
    _train_here(0, [[*common, "--metrics-file", str(one)]])
    strategies = ["no_shard", "optim_grads", "optim_grads_params"]
    two = {strategy: tmp_path / f"{strategy}.jsonl" for strategy in strategies}
    sharded = [
        [*common, "--micro-batch-size", "2", "--data-parallel-sharding-strategy", name, "--metrics-file", str(file)]
        for name, file in two.items()
    ]
    run_distributed(_train_here, 2, sharded)
    for file in two.values():
        for key in ("lm_loss", "grad_norm", "validation_lm_loss", "validation_noise_lm_loss"):
            assert rows(file, key) == pytest.approx(rows(one, key), rel=2e-5)


def test_z_loss_is_trained_on_but_no_part_of_lm_loss(byte_dataset: Path, tmp_path: Path) -> None:
    losses = {}
    for weight in ("0", "1"):
        file = tmp_path / weight
        common = [*TINY, "--data-path", str(byte_dataset), "--train-iters", "4", "--z-loss-weight", weight]
        _train_here(0, [[*common, "--metrics-file", str(file)]])
        losses[weight] = rows(file)
        assert (rows(file, "z_loss")[1] > 1.0) == (weight == "1")
    assert losses["0"][1] == losses["1"][1]
    assert losses["0"][4] != pytest.approx(losses["1"][4], rel=1e-4)


def test_dropout_is_seeded_anew_at_each_step(byte_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    common = [*TINY, "--data-path", str(byte_dataset), "--train-iters", "3", "--hidden-dropout", "0.1"]
    _train_here(0, [common, common])
    assert len(set(seeds[:3])) == 3 and seeds[:3] == seeds[3:]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw-scale", "adafactor"])
def test_the_same_command_continues_bit_for_bit(
    byte_dataset: Path, tmp_path: Path, processes: int, optimizer: str
) -> None:
    """Stopped after 4 of 8 steps, with dropout and accumulation; every byte of weights and optimizer state."""
    flags = [
        *TINY, "--data-path", str(byte_dataset), "--optimizer", optimizer, "--micro-batch-size", "2",
        "--global-batch-size", "8", "--save-interval", "4", "--hidden-dropout", "0.1", "--attention-dropout", "0.1",
        "--lr-decay-iters", "8", "--data-parallel-sharding-strategy", "optim_grads",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs = [
        [*flags, "--train-iters", "8", "--save", str(whole)],
        [*flags, "--train-iters", "4", "--save", str(parts)],
        [*flags, "--train-iters", "8", "--save", str(parts)],
    ]
    if processes == 1:
        _train_here(0, runs)
    else:
        run_distributed(_train_here, processes, runs)
    assert rows(parts / "metrics.jsonl") == rows(whole / "metrics.jsonl")
    assert rows(parts / "metrics.jsonl", "grad_norm") == rows(whole / "metrics.jsonl", "grad_norm")
    shards = sorted(path.name for path in (whole / "iter_0000008").glob("*.safetensors"))
    assert len(shards) == processes
    for name in shards:
        assert (whole / "iter_0000008" / name).read_bytes() == (parts / "iter_0000008" / name).read_bytes()


def test_torchrun_stops_continues_and_finishes(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path)]
    flags += ["--lr-decay-iters", "4", "--train-iters"]
    train([*flags, "2"], processes=2)
    assert json.loads((tmp_path / "finished").read_text())["iteration"] == 2
    more = launch([*flags, "4"], processes=2)
    assert more.returncode == 0 and "continuing from" in more.stdout
    assert sorted(rows(tmp_path / "metrics.jsonl")) == [1, 2, 3, 4]
    again = launch([*flags, "4"], processes=2)
    assert again.returncode == 0 and "nothing left to do: 4 steps" in again.stdout


def test_metrics_beyond_the_checkpoint_are_written_anew(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path), "--save-interval", "2"]
    flags += ["--lr-decay-iters", "4"]
    train([*flags, "--train-iters", "2"])
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a run killed after step 3, in the middle of a line
        file.write('{"iteration": 3, "lm_loss": 1.0}\n{"iteration": 4, "lm_')
    train([*flags, "--train-iters", "4"])
    losses = rows(tmp_path / "metrics.jsonl")
    assert sorted(losses) == [1, 2, 3, 4] and losses[3] > 3.0


def test_bf16_keeps_fp32_state_and_close_losses(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--train-iters", "6"]
    train([*flags, "--metrics-file", str(tmp_path / "fp32.jsonl")])
    train([*flags, "--bf16", "--save", str(tmp_path / "bf16")])
    assert rows(tmp_path / "bf16/metrics.jsonl") == pytest.approx(rows(tmp_path / "fp32.jsonl"), rel=2e-2)
    manifest = json.loads((tmp_path / "bf16/iter_0000006/manifest.json").read_text())
    assert manifest["config"]["compute"]["bf16"] is True
    assert "bfloat16" not in json.dumps(manifest["tensors"])


def test_samples_left_count_after_a_change_of_the_batch_size(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path), "--lr-decay-style", "linear"]
    flags += ["--lr-warmup-fraction", "0", "--lr", "1e-2"]
    _train_here(0, [[*flags, "--train-samples", "16", "--lr-decay-samples", "64"]])
    _train_here(0, [[*flags, "--train-samples", "64", "--global-batch-size", "16"]])
    consumed = rows(tmp_path / "metrics.jsonl", "consumed_samples")
    assert consumed == {1: 8, 2: 16, 3: 32, 4: 48, 5: 64}
    rates = rows(tmp_path / "metrics.jsonl", "learning_rate")
    assert rates == pytest.approx({step: 1e-2 * (1 - samples / 64) for step, samples in consumed.items()})


def test_extending_a_finished_run_takes_the_marker_away(
    byte_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path), "--lr-decay-iters", "2", "--train-iters"]
    _train_here(0, [[*flags, "1"]])
    assert (tmp_path / "finished").exists()
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("killed"))
    (tmp_path / "finished").unlink()  # as if killed right after the last checkpoint
    _train_here(0, [[*flags, "1"]])  # nothing left to do
    assert (tmp_path / "finished").exists()
    with pytest.raises(pytest.fail.Exception, match="killed"):
        _train_here(0, [[*flags, "2"]])
    assert not (tmp_path / "finished").exists()


def _flip_last_bit(checkpoint: Path) -> None:
    (shard,) = checkpoint.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_and_never_a_silent_start(
    byte_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path), "--save-interval", "2"]
    flags += ["--lr-decay-iters", "6", "--train-iters"]
    _train_here(0, [[*flags, "4"]])
    losses = rows(tmp_path / "metrics.jsonl")
    _flip_last_bit(tmp_path / "iter_0000004")
    _train_here(0, [[*flags, "4"]])  # from step 2
    assert "iter_0000004" in caplog.text and "is damaged" in caplog.text
    assert rows(tmp_path / "metrics.jsonl") == losses
    _flip_last_bit(tmp_path / "iter_0000004")
    _flip_last_bit(tmp_path / "iter_0000002")
    with pytest.raises(UserError, match=r"no checkpoint in .* is sound \(2 found\)"):
        _train_here(0, [[*flags, "4"]])
    assert rows(tmp_path / "metrics.jsonl") == losses


def test_the_same_command_with_load_continues_its_own_save(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--lr-decay-iters", "6"]
    _train_here(0, [[*flags, "--train-iters", "2", "--save", str(tmp_path / "first")]])
    second = [*flags, "--load", str(tmp_path / "first"), "--save", str(tmp_path / "second"), "--train-iters"]
    _train_here(0, [[*second, "4"], [*second, "6"]])
    assert sorted(rows(tmp_path / "second/metrics.jsonl")) == [3, 4, 5, 6]


def test_other_data_is_not_continued(byte_dataset: Path, wordpiece_dataset: Path, tmp_path: Path) -> None:
    """Same number of tokens, other text; then another tokenizer."""
    other = _copied(byte_dataset, tmp_path)
    content = other.with_name(other.name + ".bin").read_bytes()
    other.with_name(other.name + ".bin").write_bytes(content[2:] + content[:2])
    flags = [*TINY, "--train-iters", "1", "--vocab-size", "1000", "--save", str(tmp_path / "run"), "--data-path"]
    _run_with_vocabulary([*flags, str(byte_dataset)])
    with pytest.raises(UserError, match=r"trained with another dataset .*fingerprint"):
        _run_with_vocabulary([*flags, str(other)])
    with pytest.raises(UserError, match=r"trained with another tokenizer .*type ByteTokenizer -> BertWordPieceCase"):
        _run_with_vocabulary([*flags, str(wordpiece_dataset)])


def _run_with_vocabulary(flags: list[str]) -> None:
    pretrain_in(ParallelContext(torch.device("cpu")), parse_args(flags).config, vocab_size_given=True)


def test_changed_values_are_told(byte_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path), "--lr-decay-iters", "2"]
    more = ["--train-iters", "2", "--micro-batch-size", "4", "--global-batch-size", "4"]
    _train_here(0, [[*flags, "--train-iters", "1"], [*flags, *more]])
    error = capsys.readouterr().err
    assert "not as in the run that saved it: micro_batch_size 8 -> 4, global_batch_size 8 -> 4, " in error
    assert "train_iters 1 -> 2" in error


def test_the_tokenizer_beside_the_checkpoints_is_that_of_the_run(
    byte_dataset: Path, wordpiece_dataset: Path, tmp_path: Path
) -> None:
    """Also when an earlier run with another one left its own there and no checkpoint."""
    flags = [*TINY, "--train-iters", "1", "--save", str(tmp_path), "--data-path"]
    _train_here(0, [[*flags, str(wordpiece_dataset)]])
    shutil.rmtree(tmp_path / "iter_0000001")
    _train_here(0, [[*flags, str(byte_dataset)]])
    assert load_tokenizer(tmp_path / "tokenizer").type == "ByteTokenizer"


def test_more_processes_than_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="more than 2 processes"):
        choose_device()


def test_reports_align_with_checkpoints_and_the_test_split_comes_last(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--log-interval", "4", "--split", "80,10,10"]
    flags += ["--save-interval", "3", "--lr-decay-iters", "7", "--train-iters"]
    train([*flags, "7", "--save", str(tmp_path / "whole")])
    for steps in ("3", "7"):
        train([*flags, steps, "--save", str(tmp_path / "parts")])
    whole = rows(tmp_path / "whole/metrics.jsonl")
    assert list(whole) == [3, 4, 6, 7]
    assert rows(tmp_path / "parts/metrics.jsonl") == whole
    assert list(rows(tmp_path / "whole/metrics.jsonl", "test_noise_lm_loss")) == [7]


def test_default_length_is_one_epoch(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--global-batch-size", "512", "--micro-batch-size", "128"]
    result = run_here([*flags, "--metrics-file", str(tmp_path / "m.jsonl"), "--eval-iters", "0"])
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])
    windows = int(result.stdout.split("epochs of ")[1].split(" ")[0].replace(",", ""))
    assert last["iteration"] == windows // 512 > 1


def test_command_of_the_readme_runs_as_written(wordpiece_dataset: Path) -> None:
    """In one process, with no launcher, the dataset's prefix as `preprocess_data.py --output-prefix` got it."""
    command = (
        "--encoder-num-layers 12 --decoder-num-layers 12 --hidden-size 768 --num-attention-heads 12 --kv-channels 64 "
        "--seq-length 512 --max-position-embeddings 512 --data-path my_data_collection"
    )
    result = launch(
        [*shlex.split(command), "--train-iters", "4", "--micro-batch-size", "1", "--log-interval", "1"],
        cwd=wordpiece_dataset.parent,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| lm loss") >= 4


def test_megatron_t5_220m_arguments(wordpiece_dataset: Path, wordpiece_vocab: Path, tmp_path: Path) -> None:
    """Megatron-LM's published arguments; package, backend and sizes are replaced by what a CPU has."""
    published = (
        "--encoder-num-layers 12 --decoder-num-layers 12 --hidden-size 768 --num-attention-heads 12 --kv-channels 64 "
        "--ffn-hidden-size 3072 --encoder-seq-length 512 --decoder-seq-length 128 --max-position-embeddings 512 "
        "--micro-batch-size 64 --global-batch-size 512 --lr 0.0001 --train-iters 1000000 --lr-decay-iters 1000000 "
        "--lr-decay-style linear --min-lr 0.00001 --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --bf16 "
        "--vocab-extra-ids 100 --init-method-std 0.015 --transformer-impl transformer_engine "
        "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --attention-backend auto --data-path D "
        "--vocab-file V --tokenizer-type BertWordPieceCase --split 99982,9,9 --log-interval 100 --tensorboard-dir T "
        "--save-interval 500 --eval-interval 1000 --eval-iters 10 --distributed-backend nccl --save S --load S"
    )
    replacements = {
        "--encoder-num-layers": "2", "--decoder-num-layers": "2", "--hidden-size": "64", "--num-attention-heads": "4",
        "--kv-channels": "16", "--ffn-hidden-size": "128", "--micro-batch-size": "2", "--global-batch-size": "4",
        "--train-iters": "4", "--lr-decay-iters": "10", "--transformer-impl": "local", "--distributed-backend": "gloo",
        "--log-interval": "1", "--data-path": str(wordpiece_dataset), "--vocab-file": str(wordpiece_vocab),
        "--tensorboard-dir": str(tmp_path / "T"), "--save": str(tmp_path / "S"), "--load": str(tmp_path / "S"),
    }  # fmt: skip
    words = shlex.split(published)
    arguments = [replacements.get(words[i - 1], word) if i else word for i, word in enumerate(words)]
    result = launch(arguments)
    assert result.returncode == 0, result.stderr
    assert "--split 99982,9,9 leaves" in result.stderr and "no validation loss" in result.stderr
    assert "512 + 114 tokens" in result.stdout
    assert list((tmp_path / "T").glob("events*"))
    config = json.loads((tmp_path / "S/iter_0000004/manifest.json").read_text())["config"]
    assert config["model"]["init_method_std"] == 0.015 and config["compute"]["bf16"]
    assert config["optimizer"]["weight_decay"] == 0.01 and config["data"]["decoder_seq_length"] == 128
    rates = rows(tmp_path / "S/metrics.jsonl", "learning_rate")
    # The warmup of 0.01 x 10 steps is over before the first; then it is linear from 1e-4 to 1e-5 at step 10.
    assert rates == pytest.approx({i: 1e-5 + 9e-5 * (10 - i) / 9.9 for i in range(1, 5)})
    absent = "needs the package transformer_engine, which is not installed"
    if packages.installed("transformer_engine"):
        absent = "computes on cuda, and this run is on cpu"
    _expect_one_line(
        [*arguments, "--transformer-impl", "transformer_engine"], f"--transformer-impl transformer_engine {absent}"
    )


def _expect_one_line(arguments: list[str], message: str) -> None:
    result = run_here(arguments)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert result.returncode == 1, result.stderr
    assert len(lines) == 1 and message in lines[0], result.stderr


def _copied(dataset: Path, target: Path) -> Path:
    for path in dataset.parent.glob(dataset.name + "_text_document*"):
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy(path, target / path.name)
    return target / (dataset.name + "_text_document")


def _truncate_bin(prefix: Path) -> None:
    with prefix.with_name(prefix.name + ".bin").open("r+b") as file:
        file.truncate(1000)


def _corrupt_idx(prefix: Path) -> None:
    with prefix.with_name(prefix.name + ".idx").open("r+b") as file:
        file.seek(2)
        file.write(b"\x55\x55")


def _enlarge_token(prefix: Path) -> None:
    """Every token of the corpus out of the vocabulary, whichever is read first."""
    path = prefix.with_name(prefix.name + ".bin")
    path.write_bytes(b"\xf0\x7f" * (path.stat().st_size // 2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_truncate_bin, ".bin"), (_corrupt_idx, ".idx"), (_enlarge_token, "32752")],
)
def test_damaged_datasets_are_refused(byte_dataset: Path, tmp_path: Path, damage: object, message: str) -> None:
    prefix = _copied(byte_dataset, tmp_path)
    damage(prefix)  # type: ignore[operator]
    _expect_one_line([*TINY, "--data-path", str(prefix), "--train-iters", "2"], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-path", "/nowhere/corpus"], "/nowhere/corpus"),
        ([], "--data-path is missing"),
        (["--data-path", "DATA", "--global-batch-size", "12"], "--global-batch-size 12 is not a multiple"),
        (
            ["--data-path", "DATA", "--encoder-seq-length", "200000", "--vocab-extra-ids", "100"],
            "the tokenizer has 100 sentinels",
        ),
        (["--data-path", "DATA", "--seq-length", "400000", "--mean-noise-span-length", "4000"], "one sample takes"),
        (["--data-path", "DATA", "--seq-length", "2048", "--mean-noise-span-length", "1.1"], "sentinels"),
        (["--data-path", "DATA", "--decoder-seq-length", "5"], "--decoder-seq-length is 5"),
        (
            shlex.split(
                "--data-path DATA --position-embedding-type learned_absolute --max-position-embeddings 64 "
                "--noise-density 0.6 --mean-noise-span-length 8"
            ),
            "the objective makes rows of",
        ),
        (
            ["--data-path", "DATA", "--tokenizer-type", "BertWordPieceCase", "--vocab-file", "VOCAB"],
            "is not the one that",
        ),
        (["--data-path", "DATA", "--vocab-size", "100"], "--vocab-size is 100"),
        (["--data-path", "DATA", "--load", "/nowhere/run"], "--load /nowhere/run holds no checkpoint"),
        (["--data-path", "DATA", "--distributed-backend", "nccl"], "nccl needs GPUs"),
        (["--data-path", "DATA", "--save", "VOCAB"], "Not a directory; give a directory that can be written"),
        (["--data-path", "DATA", "--metrics-file", "/proc/nowhere/m"], "metrics file /proc/nowhere/m: "),
        (["--data-path", "DATA", "--metrics-file", "VOCAB"], "is not a metrics file"),
        (["--data-path", "DATA", "--tensorboard-dir", "VOCAB"], "--tensorboard-dir"),
    ],
)
def test_mistakes_are_one_line(byte_dataset: Path, wordpiece_vocab: Path, arguments: list[str], message: str) -> None:
    names = {"DATA": str(byte_dataset), "VOCAB": str(wordpiece_vocab)}
    given = [names.get(word, word) for word in arguments]
    _expect_one_line([*TINY, "--train-iters", "2", *given], message)


def test_a_mistake_ends_the_program_with_one_line() -> None:
    result = launch([*TINY, "--data-path", "/nowhere/corpus"])
    assert result.returncode == 1
    assert "/nowhere/corpus" in result.stderr and result.stderr.count("\n") == 1


def test_another_architecture_is_not_continued(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--train-iters", "2", "--save", str(tmp_path)]
    train(flags)
    _expect_one_line([*flags, "--hidden-size", "48"], "hidden_size 32 -> 48")
    _expect_one_line([*flags, "--optimizer", "adafactor"], "another optimizer (optimizer adamw-scale -> adafactor)")


def test_manifest_without_a_tokenizer_is_one_line(byte_dataset: Path, tmp_path: Path) -> None:
    prefix = _copied(byte_dataset, tmp_path)
    path = prefix.with_name(prefix.name + ".json")
    manifest = json.loads(path.read_text())
    del manifest["manifest_crc32"]
    for broken in ({"tokenizer": None}, {"tokenizer": "T5"}, {"tokenizer_directory": None}):
        path.write_bytes(encode_manifest(manifest | broken))
        _expect_one_line([*TINY, "--data-path", str(prefix), "--train-iters", "2"], "preprocess the corpus again")
    other = manifest["tokenizer"] | {"fingerprint": "0" * 64}
    path.write_bytes(encode_manifest(manifest | {"tokenizer": other}))
    _expect_one_line([*TINY, "--data-path", str(prefix), "--train-iters", "2"], "is not the one that made")
