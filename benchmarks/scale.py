"""A corpus of 10^12 tokens and 10^9 documents, and what reading in blocks spares a disk.

`start` is a sparse dataset of that size (uint16, documents of 1,000 tokens; real entries of the index where the splits
begin and end, real ids where samples are read): from nothing to the first batch, without the import of the program, and
a batch of samples from both ends and the middle of the corpus, whose ids are compared. Memory is what the process has
more than after the imports. `blocks` reads an epoch's first samples of a dataset from a cold page cache (which takes
root) in the order of `--shuffle-block-windows` 1, 16 and 256, and says how many bytes come from the disk for each byte
of the samples; with `ahead`, as corpora larger than memory and blocks are read: batch by batch, nothing around it.
Prints one JSON object a row.

    python benchmarks/scale.py [--gigabytes 2] [--directory .] [--output benchmarks/results/scale.jsonl]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import publish
from sparse_corpus import samples_of_both_ends, write_sparse_dataset, wrong_samples
from verify import drop_caches, write_dataset

from megatron.core.config import DataConfig
from megatron.core.datasets import t5_dataset
from megatron.core.datasets.corpus import open_corpus, split_corpus
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.t5_dataset import DenoisingDataset, SpecialTokens

SPECIAL = SpecialTokens(32_100, pad_id=0, eos_id=1, decoder_start_id=0, sentinel_ids=tuple(range(32_099, 31_999, -1)))
SPLIT = "969,30,1"
BATCH = 128


def build(prefix: Path, block_windows: int = 1) -> DenoisingDataset:
    """The training samples of a dataset."""
    config = DataConfig(split=SPLIT)
    plan = DenoisingPlan.build(config, len(SPECIAL.sentinel_ids))
    part = split_corpus(open_corpus(prefix), config.split_weights(), str(prefix))["train"]
    return DenoisingDataset([part], plan, SPECIAL, 0, "train", block_windows=block_windows)


def resident_mib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def start(connection: Any, prefix: Path) -> None:
    """Open the sparse corpus, make a batch, and check samples, in a process of its own."""
    before, began = resident_mib(), time.perf_counter()
    dataset = build(prefix)
    dataset.batch(np.arange(BATCH))
    seconds, mib = time.perf_counter() - began, resident_mib() - before
    ids = np.concatenate([samples_of_both_ends(dataset, BATCH), np.arange(BATCH)])
    wrong = wrong_samples(dataset, prefix, ids, num_ids=32_000)
    connection.send(
        {
            "name": "start", "tokens": dataset.parts[0].corpus.num_tokens,
            "documents": dataset.parts[0].corpus.num_documents, "seconds_to_first_batch": seconds,
            "memory_mib": mib, "samples_compared": ids.size, "wrong_samples": wrong,
            "memory_mib_afterwards": resident_mib() - before,
        }
    )  # fmt: skip


def read_bytes() -> int:
    """Bytes that this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def blocks(connection: Any, prefix: Path, block_windows: int, ahead: bool, num_samples: int) -> None:
    """Read samples from a cold cache, in a process of its own."""
    t5_dataset.exceeds_memory = lambda parts: ahead
    dataset = build(prefix, block_windows)
    before, began = read_bytes(), time.perf_counter()
    for first in range(0, num_samples, BATCH):
        dataset.batch(np.arange(first, first + BATCH))
    seconds, fetched = time.perf_counter() - began, read_bytes() - before
    wanted = 2 * dataset.plan.windows[0].raw * num_samples
    connection.send(
        {
            "name": "blocks", "block_windows": block_windows, "ahead": ahead, "samples": num_samples,
            "samples_of_epoch": dataset.windows_per_epoch, "bytes_read_for_each": fetched / wanted,
            "samples_per_s": num_samples / seconds,
        }
    )  # fmt: skip


def in_process(function: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """What `function` sends from a new process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()
    row: dict[str, Any] = ours.recv()
    process.join()
    return row


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2, help="of the dataset that is read in blocks")
    parser.add_argument("--documents", type=int, default=10**9)
    parser.add_argument("--directory", default=None)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=flags.directory) as folder:
        sparse = Path(folder, "sparse")
        write_sparse_dataset(sparse, flags.documents)
        rows.append(in_process(start, sparse))
        Path(f"{sparse}.bin").unlink()
        dense = Path(folder, "dense")
        write_dataset(dense, int(flags.gigabytes * 1e9), seed=0)
        for block_windows, ahead in ((1, False), (1, True), (16, True), (256, True)):
            if not drop_caches():
                print("no rows of blocks: the page cache can only be dropped by root", file=sys.stderr)
                break
            rows.append(in_process(blocks, dense, block_windows, ahead, 64 * BATCH))
    publish(rows, flags.output, "scale")


if __name__ == "__main__":
    main()
