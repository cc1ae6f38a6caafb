"""How long the steps of a training run wait for their data, with and without the thread that prepares batches ahead.

Two gloo processes under torchrun train a preset on real text: what the packages of this Python's installation carry of
documentation and source, a paragraph a document, as bytes. Contenders take turns over the objectives: `thread` is how
runs train; `no thread` makes each batch when the step asks for it. `wait_share` is the time that rank 0's steps waited
for data over the time of the steps, from the metrics that each run writes; the first step, for which nothing can be
prepared, is left out and stands in `first_wait_ms`. Prints one JSON object a row.

    python benchmarks/data_wait.py [--output benchmarks/results/data_wait.jsonl]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROCESSES = 2
CORPORA = 100
SHORTEST_PARAGRAPH = 40  # bytes
SENTINELS = 200
OBJECTIVES = {
    "span-corruption": ["--objective", "span-corruption"],
    "ul2": ["--objective", "ul2"],
    "packed": ["--objective", "span-corruption", "--packing", "segments"],
    "blend": ["--objective", "span-corruption"],
}
CONTENDERS = ("thread", "no thread")


def paragraphs(num_bytes: int) -> Iterator[str]:
    """Paragraphs of the texts beside the installed packages, about `num_bytes` in all."""
    for folder in (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))):
        for path in sorted(path for suffix in ("rst", "md", "txt", "py") for path in folder.rglob(f"*.{suffix}")):
            for text in path.read_text(encoding="utf-8", errors="ignore").split("\n\n"):
                if len(text) >= SHORTEST_PARAGRAPH:
                    yield text
                    num_bytes -= len(text)
            if num_bytes <= 0:
                return


def write_corpora(folder: Path, num_bytes: int) -> dict[str, list[str]]:
    """`--data-path` of each objective: one corpus, or the same text in `CORPORA` of unequal sizes."""
    from megatron.core.config import TokenizerConfig
    from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess

    texts = list(paragraphs(num_bytes))
    shares = list(accumulate(range(10, 10 + CORPORA), initial=0))  # the largest is eleven times the smallest
    bounds = [len(texts) * share // shares[-1] for share in shares]
    parts = {"whole": texts} | {f"part{n}": texts[begin:end] for n, (begin, end) in enumerate(pairwise(bounds))}
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer", vocab_extra_ids=SENTINELS)
    with Path(os.devnull).open("w") as nowhere:
        for name, documents in parts.items():
            source, prefix = folder / f"{name}.jsonl", folder / name
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
            preprocess(PreprocessConfig(input=[str(source)], output_prefix=str(prefix), tokenizer=tokenizer), nowhere)
    whole, *others = (str(folder / name) for name in parts)
    return {name: others if name == "blend" else [whole] for name in OBJECTIVES}


def train(contender: str, flags: list[str]) -> int:
    """A rank of a run."""
    from megatron.core.datasets.prefetch import Prefetcher
    from megatron.training import training

    if contender == "no thread":
        training.Prefetcher = functools.partial(Prefetcher, ahead=0)  # type: ignore[misc, assignment]
    from pretrain_t5 import main

    sys.argv = ["pretrain_t5.py", *flags]
    return main()


def measure(contender: str, objective: str, data_path: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The metrics of each step of a run."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        flags = ["--preset", options.preset, "--data-path", *data_path, *OBJECTIVES[objective]]
        flags += ["--train-iters", str(options.steps), "--micro-batch-size", str(options.micro_batch_size)]
        flags += ["--log-interval", "1", "--eval-iters", "0", "--metrics-file", str(metrics)]
        # The preset's vocabulary, not that of bytes: the model is the one that the preset's name promises.
        flags += ["--vocab-size", "32128", "--split", "1"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        command += [str(Path(__file__).resolve()), "--rank", contender, *flags]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
        if done.returncode:
            lines = done.stderr.decode().splitlines()
            reasons = [line for line in lines if line.startswith("error: ")] or lines
            raise SystemExit(f"{objective}, {contender}: {reasons[0] if reasons else done.returncode}")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row for row in rows if "data_wait_ms" in row]


def row_of(contender: str, objective: str, runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """One row from the steps of several runs."""
    later = [step for steps in runs for step in steps[1:]]
    waits, times = ([step[name] for step in later] for name in ("data_wait_ms", "step_time_ms"))
    return {
        "name": contender,
        "objective": objective,
        "wait_share": round(sum(waits) / sum(times), 6),
        "median_wait_ms": round(statistics.median(waits), 3),
        "longest_wait_ms": round(max(waits), 3),
        "first_wait_ms": round(statistics.median(steps[0]["data_wait_ms"] for steps in runs), 3),
        "median_step_ms": round(statistics.median(times), 1),
        "fill_rate": round(later[-1]["fill_rate"], 4),
        "steps": len(later),
    }


def main() -> None:
    """Measure all objectives, or be a rank of a run."""
    if sys.argv[1:2] == ["--rank"]:
        raise SystemExit(train(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--preset", default="t5-v1_1-small")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--corpus-mb", type=float, default=10.0)
    options = parser.parse_args()
    from report import publish

    load = os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data_paths = write_corpora(Path(folder), int(options.corpus_mb * 1e6))
        for objective in options.objectives:
            runs: dict[str, list[list[dict[str, Any]]]] = {contender: [] for contender in CONTENDERS}
            for n in range(options.rounds):
                for contender in CONTENDERS if n % 2 == 0 else CONTENDERS[::-1]:
                    runs[contender].append(measure(contender, objective, data_paths[objective], options))
            rows += [row_of(contender, objective, of_contender) for contender, of_contender in runs.items()]
    import torch

    publish(
        rows, options.output, "data_wait", preset=options.preset, processes=PROCESSES,
        micro_batch_size=options.micro_batch_size, corpora_of_blend=CORPORA, corpus_mb=options.corpus_mb,
        load_average=round(load, 2), torch=torch.__version__.split("+")[0],
    )  # fmt: skip


if __name__ == "__main__":
    main()
