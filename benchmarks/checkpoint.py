"""Time to save and load a checkpoint against plain copies of the same bytes on the same disk.

The checkpoint is a T5 model's with Adam state, of one process. Contenders take turns, in another random order each
round; rows are medians over the rounds, of which the first is left out. What a copy reads is in the page cache, so that
it only has to write. Before each turn everything is on the disk (sync) and the disk rests, since one that is rented
may be faster for a while after a rest; before loads and reads the files are dropped from the page cache. Saves and the
copy count until fsync has returned.

    save              CheckpointSaver, synchronous
    copy              shutil.copyfile of the checkpoint's files, fsync
    asynchronous save CheckpointSaver with a thread; the rest of the process is idle
      first, prepared   first save of a run, after the host memory has been taken in the background
      first             first save of a run that comes before that
    load              load_checkpoint; checksums compared first or not
    read              the files, 8 MiB at a time into the same memory

`pause_s` is how long training stands still: with the asynchronous save, until `save` returns. The next optimizer step
may not begin before `copied_s` after the call; the forward and backward passes before it run beside the copies, and
where they are shorter, the pause is longer by the difference. Prints one JSON object a row, and a table. Run it on a
machine without other work: its load averages are in the rows.

    python benchmarks/checkpoint.py [--output benchmarks/results/checkpoint.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.config import ModelConfig
from megatron.core.dist_checkpointing import CheckpointSaver, load_checkpoint, verify_checkpoint
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_presets import PRESETS
from megatron.core.parallel_state import ParallelContext

CONTEXT = ParallelContext(torch.device("cpu"))
BLOCK_BYTES = 8 * 2**20
SAVE, COPY, READ, LOAD = "save", "copy", "read", "load"
ASYNCHRONOUS = "asynchronous save"


def state_of_training(preset: str) -> dict[str, torch.Tensor]:
    """Random values for what a run with Adam saves, by checkpoint name."""
    with torch.device("meta"):
        model = T5Model(ModelConfig(**PRESETS[preset]))  # type: ignore[arg-type]
    return {
        f"{kind}/{name}": torch.randn(parameter.shape)
        for kind in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
        for name, parameter in model.named_parameters()
    }


def forget(directory: Path) -> None:
    """Drop the files of `directory`, which are on the disk, from the page cache."""
    os.sync()
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_files(directory: Path) -> None:
    """Read the files of `directory`."""
    block = memoryview(bytearray(BLOCK_BYTES))
    for file in directory.iterdir():
        with file.open("rb", buffering=0) as content:
            while content.readinto(block):
                pass


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of `source` into the new directory `target` and wait for the disk."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Benchmark:
    """Contenders over one state of training.

    Args:
        folder: Directory to write to, on the disk that is to be measured.
        tensors: What is saved.
        rest_s: Seconds before each turn.
    """

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor], rest_s: float) -> None:
        self.folder, self.tensors, self.rest_s = folder, tensors, rest_s
        self.target = folder / "target"
        self.times: dict[str, list[dict[str, float]]] = defaultdict(list)  # by contender, one dictionary a round
        saver = CheckpointSaver(folder / "source", CONTEXT)
        self.source = self._save(saver)[0]
        self.warm = CheckpointSaver(self.target, CONTEXT, asynchronous=True)
        self.warm.prepare(tensors)
        self.contenders: dict[str, Callable[[], dict[str, float]]] = {
            COPY: lambda: self._timed(lambda: copy_files(self.source, self.target)),
            SAVE: lambda: self._save(CheckpointSaver(self.target, CONTEXT))[1],
            ASYNCHRONOUS: lambda: self._save(self.warm)[1],
            f"{ASYNCHRONOUS}, first, prepared": lambda: self._first(prepared=True),
            f"{ASYNCHRONOUS}, first": lambda: self._first(prepared=False),
            READ: lambda: self._cold(lambda: read_files(self.source)),
            f"{LOAD}, no checksums": lambda: self._cold(lambda: load_checkpoint(self.source, tensors)),
            LOAD: lambda: self._cold(self._verify_and_load),
        }

    def _timed(self, function: Callable[[], None]) -> dict[str, float]:
        began = time.perf_counter()
        function()
        return {"seconds": time.perf_counter() - began}

    def _save(self, saver: CheckpointSaver) -> tuple[Path, dict[str, float]]:
        began = time.perf_counter()
        saver.save(1, self.tensors, {}, wait_for_copies=False)
        returned = time.perf_counter()
        saver.wait_for_copies()
        copied = time.perf_counter()
        saver.wait()
        [outcome] = saver.outcomes()
        if outcome.error is not None:
            raise outcome.error
        return outcome.path, {"seconds": outcome.seconds, "pause_s": returned - began, "copied_s": copied - began}

    def _first(self, prepared: bool) -> dict[str, float]:
        saver = CheckpointSaver(self.target, CONTEXT, asynchronous=True)
        if prepared:
            saver.prepare(self.tensors)
            assert saver.copies is not None and saver.copies.touching is not None
            saver.copies.touching.join()
        times = self._save(saver)[1]
        saver.close()
        return times

    def _cold(self, function: Callable[[], None]) -> dict[str, float]:
        forget(self.source)
        return self._timed(function)

    def _verify_and_load(self) -> None:
        verify_checkpoint(self.source)
        load_checkpoint(self.source, self.tensors)

    def round(self, number: int) -> None:
        """Let every contender have a turn, in an order of each round's own."""
        names = list(self.contenders)
        random.Random(number).shuffle(names)
        for name in names:
            read_files(self.source)  # for the copy, and so that every turn finds the page cache alike
            os.sync()
            time.sleep(self.rest_s)
            self.times[name].append(self.contenders[name]())
            shutil.rmtree(self.target, ignore_errors=True)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each contender, medians over all rounds but the first."""
        nbytes = sum(file.stat().st_size for file in self.source.iterdir())
        medians = {name: statistics.median(t["seconds"] for t in times[1:]) for name, times in self.times.items()}
        rows = []
        for name, times in self.times.items():
            seconds = [t["seconds"] for t in times[1:]]
            row: dict[str, Any] = {
                "name": name,
                "seconds": round(medians[name], 3),
                "seconds_range": [round(min(seconds), 3), round(max(seconds), 3)],
                "gib_per_s": round(nbytes / 2**30 / medians[name], 3),
            }
            if "load" in name or name == READ:
                row["speed_relative_to_read"] = round(medians[READ] / medians[name], 3)
            else:
                row["speed_relative_to_copy"] = round(medians[COPY] / medians[name], 3)
            if name.startswith(ASYNCHRONOUS):
                for key in ("pause", "copied"):
                    median = statistics.median(t[f"{key}_s"] for t in times[1:])
                    row[f"{key}_s"] = round(median, 4)
                    row[f"{key}_share_of_save"] = round(median / medians[SAVE], 4)
            rows.append(row)
        return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    columns = ["name", "seconds", "gib_per_s", "speed_relative_to_copy", "speed_relative_to_read", "pause_s",
               "pause_share_of_save", "copied_s", "copied_share_of_save"]  # fmt: skip
    cells = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def main() -> None:
    """Measure, print, and save when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows to this file too")
    parser.add_argument("--size", default="t5-v1_1-base", choices=sorted(PRESETS), help="preset of the model")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds; one more warms up")
    parser.add_argument("--rest", type=float, default=10.0, help="seconds before each turn")
    parser.add_argument("--directory", type=Path, help="directory on the disk to measure; default: a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = state_of_training(options.size)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        benchmark = Benchmark(Path(folder), tensors, options.rest)
        loads = []
        for number in range(options.rounds + 1):
            benchmark.round(number)
            loads.append(round(os.getloadavg()[0], 1))
            print(f"round {number} of {options.rounds}, load {loads[-1]}", file=sys.stderr, flush=True)
        rows = benchmark.rows()
    setting = {
        "benchmark": "checkpoint",
        "model": options.size,
        "parameters": sum(t.numel() for name, t in tensors.items() if name.startswith("model/")),
        "gib": round(sum(t.nbytes for t in tensors.values()) / 2**30, 3),
        "rounds": options.rounds,
        "rest_s": options.rest,
        "cpus": os.cpu_count(),
        "load_averages": loads,  # above 1, others used the machine
        "machine": platform.machine(),
        "torch": torch.__version__.split("+")[0],
        "command": " ".join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]),
    }
    lines = [json.dumps(row | setting) for row in rows]
    print("\n".join([*lines, "", table(rows)]))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
