"""What the ranks send each other in a step, counted and compared with the formulas of docs/parallelism.md."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from megatron.core.parallel_state import ParallelContext
from megatron.core.pipeline_parallel.schedules import stage_ranks
from megatron.training.arguments import parse_args
from megatron.training.data import fit_vocabulary, open_data
from megatron.training.training import Trainer
from tests.collectives import CountCollectives
from tests.distributed import run_distributed
from tests.layouts.layout import GLOBAL_BATCH_SIZE, NUM_HEADS, Layout

ENCODER_LAYERS, DECODER_LAYERS = 3, 5
S, T, HIDDEN, VOCABULARY, BUCKETS = 37, 9, 32, 384, 32
FP32 = 4
# Units of the model, in order: embedding, encoder layers, encoder norm, embedding, decoder layers, decoder norm, head.
ENCODER_UNITS = range(1, 1 + ENCODER_LAYERS)
DECODER_EMBEDDING = ENCODER_UNITS.stop + 1
DECODER_UNITS = range(DECODER_EMBEDDING + 1, DECODER_EMBEDDING + 1 + DECODER_LAYERS)
HEAD = DECODER_UNITS.stop + 1
MATRICES = {
    "encoder": 9,
    "decoder": 14,
}  # logical matrices of a layer, norms included


class Expected:
    """Calls and bytes of one rank in a step."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def add(self, operator: str, nbytes: int, times: int = 1) -> None:
        self.calls[operator] += times
        self.nbytes[operator] += times * nbytes


def expected(layout: Layout, cuts: list[list[int]], indices: list[int], ranks: tuple[int, ...]) -> Expected:
    """The formulas. `cuts`: units of every stage; `indices`: stages of this rank; `ranks`: pipeline rank of a stage."""
    count = Expected()
    count.add("allreduce_", 8)  # number of target tokens, over the data-parallel ranks
    count.add("allreduce_", 8)  # gradient norm
    if layout.pp == 1:  # between microbatches: whether to give the step up
        count.add("allreduce_", 4, _microbatches(layout)[0] - 1)
    if layout.tp > 1:
        for index in indices:
            _tensor_parallel(count, layout, cuts[index])
    stages_held = [cuts[index] for index in indices]
    _data_parallel(count, layout, stages_held)
    if layout.sp:
        count.add("allreduce_", FP32 * sum(_norm_parameters(units) for units in stages_held))
    if layout.tp > 1 or (layout.dp > 1 and layout.sharding != "no_shard"):  # the optimizer's sums over matrices
        count.add("allreduce_", 8 * sum(_logical_matrices(layout, units) for units in stages_held))
    if layout.pp > 1:
        _pipeline(count, layout, cuts, indices, ranks)
        _shared(count, layout, cuts, ranks, ranks[indices[0]])
    return count


def _microbatches(layout: Layout) -> tuple[int, int]:
    """M and b."""
    rows = max(1, GLOBAL_BATCH_SIZE // (max(2, 2 * layout.pp) * layout.dp))
    return GLOBAL_BATCH_SIZE // layout.dp // rows, rows


def _padded(layout: Layout, length: int) -> int:
    return -(-length // layout.tp) * layout.tp if layout.sp else length


def _tensor_parallel(count: Expected, layout: Layout, units: list[int]) -> None:
    """Activations between the parts that ranks divide, and the loss."""
    times, rows = _microbatches(layout)
    encoder, decoder = (rows * _padded(layout, length) * HIDDEN * FP32 for length in (S, T))
    enter, leave = ("_allgather_base_", "_reduce_scatter_base_") if layout.sp else (None, "allreduce_")
    transposed = {"_allgather_base_": "_reduce_scatter_base_", "_reduce_scatter_base_": "_allgather_base_"}

    def block_input(nbytes: int, times: int) -> None:
        if enter:
            count.add(enter, nbytes, times)
        count.add(transposed[enter] if enter else "allreduce_", nbytes, times)

    def block_output(nbytes: int, times: int) -> None:
        count.add(leave, nbytes, times)
        if enter:
            count.add(transposed[leave], nbytes, times)

    stacks = ((ENCODER_UNITS, 2, encoder), (DECODER_UNITS, 3, decoder))
    for layers, blocks, nbytes in stacks:
        held = [unit for unit in units if unit in layers]
        block_input(nbytes, times * blocks * len(held))
        block_output(nbytes, times * blocks * len(held))
        if layout.recompute == "full":  # forward again, but for the end of each layer, which nothing needs
            if enter:
                count.add(enter, nbytes, times * blocks * len(held))
            count.add(leave, nbytes, times * (blocks - 1) * len(held))
    embedded = (0 in units) * encoder + (DECODER_EMBEDDING in units) * decoder
    if embedded:
        block_output(embedded, times)
    if any(unit in DECODER_UNITS for unit in units):
        block_input(encoder, times)  # the encoder output, once for all layers of the stage
    if HEAD in units:
        block_input(decoder, times)
        count.add("_allgather_base_", layout.tp * 2 * rows * T * FP32, times)  # two numbers a token


def _norm_parameters(units: list[int]) -> int:
    """Parameters that tensor-parallel ranks replicate."""
    norms = 2 * sum(u in ENCODER_UNITS for u in units) + 3 * sum(u in DECODER_UNITS for u in units)
    return HIDDEN * (norms + (ENCODER_UNITS.stop in units) + (DECODER_UNITS.stop in units))


def _held_tables(layout: Layout, units: list[int]) -> dict[str, int]:
    """Vocabulary and relative-bias tables of a stage, with their sizes on a tensor-parallel rank."""
    tables = {}
    embeds = 0 in units or DECODER_EMBEDDING in units
    if embeds or (layout.variant == "tied" and HEAD in units):
        tables["embedding"] = VOCABULARY * HIDDEN // layout.tp
    for name, layers in (("encoder bias", ENCODER_UNITS), ("decoder bias", DECODER_UNITS)):
        if any(unit in layers for unit in units):
            tables[name] = NUM_HEADS * BUCKETS // layout.tp
    return tables


def _parameters(layout: Layout, units: list[int]) -> int:
    """Parameters of a stage on a tensor-parallel rank."""
    attention, feed_forward = 4 * HIDDEN * HIDDEN, 3 * 64 * HIDDEN
    matrices = sum(u in ENCODER_UNITS for u in units) * (attention + feed_forward)
    matrices += sum(u in DECODER_UNITS for u in units) * (2 * attention + feed_forward)
    if HEAD in units and layout.variant != "tied":
        matrices += VOCABULARY * HIDDEN
    return matrices // layout.tp + sum(_held_tables(layout, units).values()) + _norm_parameters(units)


def _outside_layers(layout: Layout, units: list[int]) -> int:
    """Of the parameters of a stage, those that are in no layer."""
    norms = HIDDEN * ((ENCODER_UNITS.stop in units) + (DECODER_UNITS.stop in units))
    head = VOCABULARY * HIDDEN // layout.tp if HEAD in units and layout.variant != "tied" else 0
    return sum(_held_tables(layout, units).values()) + norms + head


def _logical_matrices(layout: Layout, units: list[int]) -> int:
    layers = MATRICES["encoder"] * sum(u in ENCODER_UNITS for u in units)
    layers += MATRICES["decoder"] * sum(u in DECODER_UNITS for u in units)
    norms = (ENCODER_UNITS.stop in units) + (DECODER_UNITS.stop in units)
    head = HEAD in units and layout.variant != "tied"
    return layers + norms + head + len(_held_tables(layout, units))


def _data_parallel(count: Expected, layout: Layout, stages: list[list[int]]) -> None:
    """Gradients and parameters, once a step whatever the microbatches.

    ZeRO-3: parameters of layers twice a microbatch, others once. Gradients are fp32 in any case.
    """
    if layout.dp == 1:
        return
    times, _ = _microbatches(layout)
    for units in stages:
        nbytes = FP32 * _parameters(layout, units)
        if layout.sharding == "no_shard":
            count.add("allreduce_", nbytes)
            continue
        # All layers of so small a model are one unit, what is outside them another.
        has_layers = any(unit in ENCODER_UNITS or unit in DECODER_UNITS for unit in units)
        num_units = 1 if layout.sharding == "optim" else 1 + has_layers
        gathers, gathered = num_units, _parameters(layout, units)
        if layout.sharding == "optim_grads_params":
            gathers, gathered = times * (1 + 2 * has_layers), times * (2 * gathered - _outside_layers(layout, units))
        count.calls["_allgather_base_"] += gathers
        count.nbytes["_allgather_base_"] += gathered * (FP32 if layout.precision == "fp32" else FP32 // 2)
        count.calls["_reduce_scatter_base_"] += num_units
        count.nbytes["_reduce_scatter_base_"] += nbytes


def _pipeline(
    count: Expected, layout: Layout, cuts: list[list[int]], indices: list[int], ranks: tuple[int, ...]
) -> None:
    """Messages: hidden states to the next stage, their gradients to the one before."""
    times, rows = _microbatches(layout)
    parts = layout.tp if layout.sp else 1
    encoder, decoder = (rows * _padded(layout, length) // parts * HIDDEN * FP32 for length in (S, T))
    for index in indices:
        for before, after in ((index - 1, index), (index, index + 1)):
            if before < 0 or after == len(cuts) or ranks[before] == ranks[after]:
                continue
            unit = cuts[after][0]
            messages = [encoder] if unit <= DECODER_EMBEDDING else [decoder]
            if unit in DECODER_UNITS:
                messages.append(encoder)
            for nbytes in messages:
                count.add("send", nbytes, times)
                count.add("recv_", nbytes, times)


def _shared(count: Expected, layout: Layout, cuts: list[list[int]], ranks: tuple[int, ...], rank: int) -> None:
    """Sums of the gradients of copies, and the optimizer's sums, which the copies take from the owner."""
    holders: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for index, units in enumerate(cuts):
        for name, size in _held_tables(layout, units).items():
            holders[name].append(ranks[index])
            sizes[name] = size // (1 if layout.sharding == "no_shard" else layout.dp)
    gradients: Counter[tuple[int, ...]] = Counter()
    scales: Counter[tuple[tuple[int, ...], int]] = Counter()
    for name, held in holders.items():
        group = tuple(sorted(set(held)))
        if len(group) > 1 and rank in group:
            gradients[group] += FP32 * sizes[name]
            scales[group, held[0]] += 8
    for nbytes in gradients.values():
        count.add("allreduce_", nbytes)
    for nbytes in scales.values():
        count.add("broadcast_", nbytes)


def _count(rank, layouts, data_path):
    found = []
    for layout in layouts:
        flags = [*layout.flags, "--train-iters", "2", "--data-path", str(data_path), "--eval-iters", "0"]
        config = parse_args(flags).config
        context = ParallelContext.create(config.parallel, torch.device("cpu"))
        data = open_data(config)
        fit_vocabulary(config, data.tokenizer, given=False)
        trainer = Trainer(config, data, context)
        trainer.train_step()
        with CountCollectives() as count:
            trainer.train_step()
        plan, cuts, indices, ranks = trainer.model.plan, [list(range(HEAD + 1))], [0], (0,)
        if plan is not None:
            cuts, indices = [list(units) for units in plan.stages], plan.stages_of(context.pp_rank)
            ranks = stage_ranks(plan.schedule, context.pp_size, len(indices))
        formula = expected(layout, cuts, indices, ranks)
        found.append([(count.calls, count.nbytes), (+formula.calls, +formula.nbytes)])
    return found


LAYOUTS = {
    2: (
        Layout(tp=2),
        Layout(tp=2, sp=True, variant="tied"),
        Layout(tp=2, sp=True, recompute="full"),
        Layout(pp=2, schedule="1f1b"),
        Layout(pp=2, schedule="zbv", variant="tied"),
        Layout(dp=2, sharding="no_shard"),
        Layout(dp=2, sharding="optim"),
        Layout(dp=2, sharding="optim_grads"),
        Layout(dp=2, sharding="optim_grads_params"),
        Layout(dp=2, sharding="no_shard", precision="bf16"),
        Layout(dp=2, sharding="optim_grads", precision="bf16", variant="tied"),
        Layout(dp=2, sharding="optim_grads_params", precision="bf16"),
    ),
    4: (
        Layout(tp=2, sp=True, pp=2, schedule="interleaved", variant="tied"),
        Layout(pp=4, schedule="1f1b"),
        Layout(pp=2, schedule="interleaved-zb", stages=2, dp=2, sharding="optim_grads"),
    ),
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_collectives_and_bytes_of_a_step(byte_dataset: Path, world_size: int) -> None:
    """On every rank."""
    layouts = LAYOUTS[world_size]
    for rank, found in enumerate(run_distributed(_count, world_size, layouts, byte_dataset)):
        for layout, ((calls, nbytes), (expected_calls, expected_bytes)) in zip(layouts, found, strict=True):
            assert calls == expected_calls, f"rank {rank}, {layout.name}"
            assert nbytes == expected_bytes, f"rank {rank}, {layout.name}"
