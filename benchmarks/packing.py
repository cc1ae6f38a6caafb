"""Packing on one core: examples a second and how full rows get, by the window that is packed together.

Lengths of inputs are log-normal, cut at the row; targets are about a quarter as long; documents have one length.
`first_fit` is the planner alone, `plain` the same in a few lines of numpy, `next_fit` has one open row at a time, as
seqio's packing. `resume` is all that finding a row in a mixture of tasks takes for each example before it: mixture,
shuffle, lengths and plan. `packed_documents` is a corpus of documents with an objective: what opening it takes for each
document, rows made from the files to the batch, and how full they are; `alone` is the fill rate of one document a row.
Times are CPU time of all threads, the best of several rounds, so that neighbours on the machine disturb little. Prints
one JSON object a row.

    python benchmarks/packing.py [--output benchmarks/results/packing.jsonl]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import publish

from megatron.core.config import DataConfig
from megatron.core.datasets import packing_helpers
from megatron.core.datasets.corpus import open_corpus, split_corpus
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.indexed_dataset import IndexedDatasetWriter
from megatron.core.datasets.mixture import Mixture
from megatron.core.datasets.packed_documents import PackedDocumentsDataset
from megatron.core.datasets.packing import PackedRows
from megatron.core.datasets.t5_dataset import SpecialTokens

ROUNDS = 5
CAPACITIES = (512, 128)
MEDIAN_INPUTS = {"short": 30, "medium": 120, "long": 300}
WINDOWS = (256, 4096, 65536)
TASK_SIZES = (1_000_000, 300_000, 20_000, 500)


def draw_lengths(median: int, count: int, axes: int = 2) -> NDArray[np.int32]:
    """Random lengths `[count, axes]` that fit a row."""
    rng = np.random.default_rng(0)
    inputs = median * rng.lognormal(0, 0.8, count)
    targets = inputs / 4 * rng.lognormal(0, 0.5, count)
    lengths = np.minimum(1 + np.stack([inputs, targets], axis=1), CAPACITIES)
    return np.ascontiguousarray(lengths[:, :axes], np.int32)


def plain_first_fit(lengths: NDArray[np.int32], capacities: tuple[int, ...]) -> int:
    """Rows that first fit makes of one window."""
    room = np.tile(np.array(capacities, np.int32), (len(lengths), 1))
    num_rows = 0
    for example in lengths:
        row = int((room[: num_rows + 1] >= example).all(axis=1).argmax())
        room[row] -= example
        num_rows = max(num_rows, row + 1)
    return num_rows


def next_fit(lengths: NDArray[np.int32], capacities: tuple[int, ...]) -> int:
    """Rows when only the last one is open."""
    num_rows, room = 0, [0] * len(capacities)
    for example in lengths.tolist():
        if any(length > left for length, left in zip(example, room, strict=True)):
            num_rows, room = num_rows + 1, list(capacities)
        room = [left - length for length, left in zip(example, room, strict=True)]
    return num_rows


def best_time_s(run: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, Any]:
    """Least CPU time of some rounds, and what `run` returns."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        result = run()
        times.append(time.process_time() - start)
    return min(times), result


def planner_rows(name: str, lengths: NDArray[np.int32], capacities: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for each window and contender."""
    count, rows = len(lengths), []

    def row(contender: str, window: int, examples: int, seconds: float, num_rows: int) -> None:
        fill = lengths[:examples].sum(axis=0) / num_rows / capacities
        rows.append({
            "name": contender, "lengths": name, "axes": len(capacities), "window": window,
            "examples_per_s": round(examples / seconds), "examples_per_row": round(examples / num_rows, 2),
            "encoder_fill_rate": round(float(fill[0]), 4),
        })  # fmt: skip

    for window in WINDOWS:
        starts = np.append(np.arange(0, count, window), count)
        seconds, (_, counts) = best_time_s(
            lambda starts=starts: packing_helpers.first_fit(lengths, starts, np.array(capacities))
        )
        row("first_fit", window, count, seconds, int(counts.sum()))
    for contender, function, window in (("plain", plain_first_fit, 4096), ("next_fit", next_fit, 65536)):
        seconds, num_rows = best_time_s(lambda f=function, n=window: f(lengths[:n], capacities), 1)
        row(contender, window, window, seconds, num_rows)
    return rows


def resume_row(window: int) -> dict[str, Any]:
    """Time from nothing to any row of the second epoch of four mixed tasks."""
    sizes, keys = np.array(TASK_SIZES), np.arange(len(TASK_SIZES), dtype=np.uint64)
    ends = [np.insert(draw_lengths(60, size).reshape(-1).cumsum(dtype=np.int64), 0, 0) for size in TASK_SIZES]
    mixture = Mixture(TASK_SIZES)

    def lengths(positions: NDArray[np.int64]) -> NDArray[np.int32]:
        tasks, draws = mixture.draws(positions)
        examples = packing_helpers.shuffled(tasks, draws, sizes, keys)
        return packing_helpers.example_spans(ends, tasks, examples, CAPACITIES)[:, 1::2].astype(np.int32)

    seconds, packed = best_time_s(lambda: PackedRows(lengths, sum(TASK_SIZES), CAPACITIES, window), 3)
    return {
        "name": "resume", "tasks": len(TASK_SIZES), "window": window, "examples": sum(TASK_SIZES),
        "examples_per_s": round(sum(TASK_SIZES) / seconds),
        "fill_rate": round(packed.lengths_per_epoch.sum() / packed.rows_per_epoch / sum(CAPACITIES), 4),
    }  # fmt: skip


def document_rows(count: int) -> list[dict[str, Any]]:
    """A row for each objective: documents of about 90 tokens in rows of 512 encoder tokens."""
    rng = np.random.default_rng(0)
    lengths = (60 * rng.lognormal(0, 0.9, count)).astype(np.int64)
    special = SpecialTokens(32_100, 0, 1, 0, tuple(range(32_099, 31_899, -1)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "documents")
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_documents(rng.integers(2, 31_000, lengths.sum(), np.uint16), lengths)
            writer.finalize()
        part = split_corpus(open_corpus(prefix), (1, 0, 0), "documents")["train"]
        batches = np.arange(4096).reshape(-1, 64)
        for objective in ("span-corruption", "ul2", "prefix-lm"):
            plan = DenoisingPlan.build(DataConfig(objective=objective, packing="segments"), len(special.sentinel_ids))
            seconds, dataset = best_time_s(
                lambda plan=plan: PackedDocumentsDataset([part], plan, special, 0, "train"), ROUNDS
            )
            read_s, read = best_time_s(lambda dataset=dataset: [dataset.batch(ids) for ids in batches], ROUNDS)
            segments = sum(int(batch.encoder_segment_ids.max(axis=1).sum()) for batch in read)
            rows.append({
                "name": "packed_documents", "objective": objective, "documents": count, "window": 4096,
                "encoder_length": dataset.encoder_length, "decoder_length": dataset.decoder_length,
                "opened_documents_per_s": round(count / seconds), "rows_per_s": round(batches.size / read_s),
                "documents_per_row": round(segments / batches.size, 2),
                "encoder_fill_rate": round(dataset.fill_rates[0], 4),
                "decoder_fill_rate": round(dataset.fill_rates[1], 4),
                "fill_rate": round(dataset.fill_rate, 4),
                "alone_fill_rate": round(dataset.fill_rate * batches.size / segments, 4),
            })  # fmt: skip
    return rows


def main() -> None:
    """Print the rows, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1 << 19, help="examples to pack")
    parser.add_argument("--output", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows = []
    for name, median in MEDIAN_INPUTS.items():
        rows += planner_rows(name, draw_lengths(median, args.examples), CAPACITIES)
    rows += planner_rows("documents", draw_lengths(120, args.examples, axes=1), CAPACITIES[:1])
    rows.append(resume_row(4096))
    rows += document_rows(args.examples)
    publish(rows, args.output, "packing", capacities=CAPACITIES, cores_used=1)


if __name__ == "__main__":
    main()
