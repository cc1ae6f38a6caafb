"""Training in several layouts, and how far the results are from each other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.core.dist_checkpointing import latest_checkpoint, load_checkpoint, read_manifest
from megatron.core.dist_checkpointing.format import DTYPES
from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain_in
from tests.distributed import run_distributed
from tests.layouts.layout import NUM_HEADS, Layout


def train_here(rank: int, runs: Sequence[list[str]]) -> list[str | None]:
    """Train with each of the flags in turn, in this process or this rank of a process group that exists already.

    Returns:
        For each run, None or the user's mistake that ended it.
    """
    return [_train(flags) for flags in runs]


def _train(flags: list[str]) -> str | None:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            config = parse_args(flags).config
            pretrain_in(ParallelContext.create(config.parallel, torch.device("cpu")), config)
        except UserError as mistake:
            return str(mistake)
    return None


STEPS = 20
# Largest relative difference of the losses and of a parameter, by precision. Rounding alone makes up to a third of it:
# see one process with and without microbatches in the table.
LIMITS = {"fp32": (1e-6, 1e-5), "bf16": (3e-3, 2e-2), "fp16": (3e-4, 5e-3)}


def train(world_size: int, runs: Sequence[list[str]], timeout: float = 300.0) -> list[str | None]:
    """`train_here` on `world_size` processes; one process is this one."""
    if world_size == 1:
        return train_here(0, runs)
    outcomes = run_distributed(train_here, world_size, runs, timeout=timeout)
    assert all(outcome == outcomes[0] for outcome in outcomes), f"ranks disagree: {outcomes}"
    return list(outcomes[0])


def metrics(save: Path, key: str) -> dict[int, float]:
    """Values of `key` by iteration, from the metrics of a run."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row[key] for row in rows if key in row}


def checkpoint_tensors(save: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint of a run, whole, by its name in the checkpoint."""
    path = latest_checkpoint(save)
    assert path is not None
    entries = read_manifest(path)["tensors"]
    tensors = {name: torch.zeros(e["shape"], dtype=DTYPES[e["dtype"]]) for name, e in entries.items()}
    load_checkpoint(path, tensors)
    return tensors


@dataclass(frozen=True)
class Difference:
    """How far a run is from another one; all numbers are relative.

    Attributes:
        loss: Largest difference of the training loss of a step.
        grad_norm: Largest difference of the gradient norm of a step.
        validation_loss: Difference of the loss on the validation split at the end.
        parameter: Largest `||a - b|| / ||b||` of a parameter at the end.
        parameter_name: Of which parameter.
        optimizer_state: Largest `||a - b|| / ||b||` of a tensor of the optimizer's state at the end.
    """

    loss: float
    grad_norm: float
    validation_loss: float
    parameter: float
    parameter_name: str
    optimizer_state: float


def difference(save: Path, reference: Path) -> Difference:
    """How far the run that was saved in `save` is from the one in `reference`."""
    found, expected = checkpoint_tensors(save), checkpoint_tensors(reference)
    assert found.keys() == expected.keys()
    tensors = {name: _relative_norm(found[name], value, name) for name, value in expected.items()}
    parameters = {name: value for name, value in tensors.items() if name.startswith("model/")}
    worst = max(parameters, key=lambda name: parameters[name])
    return Difference(
        loss=_relative(save, reference, "lm_loss"),
        grad_norm=_relative(save, reference, "grad_norm"),
        validation_loss=_relative(save, reference, "validation_lm_loss"),
        parameter=parameters[worst],
        parameter_name=worst.removeprefix("model/"),
        optimizer_state=max((v for name, v in tensors.items() if name not in parameters), default=0.0),
    )


def _relative(save: Path, reference: Path, key: str) -> float:
    found, expected = metrics(save, key), metrics(reference, key)
    assert found.keys() == expected.keys()
    return max((abs(found[step] - value) / abs(value) for step, value in expected.items()), default=0.0)


def _relative_norm(found: torch.Tensor, expected: torch.Tensor, name: str) -> float:
    found, expected = (_without_key_bias(tensor, name).double() for tensor in (found, expected))
    scale = expected.norm().item()
    distance = (found - expected).norm().item()
    return distance / scale if scale else float(distance > 0.0)


def _without_key_bias(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`tensor` without the part of a key projection's bias, and what belongs to it.

    A key's bias shifts all scores of a query alike, so its gradient is zero but for rounding, and its steps are noise.
    """
    for suffix, matrices in ((".qkv.bias", "qkv"), (".kv.bias", "kv")):
        if name.endswith(suffix):
            rows = tensor.unflatten(0, (NUM_HEADS, len(matrices), -1))  # (head, q|k|v, d)
            return rows[:, [index for index, matrix in enumerate(matrices) if matrix != "k"]]
    return tensor


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, as every process of a larger layout does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Row:
    """What came of one layout.

    Attributes:
        layout: The layout.
        difference: How far it is from its reference.
        refusal: Why it was refused, as the user is told.
        failure: How it failed, which is a bug.
    """

    layout: Layout
    difference: Difference | None = None
    refusal: str | None = None
    failure: str | None = None

    @property
    def within_limits(self) -> bool:
        """Whether it runs and equals its reference as `LIMITS` asks for."""
        if self.difference is None:
            return False
        loss, parameter = LIMITS[self.layout.precision]
        return (
            max(self.difference.loss, self.difference.validation_loss) < loss and self.difference.parameter < parameter
        )


def compare(
    layouts: Sequence[Layout], data_path: Path, folder: Path, steps: int = STEPS, timeout: float = 300.0
) -> list[Row]:
    """Train in `layouts`, all of one world size, in one start of the processes, and compare each with its reference.

    References are trained when `folder` does not hold them yet; the other runs are removed from it.
    """
    with one_thread():
        for reference in dict.fromkeys(layout.reference for layout in layouts):
            if not _save(folder, reference).exists():
                (mistake,) = train(1, [_flags(reference, data_path, folder, steps)])
                assert mistake is None, mistake
        runs = [layout for layout in layouts if layout != layout.reference]
        mistakes = train(layouts[0].world_size, [_flags(layout, data_path, folder, steps) for layout in runs], timeout)
    return [_row(layout, mistake, folder) for layout, mistake in zip(runs, mistakes, strict=True)]


def _row(layout: Layout, mistake: str | None, folder: Path) -> Row:
    if mistake is not None:
        return Row(layout, refusal=mistake)
    save = _save(folder, layout)
    row = Row(layout, difference(save, _save(folder, layout.reference)))
    shutil.rmtree(save)
    return row


def _save(folder: Path, layout: Layout) -> Path:
    key = hashlib.sha256(repr(layout).encode()).hexdigest()[:12]
    return folder / key


def _flags(layout: Layout, data_path: Path, folder: Path, steps: int) -> list[str]:
    length = f"--train-iters {steps} --eval-interval {steps} --eval-iters 1".split()
    return [*layout.flags, *length, "--data-path", str(data_path), "--save", str(_save(folder, layout))]
