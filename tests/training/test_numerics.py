"""Steps that are not finite, losses that jump, steps that do not repeat."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron.core.datasets.prefetch import Prefetcher
from megatron.core.errors import NumericalError
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor
from megatron.training.arguments import parse_args
from megatron.training.data import fit_vocabulary, open_data
from megatron.training.model_setup import DistributedModel
from megatron.training.numerics import SkipCounter, Spike, SpikeDetector, checked_gradients, describe_nonfinite
from megatron.training.training import Trainer
from tests.distributed import run_distributed
from tests.layouts.comparison import checkpoint_tensors
from tests.layouts.layout import Layout
from tests.training.test_pretrain import TINY, run_here


def make_trainer(flags: list[str]) -> Trainer:
    """A trainer on this rank, which may be the only one."""
    config = parse_args(flags).config
    data = open_data(config)
    fit_vocabulary(config, data.tokenizer, given=False)
    return Trainer(config, data, ParallelContext.create(config.parallel, torch.device("cpu")))


# ---------------------------------------------------------------------------------------------------------------------
# Skipped steps


def test_one_skip_too_many_ends_the_run():
    counter = SkipCounter(limit=2)
    counter.skipped(1, "loss")
    counter.skipped(2, "loss")
    counter.made()
    counter.skipped(4, "loss")
    continued = SkipCounter(limit=2, consecutive=counter.consecutive)
    continued.skipped(5, "loss")
    with pytest.raises(
        NumericalError, match=r"steps 4 to 6 were not finite.*--max-consecutive-skips 2.*: gradient of x"
    ):
        continued.skipped(6, "gradient of x (rank 1)")


def test_with_no_skips_allowed_the_first_ends_the_run():
    with pytest.raises(NumericalError, match="steps 7 to 7"):
        SkipCounter(limit=0).skipped(7, "loss")


def _describe(rank, flags):
    trainer = make_trainer(flags)
    trainer.train_step()
    batch = trainer.train_loader.step_batch(0)
    factor = torch.tensor(1.0)

    def faults(loss_rank=None, gradient_rank=None, tensors=1):
        trainer.optimizer.zero_grad()
        sums = trainer.model.forward_backward(batch, factor)
        trainer.model.finish_gradients()
        if rank == loss_rank:
            sums[0] = math.nan
        if rank == gradient_rank:
            for p in trainer.parameters[:tensors]:
                p.parameter.grad.view(-1)[-1] = math.inf
        return describe_nonfinite(trainer.parameters, sums, trainer.context)

    name = trainer.parameters[0].name
    assert faults() == "gradient norm (all gradients are finite)"
    assert faults(loss_rank=1) == "loss (rank 1)"
    assert faults(gradient_rank=0) == f"gradient of {name} (rank 0)"
    both = faults(loss_rank=0, gradient_rank=1, tensors=3)
    assert both == f"loss (rank 0) and gradient of {name} and 2 more (rank 1)"


def test_what_is_not_finite_is_named(byte_dataset: Path):
    layout = Layout(dp=2, sharding="no_shard")
    run_distributed(_describe, 2, [*layout.flags, "--data-path", str(byte_dataset), "--train-iters", "2"])


# ---------------------------------------------------------------------------------------------------------------------
# Loss spikes

RANGES = [(80, 83), (90, 93)]


def wave(step: int) -> float:
    """Losses of mean 3 and standard deviation 0.1."""
    return 3.0 + 0.1 * math.sqrt(2) * math.sin(step)


def feed(detector: SpikeDetector, losses: list[float]) -> list[Spike]:
    found = [detector.check(step, loss, RANGES) for step, loss in enumerate(losses)]
    return [spike for spike in found if spike is not None]


@pytest.mark.parametrize(("deviations", "spikes"), [(5.5, 0), (6.5, 1), (-20, 0), (math.nan, 0), (math.inf, 0)])
def test_six_deviations_above_the_mean_are_a_spike(deviations: float, spikes: int):
    detector = SpikeDetector(6.0)
    assert feed(detector, [wave(step) for step in range(200)]) == []
    spike = detector.check(200, 3.0 + 0.1 * deviations, RANGES)
    assert (spike is not None) == spikes
    if spike is not None:
        row = spike.row()
        assert row["loss_spike_mean"] == pytest.approx(3.0, abs=0.01)
        assert row["loss_spike_std"] == pytest.approx(0.1, abs=0.005)
        assert row | {"iteration": 200, "loss_spike": 3.65, "sample_ids": [[80, 83], [90, 93]]} == row
        assert json.loads(json.dumps(row)) == row
        text = "step 200: loss 3.6500 is far above the mean 2.9992 before it (standard deviation 0.0998)"
        assert str(spike) == f"{text}, samples 80-83 90-93"


def test_spikes_do_not_hide_the_next_ones():
    losses = [9.0 if step >= 100 and step % 25 == 0 else wave(step) for step in range(1000)]
    found = feed(SpikeDetector(6.0), losses)
    assert [spike.iteration for spike in found] == list(range(100, 1000, 25))


def test_a_lasting_new_level_is_not_reported_for_ever():
    detector = SpikeDetector(6.0)
    found = feed(detector, [*(wave(step) for step in range(100)), *(wave(step) + 2.0 for step in range(200))])
    assert [spike.iteration for spike in found] == list(range(100, 100 + len(found)))
    assert 1 < len(found) < 100
    before = list(detector.losses)
    assert detector.check(300, math.nan, RANGES) is None and detector.losses == before


def test_nothing_is_found_before_there_are_32_losses():
    detector = SpikeDetector(6.0)
    assert feed(detector, [*(wave(step) for step in range(31)), 100.0]) == []
    assert len(feed(SpikeDetector(6.0), [*(wave(step) for step in range(32)), 100.0])) == 1


def test_a_flat_or_falling_curve_has_no_spikes():
    flat = SpikeDetector(6.0)
    assert feed(flat, [2.0] * 200) == []
    assert flat.check(200, 2.0 * 1.059, RANGES) is None
    assert flat.check(201, 2.0 * 1.061, RANGES) is not None
    noise = random.Random(0)
    assert feed(SpikeDetector(6.0), [2 + 8 / (1 + step / 50) + noise.gauss(0, 0.05) for step in range(2000)]) == []


def test_only_the_last_128_losses_count():
    detector = SpikeDetector(6.0)
    feed(detector, [100.0] * 50 + [wave(step) for step in range(128)])
    assert detector.losses == [wave(step) for step in range(128)]
    assert detector.check(200, 4.0, RANGES) is not None


def test_zero_turns_it_off():
    assert feed(SpikeDetector(0.0), [2.0] * 200 + [1e9]) == []


def test_a_continued_run_decides_the_same():
    noise = random.Random(1)
    losses = [3.0 + noise.gauss(0, 0.1) + 2.0 * (noise.random() < 0.02) for _ in range(400)]
    whole = SpikeDetector(6.0)
    expected = feed(whole, losses)
    assert len(expected) > 3
    first = SpikeDetector(6.0)
    found = feed(first, losses[:211])
    second = SpikeDetector(6.0, json.loads(json.dumps(first.losses)))
    found += [s for step in range(211, 400) if (s := second.check(step, losses[step], RANGES)) is not None]
    assert found == expected
    assert second.losses == whole.losses


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are computed twice


def checked_step(trainer: Trainer, disturb=lambda run: None) -> torch.Tensor:
    """A step's gradients by `checked_gradients`; `disturb` is called after each of the two computations."""
    trainer.optimizer.zero_grad()
    batch = trainer.train_loader.step_batch(0)
    factor = trainer.loss_scaler.scale / (batch.labels >= 0).sum()
    runs = []

    def forward_backward():
        trainer.model.seed_dropout(trainer.progress.iteration)
        sums = trainer.model.forward_backward(batch, factor)
        runs.append(sums)
        disturb(len(runs))
        return sums

    finish = trainer.model.finish_gradients
    trainer.model.overlap_reduction(False)
    try:
        return checked_gradients(forward_backward, finish, trainer.parameters, trainer.context, step=17)
    finally:
        trainer.model.overlap_reduction(True)


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    return [local_tensor(p.parameter.grad).clone() for p in trainer.parameters]


def _compare_with_plain_step(rank, runs):
    for flags in runs:
        trainer = make_trainer(flags)
        checked_sums = checked_step(trainer)
        found = gradients(trainer)
        trainer.optimizer.zero_grad()
        batch = trainer.train_loader.step_batch(0)
        trainer.model.seed_dropout(trainer.progress.iteration)
        sums = trainer.model.forward_backward(batch, trainer.loss_scaler.scale / (batch.labels >= 0).sum())
        trainer.model.finish_gradients()
        assert torch.equal(sums, checked_sums), flags
        for p, one, other in zip(trainer.parameters, found, gradients(trainer), strict=True):
            assert torch.equal(one, other), (p.name, flags)
        trainer.train_step()


DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
ALONE = (Layout(), Layout(recompute="full"), Layout(precision="bf16"), Layout(precision="fp16"))
PAIRS = (
    Layout(tp=2, sp=True),
    Layout(pp=2, schedule="zbv", variant="tied"),
    Layout(dp=2, sharding="no_shard"),
    Layout(dp=2, sharding="optim_grads_params", precision="bf16"),
)
MORE_PAIRS = (
    Layout(tp=2, precision="bf16", recompute="selective"),
    Layout(pp=2, schedule="1f1b", recompute="full"),
    Layout(dp=2, sharding="optim"),
    Layout(dp=2, sharding="optim_grads"),
)
FOURS = (Layout(pp=2, schedule="interleaved-zb", stages=2, dp=2, sharding="optim_grads", variant="tied"),)
SLOW = [pytest.param(layouts, marks=pytest.mark.slow) for layouts in (MORE_PAIRS, FOURS)]


@pytest.mark.parametrize("layouts", [ALONE, PAIRS, *SLOW])
def test_no_false_alarms_and_the_gradients_of_a_plain_step(byte_dataset: Path, layouts: tuple[Layout, ...]):
    runs = [[*layout.flags, *DROPOUT, "--data-path", str(byte_dataset), "--train-iters", "9"] for layout in layouts]
    if layouts[0].world_size == 1:
        _compare_with_plain_step(0, runs)
    else:
        run_distributed(_compare_with_plain_step, layouts[0].world_size, runs)


def _messages(rank, runs):
    """What a fault in the second computation on the last rank is reported as, and which tensor had it."""
    found = []
    for flags in runs:
        trainer = make_trainer(flags)
        name = ""

        def disturb(run):
            nonlocal name
            if rank == 1 and run == 2:
                p = trainer.parameters[-2]  # noqa: B023
                name = p.name
                gradient = local_tensor(p.parameter.grad).view(-1)
                gradient[3] = torch.nextafter(gradient[3], torch.tensor(math.inf))

        with pytest.raises(NumericalError) as error:
            checked_step(trainer, disturb)
        found.append((str(error.value), name))
    return found


@pytest.mark.parametrize("layouts", [PAIRS, pytest.param(MORE_PAIRS, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_named_with_its_rank_on_all_ranks(byte_dataset: Path, layouts: tuple[Layout, ...]):
    runs = [[*layout.flags, "--data-path", str(byte_dataset), "--train-iters", "9"] for layout in layouts]
    first, second = run_distributed(_messages, 2, runs)
    assert [message for message, _ in first] == [message for message, _ in second]
    for message, name in second:
        start, _, fault = message.partition(" from the same batch and came out differently: ")
        assert start == "step 17 was computed twice"
        assert re.match(rf"rank 1: gradient of {name} \(1 of \d+ elements, by up to \S+\)\. ", fault), message


def test_a_fault_in_the_sum_over_ranks_is_told_apart(byte_dataset: Path):
    trainer = make_trainer([*Layout().flags, "--data-path", str(byte_dataset), "--train-iters", "9"])
    finished = []

    def finish():
        finished.append(trainer.parameters[0].parameter.grad)
        if len(finished) == 2:
            finished[1][0, :2] = math.nan

    def forward_backward():
        return trainer.model.forward_backward(trainer.train_loader.step_batch(0), torch.tensor(1.0))

    with pytest.raises(NumericalError, match=r"rank 0 after the sum over ranks: gradient of \S+ \(2 of .*by up to nan"):
        checked_gradients(forward_backward, finish, trainer.parameters, trainer.context, 1)


def test_nan_equals_itself(byte_dataset: Path):
    trainer = make_trainer([*Layout().flags, "--data-path", str(byte_dataset), "--train-iters", "9"])

    def disturb(run):
        trainer.parameters[0].parameter.grad[0] = math.nan

    checked_step(trainer, disturb)
    assert trainer.parameters[0].parameter.grad[0].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def ids_read(patch: pytest.MonkeyPatch, trainer_run) -> list[list[int]]:
    """Sample ids of every step of a run."""
    found = []
    step_batch = Prefetcher.step_batch

    def recorded(prefetcher, first_sample):
        found.append(prefetcher.loader.sample_ids(first_sample).reshape(-1).tolist())
        return step_batch(prefetcher, first_sample)

    patch.setattr(Prefetcher, "step_batch", recorded)
    trainer_run()
    return found


def test_samples_of_a_spike_are_logged_and_can_be_left_out(
    byte_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    compute = DistributedModel.forward_backward
    calls = []

    def spiked(*arguments):
        calls.append(arguments)
        return compute(*arguments) * (9.0 if len(calls) == 39 else 1.0)

    save = tmp_path / "save"
    flags = [
        *TINY,
        "--data-path",
        str(byte_dataset),
        "--save",
        str(save),
        "--save-interval",
        "36",
        "--log-interval",
        "9",
    ]
    flags += ["--lr", "1e-3", "--eval-iters", "0", "--micro-batch-size", "4", "--train-iters", "40"]
    with monkeypatch.context() as patch:
        patch.setattr(DistributedModel, "forward_backward", spiked)
        first = ids_read(patch, lambda: run_here(flags))
    (row,) = [row for row in map(json.loads, (save / "metrics.jsonl").open()) if "loss_spike" in row]
    assert row["iteration"] == 39
    assert row["sample_ids"] == [[152, 155]] == [[first[38][0], first[38][-1]]]

    shutil.rmtree(save / "iter_0000040")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        outputs = []
        again = ids_read(patch, lambda: outputs.append(run_here([*flags, "--skip-samples", "152-155"])))
    assert again == [*first[36:38], [156, 157, 158, 159], [160, 161, 162, 163]]
    assert "--skip-samples" not in outputs[0].stderr


def test_checking_changes_nothing_and_ends_a_run_with_status_4(
    byte_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(save: str, *more: str):
        flags = [*TINY, *DROPOUT, "--data-path", str(byte_dataset), "--train-iters", "6", "--eval-iters", "0"]
        return run_here([*flags, "--save", str(tmp_path / save), *more])

    assert run("plain").returncode == 0
    assert run("checked", "--check-determinism-interval", "2").returncode == 0
    expected = checkpoint_tensors(tmp_path / "plain")
    for name, tensor in checkpoint_tensors(tmp_path / "checked").items():
        assert torch.equal(tensor, expected[name]), name

    monkeypatch.setattr(DistributedModel, "seed_dropout", lambda model, step: None)  # masks go on and on
    failed = run("failed", "--check-determinism-interval", "2")
    assert failed.returncode == 4
    assert (
        "error: step 2 was computed twice from the same batch and came out differently: rank 0: loss (" in failed.stderr
    )
    assert not (tmp_path / "failed" / "finished").exists()
