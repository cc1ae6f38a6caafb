"""R5: NaN and Inf in the loss, in one rank's gradient, in one microbatch, on several layouts.

All ranks must skip the same steps, with weights and optimizer state untouched bit for bit, count them in the metrics
and, when it does not end, stop with the checkpoints intact, from which the run continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing import published_checkpoints, verify_checkpoint
from megatron.core.errors import NumericalError
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor
from megatron.training.arguments import parse_args
from megatron.training.training import Trainer, pretrain_in
from tests.corpora import make_byte_dataset, write_prose
from tests.distributed import run_distributed
from tests.layouts.comparison import metrics, one_thread
from tests.layouts.layout import Layout

KINDS = ("loss", "gradient", "microbatch")
VALUES = (math.nan, math.inf, -math.inf)
LAYOUTS = (  # and a rank that computes losses
    (Layout(), 0),
    (Layout(dp=2, sharding="no_shard"), 1),
    (Layout(dp=2, sharding="optim_grads_params"), 1),
    (Layout(tp=2, sp=True), 1),
    (Layout(pp=2, schedule="1f1b"), 1),
    (Layout(pp=2, schedule="zbv", variant="tied"), 0),
)
STEPS, FAULTY_STEP = 5, 3
# Of the runs that are stopped: faulty from a step on, and so many skips are borne.
FIRST_FAULTY_STEP, MAX_SKIPS, SAVE_INTERVAL = 4, 3, 3
LAST_STEP = FIRST_FAULTY_STEP + MAX_SKIPS


@dataclass(frozen=True)
class Trial:
    """One run with a fault.

    Attributes:
        layout: The layout.
        rank: Where the fault is.
        kind: What is not finite.
        value: What it is instead.
        endless: In every step from `FIRST_FAULTY_STEP` on, instead of in `FAULTY_STEP`.
    """

    layout: Layout
    rank: int
    kind: str
    value: float
    endless: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.layout.name}: {self.value} in the {self.kind} on rank {self.rank}"

    def faulty(self, step: int) -> bool:
        """Whether step number `step` has the fault."""
        return step >= FIRST_FAULTY_STEP if self.endless else step == FAULTY_STEP

    def flags(self, save: Path, data_path: Path) -> list[str]:
        """Of the run."""
        run = ["--data-path", str(data_path), "--eval-iters", "0", "--hidden-dropout", "0.1"]
        if self.endless:
            run += ["--train-iters", "9", "--save", str(save), "--save-interval", str(SAVE_INTERVAL)]
            run += ["--max-consecutive-skips", str(MAX_SKIPS)]
        else:
            run += ["--train-iters", str(STEPS), "--metrics-file", str(save / "metrics.jsonl")]
        return [*self.layout.flags, *run]


# ---------------------------------------------------------------------------------------------------------------------
# On each rank


@contextlib.contextmanager
def injected(trainer: Trainer, kind: str, value: float) -> Iterator[None]:
    """Within it, this rank computes `value` somewhere in what `kind` names."""
    model = trainer.model
    with pytest.MonkeyPatch.context() as patch:
        if kind == "loss":
            compute = model.forward_backward
            patch.setattr(model, "forward_backward", lambda *a, **k: _poisoned(compute(*a, **k), value))
        elif kind == "gradient":
            finish = model.finish_gradients
            largest = max(trainer.parameters, key=lambda p: local_tensor(p.parameter.detach()).numel())
            patch.setattr(
                model, "finish_gradients", lambda: (_poison(local_tensor(largest.parameter.grad), value), finish())
            )
        else:
            block = next(block for stage in model.stages for block in stage.blocks)
            calls = []

            def second_microbatch(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
                calls.append(module)
                return _poisoned(output, value) if len(calls) == 2 else output

            with block.register_forward_hook(second_microbatch):
                yield
            return
        yield


def _poison(tensor: torch.Tensor, value: float) -> None:
    tensor.view(-1)[tensor.numel() // 2] = value


def _poisoned(tensor: torch.Tensor, value: float) -> torch.Tensor:
    poison = torch.zeros_like(tensor)
    _poison(poison, value)
    return tensor + poison


def fingerprint(trainer: Trainer) -> str:
    """Of this rank's weights and optimizer state, all bits."""
    digest = hashlib.sha256()
    named = zip(trainer.optimizer.names, trainer.optimizer.parameters, strict=True)
    tensors = {f"{number}/{name}": parameter for number, (name, parameter) in enumerate(named)}  # copies have one name
    for name, tensor in sorted((tensors | trainer.optimizer.named_state()).items()):
        digest.update(name.encode() + local_tensor(tensor.detach()).contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_trials(rank: int, trials: Sequence[Trial], folder: Path, data_path: Path) -> list[dict[str, Any]]:
    """What each trial did on this rank: whether each step changed anything, and the error that ended it."""
    return [_run_trial(rank, trial, trial.flags(folder / str(n), data_path)) for n, trial in enumerate(trials)]


def _run_trial(rank: int, trial: Trial, flags: list[str]) -> dict[str, Any]:
    changed: dict[int, bool] = {}  # by step, whether weights or state did
    skips: dict[int, int] = {}  # by step, how many there have been
    train_step = Trainer.train_step

    def step(trainer: Trainer) -> bool:
        number, before = trainer.progress.iteration + 1, fingerprint(trainer)
        here = trial.faulty(number) and rank == trial.rank
        fault = injected(trainer, trial.kind, trial.value) if here else contextlib.nullcontext()
        try:
            with fault:
                return train_step(trainer)
        finally:
            changed[number], skips[number] = fingerprint(trainer) != before, trainer.progress.skipped_iterations

    error = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        try:
            _train(flags)
        except NumericalError as stopped:
            error = str(stopped)
    return {"changed": changed, "skips": skips, "error": error}


def _train(flags: list[str]) -> None:
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        config = parse_args(flags).config
        pretrain_in(ParallelContext.create(config.parallel, torch.device("cpu")), config)


def continue_trials(rank: int, runs: Sequence[list[str]]) -> None:
    """Run without faults."""
    for flags in runs:
        _train(flags)


# ---------------------------------------------------------------------------------------------------------------------
# What came of it


def _check(trial: Trial, outcomes: Sequence[dict[str, Any]], save: Path) -> None:
    """AssertionError: it is not as it should be."""
    steps = range(1, (LAST_STEP if trial.endless else STEPS) + 1)
    expected_skips, count = {}, 0
    for number in steps:
        count += trial.faulty(number)
        expected_skips[number] = count
    for rank, outcome in enumerate(outcomes):
        assert outcome["changed"] == {number: not trial.faulty(number) for number in steps}, (rank, outcome)
        assert outcome["skips"] == expected_skips, (rank, outcome)
    assert metrics(save, "skipped_iterations") == expected_skips
    errors = {outcome["error"] for outcome in outcomes}
    if not trial.endless:
        assert errors == {None}, errors
        return
    (message,) = errors
    assert f"steps {FIRST_FAULTY_STEP} to {LAST_STEP} were not finite" in message, message
    saved = [step for step in steps if step % SAVE_INTERVAL == 0]
    assert sorted(path.name for path in published_checkpoints(save)) == [f"iter_{step:07d}" for step in saved]
    assert not (save / "finished").exists()
    for path in published_checkpoints(save):
        verify_checkpoint(path)


def _check_continued(save: Path) -> None:
    """AssertionError: the run that continued from the last checkpoint did not reach its end in good health."""
    assert json.loads((save / "finished").read_text())["iteration"] == 9
    losses, skipped = metrics(save, "lm_loss"), metrics(save, "skipped_iterations")
    last_saved = LAST_STEP // SAVE_INTERVAL * SAVE_INTERVAL
    assert all(losses[step] is not None for step in range(last_saved + 1, 10)), losses
    assert skipped[9] == last_saved + 1 - FIRST_FAULTY_STEP, skipped


def run_all(trials: Sequence[Trial], folder: Path, data_path: Path) -> list[str]:
    """Run the trials, all of one number of ranks and endless or not, and return what went wrong."""
    ranks = trials[0].layout.world_size

    def everywhere(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if ranks == 1:
            with one_thread():
                return [function(0, *arguments)]
        return run_distributed(function, ranks, *arguments, timeout=600.0)

    by_rank = everywhere(run_trials, trials, folder, data_path)
    saves = [folder / str(number) for number in range(len(trials))]
    failures: dict[int, str] = {}

    def check(number: int, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except AssertionError as problem:
            failures[number] = f"{trials[number].name}: {problem}"

    for number, trial in enumerate(trials):
        check(number, _check, trial, [outcomes[number] for outcomes in by_rank], saves[number])
    if trials[0].endless:
        runs = [trial.flags(save, data_path) for trial, save in zip(trials, saves, strict=True)]
        everywhere(continue_trials, runs)
        for number, save in enumerate(saves):
            if number not in failures:
                check(number, _check_continued, save)
    return list(failures.values())


def all_trials(endless: bool) -> list[Trial]:
    """Every kind of fault on every layout: with every value, or, where faults are endless, with one of them."""
    places = [(layout, rank, kind) for layout, rank in LAYOUTS for kind in KINDS]
    if endless:
        return [Trial(*place, VALUES[number % 4 % 3], endless) for number, place in enumerate(places)]
    return [Trial(*place, value, endless) for place in places for value in VALUES]


def count() -> list[dict[str, Any]]:
    """Rows of the README's table."""
    rows = []
    what = {
        False: "NaN, Inf in loss, gradient or microbatch: all ranks skip the step, state untouched, counted",
        True: "the same in every step: all ranks stop at --max-consecutive-skips, checkpoints intact, run continues",
    }
    with tempfile.TemporaryDirectory() as name:
        data_path = make_byte_dataset(write_prose(Path(name, "corpus.jsonl")))
        for endless in (False, True):
            start, trials = time.perf_counter(), all_trials(endless)
            failures = []
            for ranks in (1, 2):
                batch = [trial for trial in trials if trial.layout.world_size == ranks]
                failures += run_all(batch, Path(name, f"{endless}-{ranks}"), data_path)
            row = {"test": "R5", "what": what[endless], "trials": len(trials), "passed": len(trials) - len(failures)}
            rows.append(row | {"seconds": round(time.perf_counter() - start, 1), "failures": failures})
    return rows
