"""R14: a rank that was started with other flags, data or code is refused before the first step, by all ranks."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from tests.corpora import make_byte_dataset, write_prose
from tests.reliability import mismatched_program
from tests.reliability.jobs import ForkedJob
from tests.reliability.signals import RUN, tail

PROGRAM = str(Path(mismatched_program.__file__))
WITHIN_S = 60.0  # on a busy machine; far below the timeout of a collective, which is ten minutes
OTHER_DATA = "OTHER_DATA"  # stands for the path of another dataset
DIFFERENCES = {  # what the last rank is given: what the line says
    "--lr 0.02": "--lr is 0.01 on {others} and 0.02 on {last}",
    "--seed 7": "--seed is 1234 on {others} and 7 on {last}",
    "--hidden-size 64": "--hidden-size is 32 on {others} and 64 on {last}",
    "--encoder-num-layers 3": "--encoder-num-layers is 2 on {others} and 3 on {last}",
    "--global-batch-size 16": "--global-batch-size is 8 on {others} and 16 on {last}",
    "--encoder-seq-length 32": "--encoder-seq-length is 64 on {others} and 32 on {last}",
    "--optimizer adamw": '--optimizer is "adamw-scale" on {others} and "adamw" on {last}',
    "--tensor-model-parallel-size 2": "--tensor-model-parallel-size is 1 on {others} and 2 on {last}",
    "--train-iters 9": "--train-iters is 8 on {others} and 9 on {last}",
    "--bf16": "--bf16 is false on {others} and true on {last}",
    f"--data-path {OTHER_DATA}": "dataset",
    "version=0.0.1": '" on {others} and "0.0.1" on {last}',
}


@dataclass(frozen=True)
class Trial:
    """The last of `ranks` is started with `difference`."""

    ranks: int
    difference: str

    def __str__(self) -> str:
        return f"{self.difference} on the last of {self.ranks} ranks"


def all_trials() -> list[Trial]:
    """Every difference, with two and with four ranks."""
    return [Trial(ranks, difference) for ranks in (2, 4) for difference in DIFFERENCES]


def make_data(folder: Path) -> tuple[Path, Path]:
    """`--data-path` of two datasets that differ in their texts."""
    (folder / "other").mkdir()
    other = folder / "other" / "corpus.jsonl"
    texts = [json.loads(line)["text"] for line in write_prose(folder / "corpus.jsonl").read_text().splitlines()]
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:]))
    prefix = folder / "other" / "bytes"
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer")
    preprocess(PreprocessConfig(input=[str(other)], output_prefix=str(prefix), tokenizer=tokenizer))
    return make_byte_dataset(folder / "corpus.jsonl"), prefix


def run_trial(trial: Trial, data: tuple[Path, Path]) -> None:
    """Raises `AssertionError` when the ranks go on, or a line does not say what differs and where."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name, "log")
        difference = trial.difference.replace(OTHER_DATA, str(data[1]))
        arguments = [difference, *RUN, "--data-path", str(data[0]), "--save", str(Path(name, "run"))]
        job = ForkedJob(arguments, trial.ranks, log, PROGRAM)
        try:
            assert job.ended(WITHIN_S), f"not ended within {WITHIN_S:.0f} s: {tail(log)}"
        finally:
            if not job.ended(0):
                job.kill(None)
        # Rank 0 says it; the launcher ends the others, which all know it.
        assert job.statuses()[0] == 1 and 0 not in job.statuses(), f"statuses {job.statuses()}: {tail(log)}"
        others = "rank 0" if trial.ranks == 2 else f"ranks 0-{trial.ranks - 2}"
        message = DIFFERENCES[trial.difference].format(others=others, last=f"rank {trial.ranks - 1}")
        errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert errors and message in errors[0], f"does not say {message}: {tail(log)}"
        assert f"on rank {trial.ranks - 1}" in errors[0], f"does not name the rank: {errors[0]}"
        assert not list(Path(name, "run").glob("iter_*")), "trained"


def attempt(trial: Trial, data: tuple[Path, Path]) -> str | None:
    """What went wrong, if anything."""
    try:
        run_trial(trial, data)
    except Exception as error:
        print(f"R14: {trial}: {error}", file=sys.stderr, flush=True)
        return f"{trial}: {error}"
    return None


def count(trials: int | None = None) -> list[dict[str, Any]]:
    """The row of R14; of all trials or of the first so many."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        data = make_data(Path(name))
        results = [attempt(trial, data) for trial in all_trials()[:trials]]
    failures = [result for result in results if result is not None]
    row = {
        "test": "R14",
        "what": "a rank with other flags, data or code: refused before the first step, the difference printed",
        "trials": len(results),
        "passed": len(results) - len(failures),
        "seconds": round(time.monotonic() - start, 1),
    }
    return [row | ({"failures": failures} if failures else {})]
