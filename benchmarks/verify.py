"""Verification of a dataset against reading its files: bytes a second, from the page cache and from the disk.

The dataset has documents of log-normal lengths (median 400 ids) and uint16 ids below 32,000. `cat` is
`cat FILES > /dev/null`, the limit; `dataset` and `shards` (the same in four shards) are what tools/verify.py calls,
without the time that a Python program takes to start. From the disk: the page cache is dropped before each run, which
takes root; without it these rows are left out. Contenders take turns; a row has the median of its rounds. Prints one
JSON object a row.

    python benchmarks/verify.py [--gigabytes 2] [--directory .] [--output benchmarks/results/verify.jsonl]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import publish

from megatron.core.datasets.corpus import publish_sharded
from megatron.core.datasets.indexed_dataset import IndexedDatasetWriter, bin_path, idx_path, shard_prefix
from megatron.core.datasets.verification import verify_dataset

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
NUM_SHARDS = 4
DOCUMENTS_A_BLOCK = 10_000


def write_dataset(prefix: Path, num_bytes: int, seed: int) -> None:
    """A dataset of random ids."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        while 2 * writer.num_tokens < num_bytes:
            lengths = np.minimum(400 * rng.lognormal(0, 1.2, DOCUMENTS_A_BLOCK), 100_000).astype(np.int64)
            writer.add_documents(rng.integers(0, 32_000, lengths.sum(), np.uint16), lengths)
        writer.finalize({})


def files_of(prefixes: list[Path]) -> list[Path]:
    """The large files of datasets."""
    return [path for prefix in prefixes for path in (bin_path(prefix), idx_path(prefix))]


def drop_caches() -> bool:
    """Let the next read come from the disk; returns whether that was possible."""
    os.sync()
    try:
        DROP_CACHES.write_text("1")
    except OSError:
        return False
    return True


def measure(contenders: dict[str, Callable[[], Any]], rounds: int, cold: bool) -> dict[str, float]:
    """Median wall-clock seconds of each contender, in turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            if cold:
                drop_caches()
            start = time.perf_counter()
            run()
            if cold or round_number > 0:  # the first round fills the cache
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the rows, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the dataset")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--output", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        shards = [shard_prefix(parts, number) for number in range(NUM_SHARDS)]
        write_dataset(whole, int(args.gigabytes * 1e9), seed=0)
        for number, shard in enumerate(shards):
            write_dataset(shard, int(args.gigabytes * 1e9 / NUM_SHARDS), seed=number + 1)
        publish_sharded(parts, NUM_SHARDS, {})
        num_bytes = sum(path.stat().st_size for path in files_of([whole]))
        contenders: dict[str, Callable[[], Any]] = {
            "cat": lambda: subprocess.run(["cat", *files_of([whole])], stdout=subprocess.DEVNULL, check=True),
            "dataset": lambda: verify_dataset(whole),
            "shards": lambda: verify_dataset(parts),
        }
        caches = ["warm", "cold"] if drop_caches() else ["warm"]
        for cache in caches:
            seconds = measure(contenders, args.rounds, cache == "cold")
            rows += [
                {
                    "name": name, "cache": cache, "gigabytes": round(num_bytes / 1e9, 3), "seconds": round(value, 3),
                    "gigabytes_per_s": round(num_bytes / 1e9 / value, 3),
                    "of_cat": round(seconds["cat"] / value, 3),
                }
                for name, value in seconds.items()
            ]  # fmt: skip
    if caches == ["warm"]:
        print("no rows from the disk: only root drops the page cache", file=sys.stderr)
    publish(rows, args.output, "verify", rounds=args.rounds)


if __name__ == "__main__":
    main()
