"""R6: a run that changes its layout at every resume trains on the samples of the plain run, exactly once and in order.

Every rank writes down which samples it was dealt. After each leg the run saves, stops and goes on in another layout of
1 to 4 processes: tensor, sequence, pipeline and data parallelism, schedules and sharding levels. Samples and losses of
each leg are compared with those of one process that was never stopped, and so are weights and optimizer at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from megatron.core.datasets.loader import TensorBatch
from megatron.core.datasets.prefetch import Prefetcher
from megatron.core.datasets.t5_dataset import Batch, DenoisingDataset
from megatron.core.parallel_state import ParallelContext
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain_in
from tests.corpora import make_byte_dataset, write_prose
from tests.distributed import run_distributed
from tests.layouts.comparison import LIMITS, difference, metrics, one_thread
from tests.layouts.layout import GLOBAL_BATCH_SIZE, Layout

STEPS_A_LEG = 2
LAYOUTS = (
    Layout(pp=2, schedule="1f1b"),
    Layout(tp=2, sp=True, dp=2, sharding="optim_grads_params"),
    Layout(),
    Layout(tp=2, sp=True, pp=2, schedule="zbv"),
    Layout(dp=4, sharding="optim"),
    Layout(pp=3, schedule="interleaved"),
    Layout(tp=2),
    Layout(dp=2, sharding="no_shard"),
    Layout(pp=4, schedule="interleaved-zb"),
    Layout(tp=4, sp=True),
    Layout(pp=2, schedule="gpipe", dp=2, sharding="optim_grads"),
    Layout(whole_batch=True),
    Layout(tp=2, pp=2, schedule="dualpipev"),
    Layout(dp=2, sharding="optim_grads_params"),
    Layout(pp=4, schedule="1f1b"),
    Layout(tp=2, sp=True),
)
QUICK = LAYOUTS[:4]

Ledger = list[list[int]]
"""Ids of the samples of each step, over all ranks, ascending."""


def count(layouts: Sequence[Layout] = LAYOUTS) -> list[dict[str, Any]]:
    """Rows: samples, losses and final state of a run that resumes in each of `layouts` in turn."""
    start = time.perf_counter()
    steps = STEPS_A_LEG * len(layouts)
    plain = Layout(whole_batch=True)
    with tempfile.TemporaryDirectory() as name, one_thread():
        folder = Path(name)
        data = make_byte_dataset(write_prose(folder / "corpus.jsonl"))
        common = f"--data-path {data} --train-iters {steps} --save-interval {steps} --eval-iters 0".split()
        expected = _leg(plain, [*common, "--save", str(folder / "plain")], folder / "ledger-plain")
        stopping = [*common, "--save", str(folder / "changing"), "--exit-interval", str(STEPS_A_LEG)]
        dealt = [_leg(layout, stopping, folder / f"ledger-{leg}") for leg, layout in enumerate(layouts)]
        samples = [_other_samples(leg, ledger, expected) for leg, ledger in enumerate(dealt)]
        losses = [metrics(folder / run, "lm_loss") for run in ("changing", "plain")]
        apart = [_other_losses(leg, *losses) for leg in range(len(layouts))]
        state = difference(folder / "changing", folder / "plain")
    limit, state_limit = LIMITS["fp32"]
    far = None
    if max(state.parameter, state.optimizer_state) > state_limit:
        far = f"parameters {state.parameter:.1e} ({state.parameter_name}), optimizer {state.optimizer_state:.1e} apart"
    seconds = time.perf_counter() - start
    names = [layout.name for layout in layouts]
    return [
        _row("resumed in another layout: each sample of the plain run once, in order", names, samples, seconds),
        _row(f"resumed in another layout: losses of the plain run within {limit:g}", names, apart, seconds),
        _row(f"weights and optimizer after all layouts within {state_limit:g}", ["end"], [far], seconds),
    ]


def _row(what: str, names: list[str], problems: list[str | None], seconds: float) -> dict[str, Any]:
    failures = [f"{name}: {problem}" for name, problem in zip(names, problems, strict=True) if problem is not None]
    row = {"test": "R6", "what": what, "trials": len(problems), "passed": len(problems) - len(failures)}
    return row | {"seconds": round(seconds, 1)} | ({"failures": failures} if failures else {})


def _leg(layout: Layout, flags: list[str], folder: Path) -> Ledger:
    """Train in `layout` until the run stops; returns what its ranks were dealt."""
    folder.mkdir()
    arguments = [*layout.flags, *flags]
    if layout.world_size == 1:
        _train(0, arguments, folder)
    else:
        run_distributed(_train, layout.world_size, arguments, folder)
    return _merge([json.loads(file.read_text()) for file in folder.iterdir()])


def _train(rank: int, flags: list[str], folder: Path) -> None:
    """Train in this process, or in this rank of a process group, and write down what it was dealt."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), _recorded() as dealt:
        config = parse_args(flags).config
        context = ParallelContext.create(config.parallel, torch.device("cpu"))
        assert pretrain_in(context, config) == 0
    entry = {"dp_rank": context.dp_rank, "dp_size": context.dp_size, "steps": dealt}
    (folder / f"{rank}.json").write_text(json.dumps(entry))


@contextlib.contextmanager
def _recorded() -> Iterator[list[list[int]]]:
    """The ids of the samples that the steps of this process take, a list a step; there is no evaluation.

    A batch that was prepared ahead counts when a step takes it; batches are recognised by where their memory lies.
    """
    dealt: list[list[int]] = []
    read: dict[int, list[int]] = {}
    batch, step_batch = DenoisingDataset.batch, Prefetcher.step_batch

    def read_batch(dataset: DenoisingDataset, ids: np.ndarray) -> Batch:
        made = batch(dataset, ids)
        read[made.encoder_input_ids.ctypes.data] = ids.tolist()
        return made

    def take_batch(prefetcher: Prefetcher, first_sample: int) -> TensorBatch:
        taken = step_batch(prefetcher, first_sample)
        dealt.append(read.pop(taken.encoder_input_ids.data_ptr()))
        return taken

    with (
        patch.object(DenoisingDataset, "batch", read_batch),
        patch.object(Prefetcher, "step_batch", take_batch),
    ):
        yield dealt


def _merge(ranks: list[dict[str, Any]]) -> Ledger:
    """One ledger of all ranks: those of a model replica have to agree, and each replica counts once."""
    of_replica = {entry["dp_rank"]: entry["steps"] for entry in ranks}
    for entry in ranks:
        assert entry["steps"] == of_replica[entry["dp_rank"]], f"ranks of replica {entry['dp_rank']} read other samples"
    assert len(of_replica) == ranks[0]["dp_size"]
    return [sorted(itertools.chain(*parts)) for parts in zip(*of_replica.values(), strict=True)]


def _other_samples(leg: int, dealt: Ledger, expected: Ledger) -> str | None:
    """How the samples of one leg differ from those of the plain run in the same steps, if they do."""
    first = leg * STEPS_A_LEG
    wanted = expected[first : first + STEPS_A_LEG]
    assert wanted == [list(range(i * GLOBAL_BATCH_SIZE, (i + 1) * GLOBAL_BATCH_SIZE)) for i in (first, first + 1)]
    return None if dealt == wanted else f"samples {dealt}, not {wanted}"


def _other_losses(leg: int, found: dict[int, float], expected: dict[int, float]) -> str | None:
    """How far the losses of one leg are from the plain run's, if too far."""
    steps = range(leg * STEPS_A_LEG + 1, (leg + 1) * STEPS_A_LEG + 1)
    worst = max(abs(found[step] / expected[step] - 1.0) for step in steps)
    return None if worst < LIMITS["fp32"][0] else f"loss off by {worst:.1e}"
