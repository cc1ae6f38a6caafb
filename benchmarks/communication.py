"""What data parallelism sends in a step, and how long a rank waits for it, at each level of sharding.

Two gloo processes, a core each, compute the passes of a step (forward, backward, the sum of the gradients) of a preset
with the trainer's own code. Contenders take turns. Three things are measured:

* calls and bytes of the collectives, which must equal the theory (docs/parallelism.md); the script fails if not;
* `exposed_s`, the time that communication adds: a step's time less that of `alone`, where both processes compute the
  same microbatches at the same time as worlds of one, which send nothing. Copies into and out of buffers are in it;
* `blocked_s`, the time in which the main thread of a rank waited for a collective to end. Waiting for the other rank to
  come is in it, and so is what its core gives to gloo's threads.

`no_shard, after` sums the gradients when the backward pass is over, for comparison with `no_shard`, which begins within
it. Means over the ranks of medians over the rounds; the first round warms up and is counted, not timed. Prints one JSON
object a row.

    python benchmarks/communication.py [--output benchmarks/results/communication.jsonl] [flags of the trainer]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import publish
from megatron.core.datasets.loader import TensorBatch
from megatron.core.distributed.gradient_reduction import BUCKET_MIB
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import buckets
from megatron.training.arguments import parse_args
from megatron.training.config import RunConfig
from megatron.training.model_setup import DistributedModel
from tests.collectives import CountCollectives
from tests.distributed import run_distributed

RANKS = 2
ENCODER_LENGTH, DECODER_LENGTH = 512, 114
ALONE, AFTER = "alone", "no_shard, after"
CONTENDERS = (ALONE, "no_shard", AFTER, "optim", "optim_grads", "optim_grads_params")


class Blocked:
    """Seconds for which the main thread has waited for collectives."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Time every `wait` of a collective, torch's own included."""
        wait = dist.Work.wait

        def timed(work: dist.Work, *arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(work, *arguments)
            finally:
                self.seconds += time.perf_counter() - start

        dist.Work.wait = timed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            dist.Work.wait = wait  # type: ignore[method-assign]


def configure(
    preset: str, precision: str, contender: str, micro_batch_size: int, microbatches: int, others: list[str]
) -> RunConfig:
    """The run of a contender."""
    flags = [
        "--preset", preset, "--encoder-seq-length", str(ENCODER_LENGTH), "--micro-batch-size", str(micro_batch_size),
        "--global-batch-size", str(RANKS * micro_batch_size * microbatches), *others,
    ]  # fmt: skip
    if precision == "bf16":
        flags.append("--bf16")
    if contender != ALONE:
        flags += ["--data-parallel-sharding-strategy", contender.split(",")[0]]
    return parse_args(flags).config


def theory(model: DistributedModel, contender: str, microbatches: int, number_bytes: int) -> dict[str, dict[str, int]]:
    """Calls and bytes of a step by operator, as docs/parallelism.md has them."""
    sizes = [4 * p.shape.numel() for p in model.parameters]  # fp32
    units = model.data_parallel[0].unit_bytes
    if contender == ALONE:
        return {"calls": {}, "bytes": {}}
    if contender in ("no_shard", AFTER):
        calls = len(buckets(sizes[::-1], BUCKET_MIB * 2**20))
        return {"calls": {"allreduce_": calls}, "bytes": {"allreduce_": sum(sizes)}}
    assert sum(units) == sum(sizes)
    gathers, gathered = len(units), sum(sizes)
    if contender == "optim_grads_params":
        gathers, gathered = microbatches * (2 * gathers - 1), microbatches * (2 * gathered - units[-1])
    return {
        "calls": {"_allgather_base_": gathers, "_reduce_scatter_base_": len(units)},
        "bytes": {"_allgather_base_": gathered * number_bytes // 4, "_reduce_scatter_base_": sum(sizes)},
    }


def sent_by_a_ring(nbytes: Counter[str]) -> float:
    """Bytes that each rank sends: a sum is both halves of what a gathering or a scattering is one of."""
    return (2 * nbytes["allreduce_"] + nbytes["_allgather_base_"] + nbytes["_reduce_scatter_base_"]) / RANKS


class Contender:
    """A model at one level of sharding, and its measurements on this rank."""

    def __init__(self, name: str, config: RunConfig, microbatches: int) -> None:
        alone = name == ALONE
        device = torch.device("cpu")
        context = ParallelContext(device) if alone else ParallelContext.create(config.parallel, device)
        self.name, self.microbatches = name, microbatches
        self.model = DistributedModel(config, context, None, microbatches)
        self.model.overlap_reduction(name != AFTER)
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()
        self.passes_s: list[float] = []
        self.blocked_s: list[float] = []

    def passes(self, batch: TensorBatch) -> None:
        """What a step computes until its gradients are sums over the ranks; they are let go."""
        factor = torch.tensor(1.0 / batch.labels.numel() / RANKS)
        self.model.forward_backward(batch, factor)
        self.model.finish_gradients()
        for p in self.model.parameters:
            p.parameter.grad = None

    def count(self, batch: TensorBatch) -> None:
        """Calls and bytes of a step."""
        with CountCollectives() as count:
            self.passes(batch)
        self.calls, self.nbytes = count.calls, count.nbytes

    def measure(self, batch: TensorBatch) -> None:
        """Times of a step that both ranks begin together."""
        blocked = Blocked()
        dist.barrier()
        start = time.perf_counter()
        with blocked.watch():
            self.passes(batch)
        self.passes_s.append(time.perf_counter() - start)
        self.blocked_s.append(blocked.seconds)


def measure(
    rank: int, preset: str, precision: str, micro_batch_size: int, microbatches: int, rounds: int, others: list[str]
) -> list[dict[str, Any]]:
    """What this rank finds of each contender."""
    contenders = []
    for name in CONTENDERS:
        config = configure(preset, precision, name, micro_batch_size, microbatches, others)
        contenders.append(Contender(name, config, microbatches))
    generator = torch.Generator().manual_seed(rank)
    rows = micro_batch_size * microbatches
    vocab_size = config.model.padded_vocab_size
    encoder_ids, decoder_ids, labels = (
        torch.randint(1, vocab_size, (rows, length), dtype=torch.int32, generator=generator)
        for length in (ENCODER_LENGTH, DECODER_LENGTH, DECODER_LENGTH)
    )
    batch = TensorBatch(encoder_ids, decoder_ids, labels)
    for contender in contenders:
        contender.count(batch)
    for _ in range(rounds):
        for contender in contenders:
            contender.measure(batch)
    return [
        {
            "contender": contender.name,
            "passes_s": statistics.median(contender.passes_s),
            "blocked_s": statistics.median(contender.blocked_s),
            "calls": dict(contender.calls),
            "bytes": dict(contender.nbytes),
            "ring_sent_mib": round(sent_by_a_ring(contender.nbytes) / 2**20, 1),
            "theory": theory(contender.model, contender.name, microbatches, 2 if precision == "bf16" else 4),
        }
        for contender in contenders
    ]


def rows_of(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each contender from what the ranks found.

    Raises:
        AssertionError: Calls or bytes of any rank are not the theory's.
    """
    rows: list[dict[str, Any]] = []
    for found in zip(*ranks, strict=True):
        for row in found:
            counted = {"calls": row["calls"], "bytes": row["bytes"]}
            assert counted == row["theory"], f"{row['contender']}: {counted}, in theory {row['theory']}"
        passes_s, blocked_s = (statistics.mean(row[key] for row in found) for key in ("passes_s", "blocked_s"))
        alone_s = rows[0]["passes_s"] if rows else passes_s
        rows.append(
            {
                "contender": found[0]["contender"],
                "passes_s": round(passes_s, 4),
                "over_alone": round(passes_s / alone_s, 4),
                "exposed_s": round(passes_s - alone_s, 4),
                "blocked_s": round(blocked_s, 4),
                **{key: found[0][key] for key in ("calls", "bytes", "ring_sent_mib")},
                "equals_theory": True,
            }
        )
    return rows


def main() -> None:
    """Measure, compare with the theory, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the rows")
    parser.add_argument("--preset", default="t5-v1_1-small")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, others = parser.parse_known_args()
    rows = []
    for precision in arguments.precision:
        setting = (arguments.preset, precision, arguments.micro_batch_size, arguments.microbatches, arguments.rounds)
        found = run_distributed(measure, RANKS, *setting, others, timeout=3600.0)
        rows += [{"precision": precision} | row for row in rows_of(found)]
    publish(
        rows, arguments.output, "communication", preset=arguments.preset, flags=others, ranks=RANKS, threads_per_rank=1,
        micro_batch_size=arguments.micro_batch_size, microbatches=arguments.microbatches, rounds=arguments.rounds,
        encoder_length=ENCODER_LENGTH, decoder_length=DECODER_LENGTH, torch=torch.__version__.split("+")[0],
    )  # fmt: skip


if __name__ == "__main__":
    main()
