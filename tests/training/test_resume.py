"""Where a run starts from: the choice of a checkpoint, what of it is taken, and what is refused."""

import contextlib
import io
import json
import shlex
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron.core.dist_checkpointing import save_checkpoint
from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor
from megatron.training.arguments import parse_args
from megatron.training.starting_point import Scope
from megatron.training.training import Trainer, pretrain_in
from tests.distributed import run_distributed
from tests.layouts.comparison import checkpoint_tensors, metrics

CPU = torch.device("cpu")
ARCHITECTURE = shlex.split(
    "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 16 --num-attention-heads 2 --kv-channels 8 "
    "--ffn-hidden-size 24 --encoder-seq-length 48 --split 90,10,0"
)
REST = shlex.split("--lr 1e-2 --log-interval 1 --eval-iters 0 --micro-batch-size 4")
DECAY = ["--lr-decay-iters", "8"]


@pytest.fixture(scope="module")
def pretrained(byte_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`--save` of a run of 6 steps, saved at 2, 4 and 6."""
    save = tmp_path_factory.mktemp("pretrained")
    run([*flags_of(byte_dataset), "--train-iters", "6", "--save-interval", "2", "--save", str(save)])
    return save


@pytest.fixture
def flags(byte_dataset: Path) -> list[str]:
    """All flags but length, --save and --load."""
    return flags_of(byte_dataset)


def flags_of(dataset: Path) -> list[str]:
    return [*ARCHITECTURE, *REST, *DECAY, "--data-path", str(dataset)]


@pytest.fixture
def copy(pretrained: Path, tmp_path: Path) -> Path:
    """A copy of `pretrained` to continue."""
    return Path(shutil.copytree(pretrained, tmp_path / "copy"))


def run(flags: list[str]) -> tuple[str, str]:
    """Train in this process; returns what was printed on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        arguments = parse_args(flags)
        given = arguments.sources["vocab_size"] != "default"
        context = ParallelContext.create(arguments.config.parallel, CPU)
        assert pretrain_in(context, arguments.config, given) == 0
    return out.getvalue(), err.getvalue()


def started(flags: list[str]) -> tuple[Trainer, str]:
    """A run that has loaded what it starts from, and makes no step; and its warnings."""
    trainers = []
    with patch.object(Trainer, "train", lambda trainer: trainers.append(trainer) or 0):
        _, err = run(flags)
    return trainers[0], err


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    optimizer = trainer.optimizer
    return {f"model/{n}": local_tensor(p.detach()) for n, p in zip(optimizer.names, optimizer.parameters, strict=True)}


def has_state(trainer: Trainer) -> bool:
    """Whether the optimizer has any state besides zeros."""
    return any(local_tensor(tensor).any() for tensor in trainer.optimizer.named_state().values())


def weights_of(checkpoint: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    root = tmp_path / f"alone-{checkpoint.name}"
    if not root.exists():
        shutil.copytree(checkpoint, root / checkpoint.name)
    return {name: t for name, t in checkpoint_tensors(root).items() if name.startswith("model/")}


def assert_weights(trainer: Trainer, checkpoint: Path, tmp_path: Path) -> None:
    expected = weights_of(checkpoint, tmp_path)
    found = parameters(trainer)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_finetune_takes_the_weights_alone_and_only_at_the_start(
    flags: list[str], pretrained: Path, other_dataset: Path, tmp_path: Path
) -> None:
    """On other data, with another optimizer, schedule and seed; the same command again continues its own save."""
    flags = [*flags, "--finetune", "--load", str(pretrained), "--save", str(tmp_path / "B"), "--train-iters", "2"]
    flags += ["--data-path", str(other_dataset), "--optimizer", "adafactor", "--lr", "5e-3", "--seed", "5"]
    trainer, _ = started(flags)
    assert trainer.progress.iteration == trainer.progress.next_sample == 0 and not has_state(trainer)
    assert_weights(trainer, pretrained / "iter_0000006", tmp_path)
    out, _ = run(flags)
    assert f"starting a new run from the weights of {pretrained}/iter_0000006" in out
    assert list(metrics(tmp_path / "B", "lm_loss")) == [1, 2]
    again, _ = started(flags)
    assert again.starting_point is not None and again.starting_point.scope is Scope.EVERYTHING
    assert again.progress.iteration == 2 and again.starting_point.path == tmp_path / "B/iter_0000002"


@pytest.fixture
def other_dataset(byte_dataset: Path, tmp_path: Path) -> Path:
    """As many tokens, other text."""
    for path in byte_dataset.parent.glob(byte_dataset.name + "_text_document*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    file = tmp_path / f"{byte_dataset.name}_text_document.bin"
    content = file.read_bytes()
    file.write_bytes(content[2:] + content[:2])
    return tmp_path / byte_dataset.name


def test_finetune_with_another_tokenizer_needs_its_ids_to_fit(
    flags: list[str], pretrained: Path, wordpiece_dataset: Path, tmp_path: Path
) -> None:
    more = ["--finetune", "--load", str(pretrained), "--train-iters", "1", "--data-path", str(wordpiece_dataset)]
    with pytest.raises(UserError, match=r"has a vocabulary of \d+ ids, but the tokenizer of --data-path uses"):
        run([*flags, *more])
    run([*flags, "--train-iters", "1", "--vocab-size", "2000", "--save", str(tmp_path / "large")])
    trainer, warnings = started([*flags, *more, "--load", str(tmp_path / "large")])
    assert trainer.config.model.vocab_size == 2000
    assert "not the tokenizer of the weights: type ByteTokenizer -> BertWordPieceCase" in warnings


@pytest.mark.parametrize("load_is_save", [False, True])
def test_finetune_needs_a_load_of_its_own(flags: list[str], copy: Path, load_is_save: bool) -> None:
    more = ["--load", str(copy)] if load_is_save else []
    with pytest.raises(UserError, match="--finetune needs --load"):
        run([*flags, "--finetune", "--save", str(copy), *more, "--train-iters", "1"])


def test_no_load_optim_starts_the_optimizer_anew_once(flags: list[str], copy: Path, tmp_path: Path) -> None:
    """With another optimizer and learning rate; what is then saved under the flag is continued as it is."""
    changed = [*flags, "--save", str(copy), "--train-iters", "8", "--optimizer", "adamw", "--lr", "1e-3"]
    with pytest.raises(UserError, match=r"another optimizer \(optimizer adamw-scale -> adamw\); .*--no-load-optim"):
        run(changed)
    trainer, warnings = started([*changed, "--no-load-optim"])
    assert trainer.progress.iteration == 6 and trainer.progress.next_sample == 24 and not has_state(trainer)
    assert_weights(trainer, copy / "iter_0000006", tmp_path)
    assert trainer.schedule.lr == 1e-3 and "lr 0.01 -> 0.001" in warnings
    out, _ = run([*changed, "--no-load-optim", "--exit-interval", "7"])
    assert "without the state of its optimizer" in out
    again, _ = started([*changed, "--no-load-optim"])
    assert again.progress.iteration == 7 and has_state(again)


def test_ckpt_step_of_load(flags: list[str], pretrained: Path, tmp_path: Path) -> None:
    flags = [*flags, "--load", str(pretrained), "--train-iters", "6", "--ckpt-step"]
    trainer, _ = started([*flags, "4"])
    assert trainer.progress.iteration == 4 and has_state(trainer)
    assert_weights(trainer, pretrained / "iter_0000004", tmp_path)
    with pytest.raises(UserError, match=r"--ckpt-step is 3, .* only iter_0000002, iter_0000004, iter_0000006; choose"):
        run([*flags, "3"])
    save = ["--save", str(tmp_path / "new")]
    run([*flags, "2", *save, "--exit-interval", "3"])
    assert started([*flags, "2", *save])[0].progress.iteration == 3  # the same command continues


def test_going_back_in_save_replaces_later_checkpoints_one_by_one(flags: list[str], copy: Path) -> None:
    before = metrics(copy, "lm_loss")
    flags = [*flags, "--save", str(copy), "--save-interval", "2", "--train-iters", "6"]
    back = [*flags, "--ckpt-step", "2"]
    newest = (copy / "iter_0000006/manifest.json").read_bytes()
    _, err = run([*back, "--exit-interval", "4"])
    assert "iter_0000004, iter_0000006, later than --ckpt-step 2" in err
    assert (copy / "iter_0000006/manifest.json").read_bytes() == newest  # not reached yet
    out, err = run(back)
    assert "continuing from" in out and "iter_0000004 (saved since --ckpt-step 2" in out and "later" not in err
    assert (copy / "iter_0000006/manifest.json").read_bytes() != newest
    assert metrics(copy, "lm_loss") == before


def test_a_checkpoint_that_was_asked_for_is_there_and_sound_or_the_run_fails(flags: list[str], copy: Path) -> None:
    flags = [*flags, "--train-iters", "6"]
    empty = str(copy.parent / "empty")
    for more, message in (
        (["--load", empty], "holds no checkpoint"),
        (["--save", empty, "--ckpt-step", "2"], "--ckpt-step is 2, but .* holds no checkpoint"),
        (["--ckpt-step", "2"], "--ckpt-step needs"),
        (["--load", empty, "--use-checkpoint-args"], "holds no checkpoint"),
        (["--save", empty, "--use-checkpoint-args"], "--use-checkpoint-args found no checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            run([*flags, *more])
    flip_last_bit(copy / "iter_0000004")
    with pytest.raises(UserError, match="is damaged"):
        run([*flags, "--load", str(copy), "--ckpt-step", "4"])


def flip_last_bit(checkpoint: Path) -> None:
    (shard,) = checkpoint.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def test_without_verification_only_sizes_are_compared(
    flags: list[str], copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*flags, "--load", str(copy), "--train-iters", "6"]
    flip_last_bit(copy / "iter_0000006")
    assert started([*flags, "--no-verify-checkpoint"])[0].progress.iteration == 6
    assert started(flags)[0].progress.iteration == 4 and "passing over" in caplog.text
    (shard,) = (copy / "iter_0000006").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert started([*flags, "--no-verify-checkpoint"])[0].progress.iteration == 4


def test_use_checkpoint_args(
    flags: list[str], pretrained: Path, byte_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = ["--use-checkpoint-args", "--load", str(pretrained), "--data-path", str(byte_dataset)]
    parsed = parse_args(bare)
    assert parsed.sources["hidden_size"] == parsed.sources["encoder_seq_length"] == "checkpoint"
    assert parsed.sources["lr"] == parsed.sources["train_iters"] == "default"
    assert parsed.config.model.ffn_hidden_size == 24 and parsed.config.data.split == "90,10,0"
    trainer, _ = started([*bare, *REST, *DECAY, "--train-iters", "7"])
    assert trainer.progress.iteration == 6
    with pytest.raises(UserError, match=r"is of another architecture .*hidden_size 16 -> 32"):
        run([*bare, *REST, *DECAY, "--hidden-size", "32"])
    assert parse_args([*bare, "--finetune"]).config.data.split == "969,30,1"  # of the data, not of the weights
    with pytest.raises(SystemExit):
        parse_args([*bare, "--print-config"])
    assert "hidden_size: 16" in (printed := capsys.readouterr().out) and "# checkpoint" in printed


def test_another_schedule_is_refused_unless_a_flag_decides(byte_dataset: Path, tmp_path: Path) -> None:
    saved = [*ARCHITECTURE, *REST, "--data-path", str(byte_dataset), "--save", str(tmp_path)]  # decays over the run
    run([*saved, "--train-iters", "2"])
    longer = [*saved, "--train-iters", "4"]
    with pytest.raises(
        UserError, match=r"lr_decay 2 -> 4\); --lr-decay-iters 2 keeps its length, --override-opt_param"
    ):
        run(longer)
    assert started([*saved, "--train-iters", "2"])[1] == ""  # the same command
    assert started([*longer, "--lr-decay-iters", "2"])[0].schedule.lr_decay == 2
    trainer, warnings = started([*longer, "--override-opt_param-scheduler"])
    assert trainer.schedule.lr_decay == 4 and "the flags are followed" in warnings
    trainer, warnings = started([*longer, "--use-checkpoint-opt_param-scheduler", "--lr", "3e-2"])
    assert trainer.schedule.lr_decay == 2 and trainer.schedule.lr == 1e-2 and "lr 0.01 -> 0.03" in warnings


def test_a_followed_schedule_counts_as_the_checkpoint_did(byte_dataset: Path, tmp_path: Path) -> None:
    """In samples, although the length of the continued run is given in iterations."""
    flags = [*ARCHITECTURE, *REST, "--data-path", str(byte_dataset), "--save", str(tmp_path)]
    flags += ["--lr-decay-style", "linear", "--lr-warmup-fraction", "0"]
    run([*flags, "--train-samples", "8", "--lr-decay-samples", "32"])
    run([*flags, "--train-iters", "4", "--use-checkpoint-opt_param-scheduler"])
    expected = {step: 1e-2 * (1 - step * 4 / 32) for step in (1, 2, 3, 4)}
    assert metrics(tmp_path, "learning_rate") == pytest.approx(expected)


@pytest.mark.parametrize("change", ["--seed 5", "--split 80,20,0", "--encoder-seq-length 40", "--noise-density 0.2"])
def test_other_samples_are_refused(flags: list[str], copy: Path, change: str) -> None:
    name = change.split()[0][2:].replace("-", "_")
    with pytest.raises(UserError, match=rf"was trained on other samples \(.*{name} .* -> "):
        run([*flags, "--save", str(copy), "--train-iters", "7", *change.split()])


def _start_with(rank: int, flags: list[str]) -> tuple[int, int] | str:
    try:
        trainer, _ = started(flags)
    except UserError as mistake:
        return str(mistake)
    return trainer.global_batch_size, trainer.num_microbatches


def test_the_global_batch_stays_when_processes_come_or_go(flags: list[str], copy: Path) -> None:
    """Saved by one process with 4 samples a step."""
    flags = [*flags, "--load", str(copy), "--train-iters", "6"]
    assert _start_with(0, [*flags, "--micro-batch-size", "1"]) == (4, 4)
    assert run_distributed(_start_with, 2, [*flags, "--micro-batch-size", "1"]) == [(4, 2)] * 2
    (refused, _) = run_distributed(_start_with, 2, flags)
    assert "a global batch of 4 samples, which is not a multiple of --micro-batch-size 4 x 2" in refused
    _, warnings = started([*flags, "--global-batch-size", "8"])
    assert "global_batch_size 4 -> 8" in warnings


@pytest.mark.parametrize("manifest", [{}, {"config": 1, "progress": []}])
def test_checkpoints_of_something_else_are_one_line(flags: list[str], tmp_path: Path, manifest: dict) -> None:
    save_checkpoint(tmp_path, 1, {"x": torch.ones(1)}, manifest, ParallelContext(CPU))
    with pytest.raises(UserError, match="iter_0000001 is not a checkpoint of a training run"):
        run([*flags, "--load", str(tmp_path), "--train-iters", "1"])


def test_what_a_checkpoint_records_is_enough_to_continue(pretrained: Path) -> None:
    manifest = json.loads((pretrained / "iter_0000006/manifest.json").read_text())
    assert manifest["global_batch_size"] == 4 and manifest["schedule"]["lr_decay"] == 8
    assert manifest["progress"]["next_sample"] == manifest["progress"]["consumed_samples"] == 24
