"""Blends on one core: start-up of a thousand corpora, share error, memory by training length, draws a second.

`start` opens 1,000 small corpora (synthetic, on disk; sizes are log-normal) and makes a batch of a blend of them, from
nothing to the first sample of a training and to one far inside it, in a process of its own. `memory` is the same for
two training lengths, whose samples it reads all over. `shares` is the largest difference, over all datasets and all
numbers of samples, between the samples that a dataset has given and its share of them. `draws` is the order alone, by
number of datasets. `Megatron-LM` is that project's own index of the blend (built for the whole training before its
first sample; megatron-core from the package index, left out where that cannot be had). Times of `draws` and of Megatron
are CPU time of the one thread, the best of several rounds; those of `start` are what a user waits, a warm disk cache
supposed. Prints one JSON object a row.

    python benchmarks/blending.py [--output benchmarks/results/blending.jsonl]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import publish

from megatron.core.config import DataConfig
from megatron.core.datasets.blending import Blend, blend_rates, corpora_of
from megatron.core.datasets.corpus import open_corpus, split_corpus
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.indexed_dataset import IndexedDatasetWriter
from megatron.core.datasets.t5_dataset import DenoisingDataset, SpecialTokens

SPECIAL = SpecialTokens(32_100, pad_id=0, eos_id=1, decoder_start_id=0, sentinel_ids=tuple(range(32_099, 31_999, -1)))
ROUNDS = 5
BATCH = 128
FAR = 10**9

# Megatron-LM's own code, in a process of its own, since the import name is ours too.
MEGATRON = """
import json, resource, sys, time
import numpy as np
from megatron.core.datasets import helpers_cpp
rates, rows = np.array(json.loads(sys.argv[1]), np.int64), []
for size in json.loads(sys.argv[2]):
    datasets, draws = np.zeros(size, np.int16), np.zeros(size, np.int64)
    times = []
    for _ in range(int(sys.argv[3])):
        began = time.process_time()
        helpers_cpp.build_blending_indices(datasets, draws, rates / rates.sum(), rates.size, size, False)
        times.append(time.process_time() - began)
    total = rates.sum()
    before = draws * total - rates[datasets] * np.arange(size)  # exact below 2**63
    worst = max(np.abs(before).max(), np.abs(before + total - rates[datasets]).max()) / total
    rows.append({"samples": size, "index_s": min(times), "index_bytes": datasets.nbytes + draws.nbytes,
                 "largest_share_error": float(worst)})
print(json.dumps(rows))
"""


def corpus_sizes(count: int) -> list[int]:
    """Tokens of corpora, from hundreds to a million."""
    sizes = np.random.default_rng(0).lognormal(9, 1.5, count)
    return [int(size) for size in np.clip(sizes, 600, 10**6)]


def write_corpora(folder: Path, count: int) -> Path:
    """Corpora of random ids, and the YAML that lists them."""
    rng = np.random.default_rng(1)
    names = [f"corpus-{n:05d}" for n in range(count)]
    for name, size in zip(names, corpus_sizes(count), strict=True):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            writer.add_documents(rng.integers(5, 32_000, size, dtype=np.uint16), np.array([size]))
            writer.finalize()
    file = folder / "blend.yaml"
    file.write_text("train:\n" + "".join(f"  - path: {name}\n" for name in names))
    return file


def open_blend(file: Path) -> DenoisingDataset:
    """What training does between its flags and its first batch."""
    config = DataConfig(data_config=str(file))
    specs = corpora_of(config).of_split("train")
    parts = [split_corpus(open_corpus(spec.path), (1.0, 0.0, 0.0), spec.path)["train"] for spec in specs]
    blend = Blend(blend_rates([part.num_tokens for part in parts], specs, config))
    plan = DenoisingPlan.build(config, len(SPECIAL.sentinel_ids))
    return DenoisingDataset(parts, plan, SPECIAL, seed=0, name="train", blend=blend)


def peak_mib() -> float:
    """Most memory that this process has had, mapped pages of files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start_row(file: Path) -> dict[str, Any]:
    """Time to the first batch of a training, and from there to one far inside."""
    began = time.perf_counter()
    dataset = open_blend(file)
    opened = time.perf_counter()
    dataset.batch(np.arange(BATCH))
    first = time.perf_counter()
    dataset.batch(np.arange(FAR, FAR + BATCH))
    far = time.perf_counter()
    return {
        "name": "start", "datasets": len(dataset.parts), "open_s": round(opened - began, 4),
        "open_and_first_batch_s": round(first - began, 4), "batch_at_1e9_ms": round(1000 * (far - first), 2),
    }  # fmt: skip


def memory_row(file: Path, samples: int) -> dict[str, Any]:
    """Memory that a training of so many samples adds to what the imports take."""
    imports = peak_mib()
    dataset = open_blend(file)
    places = np.linspace(0, samples - BATCH, 100, dtype=np.int64)
    for place in places:
        dataset.batch(np.arange(place, place + BATCH))
    epochs = dataset.epochs(samples)
    return {
        "name": "memory", "datasets": len(dataset.parts), "samples": samples, "imports_mib": round(imports, 1),
        "data_mib": round(peak_mib() - imports, 1), "epochs": round(float(np.mean(epochs)), 3),
    }  # fmt: skip


def largest_error(blend: Blend, first: int, count: int) -> int:
    """Largest share error of a dataset after `first` to `first + count` samples, times the sum of the rates."""
    rates, total = np.array(blend.rates), sum(blend.rates)
    before = blend.counts(first)
    datasets, draws = blend.draws(np.arange(first, first + count))
    own = np.argsort(datasets, kind="stable")
    expected = before[datasets[own]] + np.arange(count) - np.searchsorted(datasets[own], datasets[own])
    assert np.array_equal(draws[own], expected)
    # Just before a draw and just after it are the extremes. Products wrap around; their difference is right.
    late = draws * total - rates[datasets] * np.arange(first, first + count)
    at_ends = [blend.counts(place) * total - rates * place for place in (first, first + count)]
    return max(int(np.abs(errors).max()) for errors in (late, late + total - rates[datasets], *at_ends))


def share_rows(name: str, rates: list[int], samples: int) -> list[dict[str, Any]]:
    """Errors after every number of samples from the beginning on, and around random far places."""
    rng, blend = np.random.default_rng(2), Blend(rates)
    far = [largest_error(blend, int(place), 20_000) for place in rng.integers(0, 10**12, 50)]
    rows = []
    for where, error in ((f"0 to {samples}", largest_error(blend, 0, samples)), ("50 x 20000 below 1e12", max(far))):
        rows.append({
            "name": "shares", "rates": name, "datasets": len(rates), "least_share": min(rates) / sum(rates),
            "range": where, "largest_share_error": error / sum(rates), "below_one_sample": error < sum(rates),
        })  # fmt: skip
    return rows


def best_time_s(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Least CPU time of some rounds."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


def draws_row(name: str, rates: list[int], count: int) -> dict[str, Any]:
    """Speed of ascending draws, and time to one position far inside, the worst of ten, each at the end of a block."""
    blend = Blend(rates)
    blend.draws(np.arange(count))
    ends = (FAR // blend.block_length + 3 * np.arange(1, 11)) * blend.block_length - 1
    far = [best_time_s(lambda at=place: blend.draws(np.array([at])), 1) for place in ends]
    ascending = best_time_s(lambda: blend.draws(np.arange(count)))
    return {
        "name": "draws", "rates": name, "datasets": len(rates), "least_share": min(rates) / sum(rates),
        "block_length": blend.block_length, "draws_per_s": round(count / ascending),
        "far_position_ms": round(1000 * max(far), 3),
    }  # fmt: skip


def draws_rows(count: int) -> list[dict[str, Any]]:
    """By number of datasets and by least share."""
    rows = [draws_row("log-normal", corpus_sizes(datasets), count) for datasets in (2, 10, 100, 1000, 10_000)]
    one_small = ([1] + [10**exponent // 999] * 999 for exponent in (5, 6, 7, 8))
    return rows + [draws_row("one small", rates, count) for rates in one_small]


def megatron_rows(name: str, rates: list[int], sizes: list[int]) -> list[dict[str, Any]]:
    """Megatron-LM's blend of the same datasets, or why there is none."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import megatron_oracle
    import pytest

    common: dict[str, Any] = {"name": f"Megatron-LM (megatron-core {megatron_oracle.VERSION})", "rates": name}
    common["datasets"] = len(rates)
    try:
        output = megatron_oracle.run_megatron(MEGATRON, json.dumps(rates), json.dumps(sizes), "3", timeout=600)
    except pytest.skip.Exception as skipped:
        return [common | {"stopped_at": str(skipped)}]
    rows = json.loads(output.splitlines()[-1])
    for row in rows:
        row["index_s_at_1e9_samples_if_linear"] = round(row["index_s"] * 1e9 / row["samples"], 1)
        row["index_s"] = round(row["index_s"], 4)
    return [common | row for row in rows]


def in_new_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function returns in a fresh interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Measure, print, and save when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=1000, help="corpora of the blend on disk")
    parser.add_argument("--samples", type=int, default=10**6, help="samples of `shares` and `draws`")
    parser.add_argument("--output", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    families = {"log-normal": corpus_sizes(options.datasets), "50 of 1, 50 of 50": [1] * 50 + [50] * 50}
    with tempfile.TemporaryDirectory() as folder:
        file = write_corpora(Path(folder), options.datasets)
        rows = [in_new_process(start_row, file)]
        rows += [in_new_process(memory_row, file, samples) for samples in (10**4, 10**9)]
    for name, rates in families.items():
        rows += share_rows(name, rates, options.samples)
        rows += megatron_rows(name, rates, [options.samples])
    rows += draws_rows(options.samples)
    publish(rows, options.output, "blending", cores_used=1)


if __name__ == "__main__":
    main()
