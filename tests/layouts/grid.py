"""The rows of the table of layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from tests.layouts.layout import Layout

SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv", "dualpipev")
SPLIT_BACKWARD = ("interleaved-zb", "zbv", "dualpipev")
SHARDING = ("no_shard", "optim", "optim_grads", "optim_grads_params")
TENSOR = ({"tp": 1}, {"tp": 2}, {"tp": 2, "sp": True})  # none, tensor parallel, and sequence parallel as well


@dataclass(frozen=True)
class Section:
    """Rows of the table that belong together.

    Attributes:
        title: What varies.
        layouts: The rows.
    """

    title: str
    layouts: tuple[Layout, ...]


def _combinations() -> Iterator[Layout]:
    """Everything in {1, 2}, tied and untied."""
    for variant, tensor, pp, dp in product(("untied", "tied"), TENSOR, (1, 2), (1, 2)):
        yield Layout(**tensor, pp=pp, dp=dp, variant=variant)  # type: ignore[arg-type]


def _sizes_of_four() -> Iterator[Layout]:
    for variant in ("untied", "tied"):
        yield Layout(tp=4, variant=variant)
        yield Layout(tp=4, sp=True, variant=variant)
        yield Layout(dp=4, variant=variant)
        yield Layout(pp=4, variant=variant)
    yield Layout(tp=4, sp=True, pp=2, schedule="zbv")
    yield Layout(tp=2, sp=True, pp=4, schedule="interleaved")


def _schedules() -> Iterator[Layout]:
    for schedule in SCHEDULES:
        for variant in ("untied", "tied"):
            yield Layout(pp=2, schedule=schedule, variant=variant)
        yield Layout(pp=4, schedule=schedule)
        yield Layout(tp=2, sp=True, pp=2, schedule=schedule)
        yield Layout(pp=2, schedule=schedule, dp=2, sharding="optim_grads")
        yield Layout(tp=2, sp=True, pp=2, schedule=schedule, dp=2, sharding="optim_grads", variant="tied")
    yield Layout(pp=2, schedule="interleaved", stages=4)
    yield Layout(pp=2, schedule="1f1b", cuts="E3|D5", variant="tied")
    yield Layout(pp=4, schedule="interleaved-zb", stages=3, variant="tied")


def _sharding() -> Iterator[Layout]:
    for sharding in SHARDING:
        yield Layout(dp=2, sharding=sharding)
        yield Layout(dp=4, sharding=sharding, variant="tied")
        yield Layout(tp=2, sp=True, dp=2, sharding=sharding)
        for schedule in ("1f1b", "interleaved", "zbv"):
            yield Layout(pp=2, schedule=schedule, dp=2, sharding=sharding)
        yield Layout(tp=2, sp=True, pp=2, schedule="interleaved", dp=2, sharding=sharding)


def _recompute() -> Iterator[Layout]:
    for recompute in ("selective", "full"):
        yield Layout(tp=2, recompute=recompute)
        yield Layout(tp=2, sp=True, recompute=recompute)
        yield Layout(pp=2, schedule="1f1b", recompute=recompute)
        yield Layout(pp=2, schedule="interleaved", recompute=recompute, variant="tied")
        yield Layout(dp=2, sharding="optim_grads_params", recompute=recompute)
        yield Layout(tp=2, sp=True, pp=2, dp=2, sharding="optim_grads", recompute=recompute)
    for recompute in ("full, groups of 2", "full, first layer"):
        yield Layout(tp=2, sp=True, pp=2, schedule="1f1b", recompute=recompute)
    for schedule, recompute in product(SPLIT_BACKWARD, ("selective", "full")):
        yield Layout(pp=2, schedule=schedule, recompute=recompute)


def _variants() -> Iterator[Layout]:
    for variant in ("v1.0", "Megatron's", "rotary"):
        yield Layout(tp=2, variant=variant)
        yield Layout(tp=2, sp=True, variant=variant)
        yield Layout(pp=2, schedule="zbv", variant=variant)
        yield Layout(tp=2, sp=True, pp=2, dp=2, sharding="optim_grads_params", variant=variant)
    yield Layout(tp=2, variant="odd widths")
    yield Layout(tp=4, sp=True, variant="odd widths")
    yield Layout(tp=2, sp=True, pp=2, dp=2, sharding="optim_grads", variant="odd widths")


def _optimizers() -> Iterator[Layout]:
    for optimizer in ("adafactor", "adamw"):
        yield Layout(optimizer=optimizer)
        yield Layout(tp=2, sp=True, optimizer=optimizer)
        yield Layout(pp=2, schedule="interleaved-zb", optimizer=optimizer)
        yield Layout(dp=2, sharding="optim_grads", optimizer=optimizer)
        yield Layout(tp=2, sp=True, pp=2, dp=2, sharding="optim_grads", optimizer=optimizer)


def _precision(precision: str) -> Iterator[Layout]:
    yield Layout(precision=precision)
    yield Layout(tp=2, precision=precision)
    yield Layout(tp=2, sp=True, precision=precision)
    yield Layout(pp=2, schedule="zbv", precision=precision)
    yield Layout(dp=2, sharding="optim_grads", precision=precision)
    yield Layout(tp=2, sp=True, pp=2, dp=2, sharding="optim_grads_params", precision=precision)


SECTIONS = (
    Section("Every combination of 1 and 2", tuple(layout for layout in _combinations() if layout.world_size > 1)),
    Section("Sizes of 4", tuple(_sizes_of_four())),
    Section("Every schedule", tuple(_schedules())),
    Section("Every level of data parallelism", tuple(_sharding())),
    Section("Recomputation", tuple(_recompute())),
    Section("Other architectures", tuple(_variants())),
    Section("Other optimizers", tuple(_optimizers())),
    Section("bf16", tuple(_precision("bf16"))),
    Section("fp16", tuple(_precision("fp16"))),
)
