"""Rows of numbers about a run, and where they go: a JSON lines file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron.core.errors import UserError
from megatron.core.file_utils import make_directory, publish_bytes
from megatron.training.config import LoggingConfig
from megatron.training.console import warn

# Dense bf16 peaks in TFLOP/s from the vendors' data sheets, by a part of torch's device name. A device that is not
# here has no utilisation reported rather than a wrong one.
# The first that is part of the name counts.
PEAK_TFLOPS = {
    "A100": 312.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GB200": 2500.0,
    "B200": 2250.0, "L40S": 362.0,
}  # fmt: skip


def device_peak_tflops(device: torch.device, config: LoggingConfig) -> float | None:
    """Peak of the device in TFLOP/s, or None when it is not known."""
    if config.device_peak_tflops is not None:
        return config.device_peak_tflops
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory of this process so far: allocated on the GPU, or resident on the host, in GiB (2**30 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB


class Sink(Protocol):
    """Takes the rows of a run."""

    def write(self, row: dict[str, Any]) -> None:
        """Take one row; `row["iteration"]` is its step."""

    def close(self) -> None:
        """Flush and release."""


class JsonlSink:
    """One JSON object a line.

    Rows that a continued run writes again are dropped first: those beyond the iteration it continues from, and at that
    one those of the splits whose evaluation it makes again. A row that cannot be written later is lost with a warning,
    for a run is worth more than its metrics.

    Args:
        path: The file.
        iteration: The iteration to continue from.
        pending: Splits that are evaluated again there.

    Raises:
        UserError: The file cannot be opened, or holds something else than metrics.
    """

    def __init__(self, path: Path, iteration: int, pending: Sequence[str] = ()) -> None:
        self._path, self._is_failing = path, False
        try:
            make_directory(path.parent)
            if path.exists():
                publish_bytes(path, self._rows_up_to(path, iteration, pending))
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"metrics file {path}: {error.strerror}; choose another with --metrics-file") from None

    @staticmethod
    def _rows_up_to(path: Path, iteration: int, pending: Sequence[str]) -> bytes:
        repeated = {f"{name}_lm_loss" for name in pending}

        def is_kept(row: dict[str, Any]) -> bool:
            return bool(row["iteration"] < iteration or (row["iteration"] == iteration and not repeated & row.keys()))

        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]  # a run was killed while it wrote this line
        try:
            return b"".join(line for line in lines if is_kept(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not a metrics file; choose another with --metrics-file") from None

    def write(self, row: dict[str, Any]) -> None:
        """Append `row` at once, so that a kill loses nothing that was reported; JSON has no NaN, so that is null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = (json.dumps(finite, allow_nan=False) + "\n").encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._is_failing = False
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)  # no half line
            if not self._is_failing:
                warn(f"metrics file {self._path}: {error.strerror}; rows are lost until it can be written again")
            self._is_failing = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Scalars for TensorBoard; what an interrupted run wrote beyond `iteration` is hidden.

    Raises:
        UserError: The package is missing, or the directory cannot be written.
    """

    def __init__(self, directory: str, iteration: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--tensorboard-dir needs the package tensorboard; install it or leave the flag out"
            ) from None
        try:
            self._writer = SummaryWriter(directory, purge_step=iteration + 1 if iteration else None)
        except OSError as error:
            raise UserError(
                f"--tensorboard-dir {directory}: {error.strerror}; give a directory that can be written"
            ) from None

    def write(self, row: dict[str, Any]) -> None:
        """Write every number of `row` at its iteration."""
        for key, value in row.items():
            if isinstance(value, int | float) and key != "iteration":
                self._writer.add_scalar(key, value, row["iteration"])

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WandbSink:
    """Scalars for Weights & Biases."""

    def __init__(self, project: str, name: str | None, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb-project needs the package wandb; install it or leave the flag out") from None
        try:
            self._run, self._step = wandb.init(project=project, name=name, config=config), 0
        except wandb.Error as error:  # not logged in, no connection
            reason = " ".join(str(error).split())
            raise UserError(f"--wandb-project {project}: {reason}; mend it, or set WANDB_MODE=offline") from None

    def write(self, row: dict[str, Any]) -> None:
        """Log `row` at its iteration, or at the latest one: rows of the past would be refused."""
        self._step = max(self._step, row["iteration"])
        self._run.log({k: v for k, v in row.items() if v is not None}, step=self._step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def build_sinks(
    config: LoggingConfig, save: str | None, iteration: int, pending: Sequence[str], run_config: dict[str, Any]
) -> list[Sink]:
    """The sinks that the flags ask for, for a run that continues from `iteration` with `pending` evaluations."""
    sinks: list[Sink] = []
    if config.tensorboard_dir:
        sinks.append(TensorBoardSink(config.tensorboard_dir, iteration))
    if config.wandb_project:
        sinks.append(WandbSink(config.wandb_project, config.wandb_exp_name, run_config))
    if config.metrics_file or save:
        sinks.append(JsonlSink(Path(config.metrics_file or f"{save}/metrics.jsonl"), iteration, pending))
    return sinks
