"""R16: nothing but dropout draws from the global random number generators, and dropout does not depend on their state.

A draw in a loader, an evaluation or a save would make a run depend on how often it does these things, and a continued
run differ from an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.core.datasets.loader import T5Loader
from megatron.core.datasets.prefetch import Prefetcher
from megatron.core.parallel_state import ParallelContext
from megatron.training import training
from megatron.training.arguments import parse_args
from megatron.training.training import Trainer, pretrain_in
from tests.corpora import make_byte_dataset, write_prose
from tests.distributed import run_distributed
from tests.layouts.comparison import checkpoint_tensors, metrics, one_thread
from tests.layouts.layout import Layout

LAYOUTS = (
    Layout(),
    Layout(dp=2, sharding="no_shard"),
    Layout(dp=2, sharding="optim_grads"),
    Layout(tp=2),
    Layout(tp=2, sp=True, recompute="full"),
    Layout(pp=2, schedule="zbv"),
)
OPERATIONS: tuple[tuple[Any, str, str], ...] = (
    (training, "open_data", "opening the data"),
    (Trainer, "__init__", "making the model"),
    (Trainer, "start", "start, resume"),
    (T5Loader, "step_batch", "training batch"),
    (T5Loader, "evaluation_batches", "evaluation batches"),
    (Trainer, "evaluate", "evaluation"),
    (Trainer, "report", "logging"),
    (Trainer, "save", "save"),
    (Trainer, "close", "end"),
)


def generator_states() -> tuple[bytes, bytes, bytes]:
    """States of the global generators of Python, NumPy and torch."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()  # noqa: NPY002
    return tuple(map(pickle.dumps, states))  # type: ignore[return-value]


def disturb() -> None:
    """Draw from all global generators."""
    random.random()
    np.random.random()  # noqa: NPY002
    torch.rand(())


class Watch:
    """Wraps functions and notes whether they leave the states of the generators alone.

    Attributes:
        calls: Of each operation.
        draws: Of these calls, the ones that changed a state.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.draws: Counter[str] = Counter()

    def wrap(self, patch: pytest.MonkeyPatch, owner: Any, attribute: str, operation: str) -> None:
        """Replace `owner.attribute`, also where it is a generator function."""
        function = getattr(owner, attribute)

        def watched(*args: Any, **options: Any) -> Any:
            before = generator_states()
            result = function(*args, **options)
            if attribute == "evaluation_batches":
                result = list(result)
            self.calls[operation] += 1
            self.draws[operation] += generator_states() != before
            return result

        patch.setattr(owner, attribute, watched)


def _train(flags: Sequence[str]) -> None:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        config = parse_args(flags).config
        pretrain_in(ParallelContext.create(config.parallel, torch.device("cpu")), config)


def watch_run(rank: int, runs: Sequence[Sequence[str]]) -> tuple[Counter[str], Counter[str], int]:
    """Calls and draws of each operation in some runs, and how many training steps drew."""
    watch, steps = Watch(), Watch()
    with pytest.MonkeyPatch.context() as patch:
        # In the thread of the step: the generators are common to all, and a draw of the step would seem the batch's.
        patch.setattr(training, "Prefetcher", functools.partial(Prefetcher, ahead=0))
        for owner, attribute, operation in OPERATIONS:
            watch.wrap(patch, owner, attribute, operation)
        steps.wrap(patch, Trainer, "train_step", "step")
        for flags in runs:
            disturb()
            _train(flags)
    return watch.calls, watch.draws, steps.draws["step"]


def run_disturbed(rank: int, flags: Sequence[str]) -> None:
    """A run between whose steps somebody draws from all generators, differently often on each rank."""
    train_step = Trainer.train_step

    def step(trainer: Trainer) -> Any:
        for _ in range(trainer.progress.iteration + rank):
            disturb()
        return train_step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        _train(flags)


def _everywhere(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    if ranks == 1:
        with one_thread():
            return [function(0, *arguments)]
    return run_distributed(function, ranks, *arguments, timeout=300.0)


def check_layout(layout: Layout, folder: Path, data_path: Path) -> tuple[Counter[str], list[str], str]:
    """A run in two parts, watched, and the same run in one part, disturbed.

    Returns:
        Calls of each operation over all ranks, those that drew, and how the disturbed run differs (or nothing).
    """

    def flags(save: str, steps: int) -> list[str]:
        run = ["--data-path", str(data_path), "--save", str(folder / save), "--train-iters", str(steps)]
        run += ["--save-interval", "2", "--eval-interval", "2", "--eval-iters", "1", "--lr-decay-iters", "6"]
        return [*layout.flags, *run, "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]

    runs = [flags("watched", 4), [*flags("watched", 6), "--async-save"]]
    calls: Counter[str] = Counter()
    drew: list[str] = []
    for rank, (rank_calls, rank_draws, step_draws) in enumerate(_everywhere(layout.world_size, watch_run, runs)):
        assert step_draws > 0, "dropout draws, so that the watch must have seen it"
        assert set(rank_calls) == {operation for _, _, operation in OPERATIONS}, rank_calls
        calls += rank_calls
        drew += [f"{layout.name}, rank {rank}: {operation} drew {n} times" for operation, n in rank_draws.items() if n]
    _everywhere(layout.world_size, run_disturbed, flags("disturbed", 6))
    return calls, drew, _difference(folder / "watched", folder / "disturbed")


def _difference(save: Path, other: Path) -> str:
    losses = metrics(save, "lm_loss"), metrics(other, "lm_loss")
    tensors, others = checkpoint_tensors(save), checkpoint_tensors(other)
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    if losses[0] == losses[1] and not different:
        return ""
    return f"disturbed run differs in {', '.join(['losses'] * (losses[0] != losses[1]) + different[:3])}"


def count(layouts: Sequence[Layout] = LAYOUTS) -> list[dict[str, Any]]:
    """Rows of the README's table."""
    start, calls, drew, differing = time.perf_counter(), Counter[str](), [], []
    with tempfile.TemporaryDirectory() as name:
        data_path = make_byte_dataset(write_prose(Path(name, "corpus.jsonl")))
        for number, layout in enumerate(layouts):
            layout_calls, layout_draws, difference = check_layout(layout, Path(name, str(number)), data_path)
            calls += layout_calls
            drew += layout_draws
            differing += [f"{layout.name}: {difference}"] if difference else []
    seconds = round(time.perf_counter() - start, 1)
    number_drawing = sum(int(text.rsplit(" ", 2)[1]) for text in drew)
    return [
        {
            "test": "R16", "what": f"calls that leave all generators alone: {', '.join(calls)}",
            "trials": calls.total(), "passed": calls.total() - number_drawing, "seconds": seconds, "failures": drew,
        },
        {
            "test": "R16", "what": "runs whose generators others draw from between steps end with the same bits",
            "trials": len(layouts), "passed": len(layouts) - len(differing), "seconds": seconds, "failures": differing,
        },
    ]  # fmt: skip
