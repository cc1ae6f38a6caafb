"""From the command to the end of the first training step, by phase.

T5 v1.1-small on the quickstart's corpus, 8 rows of 512 + 114 tokens, as `pretrain_t5.py` starts it: one process, two
of torchrun's (data-parallel), `--bf16`, and `--compile` with an empty and with a filled cache of compiled code. Rounds
alternate between these and two references: a bare `import torch`, and `pretrain_t5.py --help`. Seconds are medians of
the rounds, of rank 0; `first step` holds the compilation. Prints one JSON object a row.

    python benchmarks/startup.py [--rounds 3] [--cases one-process ...] [--output benchmarks/results/startup.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import publish

ROOT = Path(__file__).parents[1]
PHASES = Path(__file__).with_name("startup_phases.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CASES: dict[str, tuple[list[str], list[str]]] = {  # arguments of the interpreter, flags
    "one-process": ([], ["--global-batch-size", "8"]),
    "one-process-bf16": ([], ["--global-batch-size", "8", "--bf16"]),
    "two-processes": (TORCHRUN, ["--global-batch-size", "16"]),
    "compiled-cold": ([], ["--global-batch-size", "8", "--compile"]),
    "compiled-warm": ([], ["--global-batch-size", "8", "--compile"]),
}
COMMON = ["--vocab-size", "32128", "--encoder-seq-length", "512", "--micro-batch-size", "8", "--train-iters", "100"]


def command_s(command: list[str]) -> float:
    """Seconds that a Python command takes."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def prepare(folder: Path) -> Path:
    """Prefix of a dataset with its tokenizer."""
    text, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.model"
    for command in (
        ["examples/write_corpus.py", "--output", text],
        ["tools/train_tokenizer.py", "--input", text, "--output", tokenizer, "--vocab-size", 2000],
        ["tools/preprocess_data.py", "--input", text, "--output-prefix", folder / "corpus",
         "--tokenizer-model", tokenizer],
    ):  # fmt: skip
        command_s([str(word) for word in command])
    return folder / "corpus_text_document"


def start(case: str, preset: str, prefix: Path, folder: Path) -> dict[str, float]:
    """Seconds by phase of one start."""
    interpreter, flags = CASES[case]
    cache = folder / "compiled"
    if case == "compiled-cold":
        shutil.rmtree(cache, ignore_errors=True)
    result = folder / "0.json"
    result.unlink(missing_ok=True)
    environment = os.environ | {"STARTUP_OUTPUT": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, *interpreter, str(PHASES), "--preset", preset, "--data-path", str(prefix)]
    environment["STARTUP_BEGAN"] = str(time.time())
    run = subprocess.run(
        [*command, *COMMON, *flags], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if not result.exists():
        raise SystemExit(f"{case} made no step:\n{run.stderr}")
    seconds: dict[str, float] = json.loads(result.read_text())
    return seconds


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median over rounds of each phase, under the phase's name with its unit."""
    return {f"{name.replace(' ', '_')}_s": round(statistics.median(r[name] for r in rounds), 3) for name in rounds[0]}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="cold before warm")
    parser.add_argument("--preset", default="t5-v1_1-small")
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    references = {"import torch": ["-c", "import torch"], "help": ["pretrain_t5.py", "--help"]}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in [*references, *flags.cases]}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        prefix = prepare(folder)
        for _ in range(flags.rounds):
            for name, command in references.items():
                found[name].append({"total": command_s(command)})
            for case in flags.cases:
                found[case].append(start(case, flags.preset, prefix, folder))
    rows: list[dict[str, Any]] = [{"name": name, **medians(rounds)} for name, rounds in found.items()]
    publish(rows, flags.output, "startup", preset=flags.preset, rounds=flags.rounds)


if __name__ == "__main__":
    main()
