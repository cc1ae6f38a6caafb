"""Training with dropout in several layouts: other masks, the same loss on average."""

from __future__ import annotations

import shlex
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.layouts.comparison import metrics, one_thread, train
from tests.layouts.layout import Layout

STEPS, LAST, SEEDS = 200, 50, 8
FLAGS = shlex.split(
    "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 8 "
    "--ffn-hidden-size 64 --encoder-seq-length 33 --split 90,10,0 --log-interval 1 --eval-iters 0 "
    f"--micro-batch-size 4 --global-batch-size 8 --train-iters {STEPS}"
)
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
LAYOUTS = (Layout(), Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2, schedule="1f1b"), Layout(dp=2))


@dataclass(frozen=True)
class Sample:
    """Final losses of one layout, one for each seed: the mean training loss of the last steps.

    Attributes:
        name: The layout, for people.
        losses: In the order of the seeds.
    """

    name: str
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.losses)

    def differences(self, other: Sample) -> tuple[float, float]:
        """Mean over the seeds of this loss minus that of `other`, and its standard error.

        A seed has the same initial weights and data in both, so that only the masks differ.
        """
        pairs = [a - b for a, b in zip(self.losses, other.losses, strict=True)]
        return statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5


def measure_dropout(data_path: Path, folder: Path, write: Callable[[dict[str, Any]], None]) -> list[Sample]:
    """Final losses of all layouts; the first is one process, the last one process without dropout."""
    samples = []
    for layout, dropout in [*((layout, DROPOUT) for layout in LAYOUTS), (Layout(), [])]:
        name = "one process" if layout == Layout() else layout.name
        name += "" if dropout else ", no dropout"
        saves = [folder / f"{len(samples)}-{seed}" for seed in range(SEEDS)]
        runs = [
            [*FLAGS, *dropout, *layout.parallel_flags, "--seed", str(seed), *_files(data_path, save)]
            for seed, save in enumerate(saves)
        ]
        for save in saves:
            save.mkdir()
        with one_thread():
            mistakes = train(layout.world_size, runs, timeout=900.0)
        assert not any(mistakes), mistakes
        samples.append(Sample(name, tuple(final_loss(save) for save in saves)))
        write({"name": name, "losses": samples[-1].losses})
        for save in saves:
            shutil.rmtree(save)
    return samples


def _files(data_path: Path, save: Path) -> list[str]:
    return ["--data-path", str(data_path), "--metrics-file", str(save / "metrics.jsonl")]


def final_loss(save: Path) -> float:
    """Mean training loss of the last steps of a run."""
    losses = metrics(save, "lm_loss")
    assert len(losses) == STEPS
    return statistics.mean(losses[step] for step in range(STEPS - LAST + 1, STEPS + 1))
