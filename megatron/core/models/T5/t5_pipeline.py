"""How the model is cut into pipeline stages: costs of its units, cuts, the text form of a layout, the choice of a plan.

P pipeline ranks, v stages on each, S = P v stages, M microbatches a step; s encoder length, t decoder length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise

import numpy as np

from megatron.core.config import ModelConfig, ParallelConfig
from megatron.core.errors import UserError
from megatron.core.models.T5.t5_flops import unit_flops_per_sequence
from megatron.core.models.T5.t5_units import Units
from megatron.core.pipeline_parallel.cuts import Cuts, CutSearch, even_cuts
from megatron.core.pipeline_parallel.schedules import SCHEDULES, check_schedule, stage_ranks
from megatron.core.pipeline_parallel.simulator import StageCosts, Timeline, step_simulator

# What norms and embeddings do to an element of the hidden state is bound by memory: it takes as long as about this many
# operations of a matrix product on current accelerators (some 400 TFLOP/s against 3 TB/s, two bytes in and two out).
_FLOPS_PER_ELEMENT = 500


def unit_costs(config: ModelConfig, encoder_length: int, decoder_length: int) -> list[int]:
    """Cost of each unit's forward pass over one sequence, in floating-point operations.

    Tensor parallelism divides all of them alike, so it does not matter here, nor does the size of a microbatch.
    """
    costs = unit_flops_per_sequence(config, encoder_length, decoder_length)
    units = Units.of(config)
    for unit, length in (
        (units.encoder_embedding, encoder_length),
        (units.encoder_norm, encoder_length),
        (units.decoder_embedding, decoder_length),
        (units.decoder_norm, decoder_length),
    ):
        costs[unit] = _FLOPS_PER_ELEMENT * length * config.hidden_size
    return costs


def message_elements(
    config: ModelConfig, stages: tuple[range, ...], encoder_length: int, decoder_length: int
) -> list[int]:
    """Elements that each stage sends to the next for one sequence; the last sends none, `[S]`.

    The gradients that come back have the same sizes.
    """
    units = Units.of(config)
    encoder_output, decoder_hidden = encoder_length * config.hidden_size, decoder_length * config.hidden_size
    elements = []
    for stage in stages[:-1]:
        elements.append(encoder_output * (stage[-1] < units.decoder_layers[-1]))
        elements[-1] += decoder_hidden * (stage[-1] >= units.decoder_embedding)
    return [*elements, 0]


@dataclass(frozen=True)
class StagePlan:
    """Which units are on which rank, and in which order ranks work.

    Attributes:
        units: Numbers of the model's units.
        schedule: A key of `SCHEDULES`.
        num_ranks: Pipeline ranks P.
        stages: Units of each stage, in order; together all units, none empty.
        unit_costs: Cost of each unit's forward pass: FLOPs of one sequence, or what `choose_plan` was given, `[U]`.
    """

    units: Units
    schedule: str
    num_ranks: int
    stages: tuple[range, ...]
    unit_costs: tuple[int, ...]

    def __post_init__(self) -> None:
        assert [unit for stage in self.stages for unit in stage] == list(self.units.all)
        assert all(self.stages) and len(self.stages) % self.num_ranks == 0

    @property
    def stages_per_rank(self) -> int:
        """Stages on each rank, v."""
        return len(self.stages) // self.num_ranks

    @property
    def costs(self) -> tuple[int, ...]:
        """Cost of each stage's forward pass, without that of gradients that the head computes in it, `[S]`."""
        return tuple(sum(self.unit_costs[unit] for unit in stage) for stage in self.stages)

    def stage_costs(self, scale: float = 1.0, *, recompute: bool = False) -> StageCosts:
        """Costs of the stages' passes, times `scale`; with `recompute`, the backward pass repeats the forward pass."""
        head = self.unit_costs[self.units.head] * scale
        return StageCosts.from_forward([cost * scale for cost in self.costs], 1.0 + recompute, head=head)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each stage."""
        return stage_ranks(self.schedule, self.num_ranks, self.stages_per_rank)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, ascending."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]

    @property
    def layout(self) -> str:
        """The stages in the text form of `--pipeline-layout`."""
        return format_layout(self.units, self.stages)

    def describe(self) -> str:
        """The stage table: rank, stage, units, share of the whole model's cost; one line a stage, by rank."""
        total = sum(self.costs)
        head = (
            f"pipeline: schedule {self.schedule}, {self.num_ranks} ranks, {self.stages_per_rank} "
            f"stage{'s' * (self.stages_per_rank > 1)} on each; layout {self.layout}"
        )
        lines = [head, f"{'rank':>4}  {'stage':>5}  {'share':>6}  units"]
        for rank in range(self.num_ranks):
            for stage in self.stages_of(rank):
                share = 100 * self.costs[stage] / total
                lines.append(f"{rank:>4}  {stage:>5}  {share:5.2f}%  {_describe_stage(self.units, self.stages[stage])}")
            if self.stages_per_rank > 1:
                share = 100 * sum(self.costs[stage] for stage in self.stages_of(rank)) / total
                lines.append(f"{rank:>4}  {'all':>5}  {share:5.2f}%")
        return "\n".join(lines)


def _kind(units: Units, unit: int) -> str:
    """What a unit is, in the words of a layout."""
    if unit in units.encoder_layers:
        return "E"
    if unit in units.decoder_layers:
        return "D"
    if unit in (units.encoder_embedding, units.decoder_embedding):
        return "embed"
    return "head" if unit == units.head else "norm"


def _neighbours(units: Units) -> dict[int, int]:
    """For each unit that is no layer, the one in whose stage it is when a layout does not name it."""
    return {
        units.encoder_embedding: units.encoder_layers[0],
        units.encoder_norm: units.encoder_layers[-1],
        units.decoder_embedding: units.decoder_layers[0],
        units.decoder_norm: units.decoder_layers[-1],
        units.head: units.decoder_norm,
    }


def _describe_stage(units: Units, stage: range) -> str:
    """Such as `enc embed, enc 0-5`."""
    parts = []
    for kind, group in groupby(stage, lambda unit: _kind(units, unit)):
        run = list(group)
        stack, layers = ("enc", units.encoder_layers) if run[0] <= units.encoder_norm else ("dec", units.decoder_layers)
        first, last = run[0] - layers[0], run[-1] - layers[0]
        name = kind if kind not in "ED" else f"{first}" if first == last else f"{first}-{last}"
        parts.append("head" if kind == "head" else f"{stack} {name}")
    return ", ".join(parts)


def format_layout(units: Units, stages: tuple[range, ...]) -> str:
    """Text form of the stages, such as `E8|E4 D2|D10`; `parse_layout` reads it back."""
    neighbours = _neighbours(units)
    texts = []
    for stage in stages:
        words = []
        for kind, group in groupby(stage, lambda unit: _kind(units, unit)):
            run = list(group)
            if kind in "ED":
                words.append(f"{kind}{len(run)}")
            elif neighbours[run[0]] not in stage:
                words.append(kind)
        texts.append(" ".join(words))
    repeated = [(text, len(list(group))) for text, group in groupby(texts)]
    return "|".join(text if count == 1 else f"{text}*{count}" for text, count in repeated)


def parse_layout(units: Units, text: str) -> tuple[range, ...]:
    """The stages that a layout text describes.

    Stages are separated by `|`. `E8` is 8 encoder layers, `D4` are 4 decoder layers, in order; `E3*8` are 8 stages of
    `E3`. The other units may be left out: an embedding is then in the stage of its stack's first layer, a norm in that
    of its last, the head in that of the decoder norm. To put them elsewhere, name them: `embed`, `norm`, `head`.

    Raises:
        UserError: The text is malformed or is not about a model of this size.
    """
    flag = f"--pipeline-layout {text!r}"
    stage_texts: list[str] = []
    for stage_text in text.split("|"):
        repeated = re.fullmatch(r"\s*([ED]\d+)\*([1-9]\d{0,3})\s*", stage_text)
        stage_texts += [repeated[1]] * int(repeated[2]) if repeated else [stage_text]
    words = [(word, stage) for stage, stage_text in enumerate(stage_texts) for word in stage_text.split()]
    for word, _ in words:
        if not re.fullmatch(r"[ED][1-9]\d*|embed|norm|head", word):
            raise UserError(f"{flag}: {word!r} is none of E<layers>, D<layers>, embed, norm, head; correct it")
    for letter, stack, layers in (("E", "encoder", units.encoder_layers), ("D", "decoder", units.decoder_layers)):
        count = sum(int(word[1:]) for word, _ in words if word[0] == letter)
        if count != len(layers):
            raise UserError(
                f"{flag} has {count} {stack} layers, the model has {len(layers)}; correct the {letter} counts"
            )
    stages = {stage for _, stage in words}
    for stage in range(len(stage_texts)):
        if stage not in stages:
            raise UserError(f"{flag}: stage {stage} is empty; every stage needs a unit")

    stage_of: dict[int, int] = {}
    placed = {"E": 0, "D": 0}
    for word, stage in words:
        if word[0] in "ED":
            layers = units.encoder_layers if word[0] == "E" else units.decoder_layers
            named = list(layers[placed[word[0]] :][: int(word[1:])])
            placed[word[0]] += len(named)
        elif word == "embed":
            named = [units.decoder_embedding if placed["E"] else units.encoder_embedding]
        elif word == "norm":
            named = [units.decoder_norm if placed["D"] else units.encoder_norm]
        else:
            named = [units.head]
        if named[0] <= max(stage_of, default=-1):
            raise UserError(f"{flag}: {word!r} is out of place; the order is embed, E, norm, embed, D, norm, head")
        stage_of |= dict.fromkeys(named, stage)
    for unit, neighbour in _neighbours(units).items():
        stage_of.setdefault(unit, stage_of[neighbour])
    members = [[unit for unit in units.all if stage_of[unit] == stage] for stage in range(len(stage_texts))]
    return tuple(range(run[0], run[-1] + 1) for run in members)


_MOST_STAGES_PER_RANK = 4  # that are tried: more gain little in simulations, and each adds messages
_TIE = 0.01  # of the step time: a simpler schedule that is not slower by more is preferred


def choose_plan(
    config: ModelConfig,
    parallel: ParallelConfig,
    encoder_length: int,
    decoder_length: int,
    num_microbatches: int,
    *,
    recompute_granularity: str | None = None,
    compiled: bool = False,
    own_products: bool = False,
    costs: list[int] | None = None,
) -> StagePlan:
    """Schedule, stages on each rank and cuts with the least simulated step time, where flags leave them open.

    The same on every rank and machine. `--pipeline-schedule auto` compares all schedules that can run.

    Args:
        config: Architecture.
        parallel: The pipeline's size, and what the user has fixed.
        encoder_length: Tokens of an encoder row.
        decoder_length: Tokens of a decoder row.
        num_microbatches: Microbatches a step.
        recompute_granularity: What is computed again in the backward pass, as in `ComputeConfig`.
        compiled: Whether stages are compiled.
        own_products: Whether linear layers have products that leave no weight gradients to put off.
        costs: Cost of each unit's forward pass in any unit, in place of `unit_costs`, `[U]`.

    Raises:
        UserError: What is asked for cannot be had; one line.
    """
    units = Units.of(config)
    costs = unit_costs(config, encoder_length, decoder_length) if costs is None else costs
    num_ranks = parallel.pipeline_model_parallel_size
    if num_ranks == 1:
        return StagePlan(units, "1f1b", 1, (units.all,), tuple(costs))
    layout = None if parallel.pipeline_layout is None else parse_layout(units, parallel.pipeline_layout)
    fixed = _fixed_stages_per_rank(parallel, layout)
    refusals: list[UserError] = []
    plans: list[tuple[float, StagePlan]] = []
    for name, stages_per_rank in _candidates(parallel.pipeline_schedule, fixed):
        if (
            parallel.pipeline_schedule == "auto"
            and SCHEDULES[name].splits_backward
            and (recompute_granularity is not None or own_products)
        ):
            # What is put off keeps the inputs and gradients of all products, the memory that recomputation is to save.
            continue
        try:
            _check_compiled(name, compiled)
            check_schedule(name, num_ranks, stages_per_rank, num_microbatches)
            _check_enough_units(units, num_ranks, stages_per_rank)
        except UserError as error:
            refusals.append(error)
            continue
        backward_input = 2 if recompute_granularity == "full" else 1
        time, stages = _cut(units, costs, name, num_ranks, stages_per_rank, num_microbatches, backward_input, layout)
        plans.append((time, StagePlan(units, name, num_ranks, stages, tuple(costs))))
    if not plans:
        raise refusals[0]
    least = min(time for time, _ in plans)
    return next(plan for time, plan in plans if time <= (1 + _TIE) * least)


def _candidates(schedule: str, stages_per_rank: int | None) -> list[tuple[str, int]]:
    """(schedule, stages a rank) to compare, simplest first."""
    candidates = []
    for name in SCHEDULES if schedule == "auto" else [schedule]:
        needed = SCHEDULES[name].stages_per_rank
        if stages_per_rank is not None:
            if schedule != "auto" or needed == stages_per_rank or (needed is None and stages_per_rank > 1):
                candidates.append((name, stages_per_rank))
        elif needed is not None:
            candidates.append((name, needed))
        else:
            candidates += [(name, number) for number in range(2, _MOST_STAGES_PER_RANK + 1)]
    return candidates


def _fixed_stages_per_rank(parallel: ParallelConfig, layout: tuple[range, ...] | None) -> int | None:
    """Stages on each rank as given by a layout or a flag, or None."""
    given, num_ranks = parallel.num_virtual_stages_per_pipeline_rank, parallel.pipeline_model_parallel_size
    if layout is None:
        return given
    if len(layout) % num_ranks:
        raise UserError(
            f"--pipeline-layout has {len(layout)} stages, which --pipeline-model-parallel-size {num_ranks} does not "
            "divide; add or join stages"
        )
    if given not in (None, len(layout) // num_ranks):
        raise UserError(
            f"--pipeline-layout has {len(layout) // num_ranks} stages on each of {num_ranks} ranks, "
            f"--num-virtual-stages-per-pipeline-rank is {given}; remove one of them"
        )
    return len(layout) // num_ranks


def _check_compiled(name: str, compiled: bool) -> None:
    """Refuse schedules with a split backward pass for compiled layers."""
    if compiled and SCHEDULES[name].splits_backward:
        raise UserError(
            f"--pipeline-schedule {name} splits the backward pass, which --compile cannot do; "
            "use interleaved or auto, or remove --compile"
        )


def _check_enough_units(units: Units, num_ranks: int, stages_per_rank: int) -> None:
    """Refuse more stages than units."""
    if num_ranks * stages_per_rank > len(units.all):
        lower = "--num-virtual-stages-per-pipeline-rank" if stages_per_rank > 1 else "--pipeline-model-parallel-size"
        raise UserError(
            f"--pipeline-model-parallel-size {num_ranks} with {stages_per_rank} stage{'s' * (stages_per_rank > 1)} on "
            f"each rank needs {num_ranks * stages_per_rank} stages, the model has {len(units.all)} units (layers, "
            f"embeddings, norms and head); lower {lower}"
        )


def _cut(
    units: Units,
    costs: list[int],
    name: str,
    num_ranks: int,
    stages_per_rank: int,
    num_microbatches: int,
    backward_input: int,
    layout: tuple[range, ...] | None,
) -> tuple[float, tuple[range, ...]]:
    """Time of a step (comparable between schedules) and stages: those of `layout`, or the best that are found."""
    # Further rounds of microbatches repeat what the eighth adds.
    simulator = partial(step_simulator, name, num_ranks, stages_per_rank)
    per_round = num_microbatches // max(1, num_microbatches // num_ranks)
    simulated = min(num_microbatches, 8 * per_round)
    # Whole numbers of moderate size: the simulator's sums are then exact and the same everywhere.
    total = sum(costs)
    relative = [max(1, cost * 2**20 // total) for cost in costs]
    search = CutSearch(
        simulator(simulated),
        relative,
        backward_input=backward_input,
        shorter=step_simulator(name, num_ranks, stages_per_rank, 3 * per_round)
        if simulated < num_microbatches
        else None,
        repetitions=(num_microbatches - simulated) / per_round,
    )
    if layout is not None:
        cuts = np.array([[*(stage.start for stage in layout), layout[-1].stop]])
        return float(search.step_times(cuts)[0]), layout
    cuts, time = search.best(_first_cuts(units, relative, num_ranks * stages_per_rank))
    cuts, time = _tidy(units, cuts, time, search)
    return time, tuple(range(int(start), int(stop)) for start, stop in pairwise(cuts))


def _tidy(units: Units, cuts: Cuts, time: float, search: CutSearch) -> tuple[Cuts, float]:
    """Embeddings and norms back to the layers they go with, where that costs next to nothing, for a layout to read."""
    limit = (1 + _TIE / 10) * time
    for unit, neighbour in _neighbours(units).items():
        parted, joined = max(unit, neighbour), unit + (unit > neighbour)  # where a cut is, where it should be
        if parted in cuts and joined not in cuts:
            candidate = np.where(cuts == parted, joined, cuts)
            candidate_time = float(search.step_times(candidate[None])[0])
            if candidate_time <= limit:
                cuts, time = candidate, candidate_time
    return cuts, time


def _first_cuts(units: Units, costs: list[int], num_stages: int) -> list[Cuts]:
    """Cuts to start from: equal stages, by cost and by units, and every number of equal encoder and decoder stages."""
    boundary = units.decoder_embedding
    cuts = [even_cuts(costs, num_stages), even_cuts([1] * len(costs), num_stages)]
    for for_encoder in range(1, num_stages):
        for_decoder = num_stages - for_encoder
        if for_encoder <= boundary and for_decoder <= len(costs) - boundary:
            decoder = boundary + even_cuts(costs[boundary:], for_decoder)[1:]
            cuts.append(np.concatenate([even_cuts(costs[:boundary], for_encoder), decoder]))
    return cuts


def simulate_plan(
    plan: StagePlan,
    num_microbatches: int,
    *,
    seconds_per_flop: float = 1.0,
    recompute: bool = False,
    transfer_times: Sequence[float] | None = None,
    activation_sizes: Sequence[float] | None = None,
) -> Timeline:
    """A step of a plan, with its costs for one microbatch taken from the FLOPs.

    Args:
        plan: Schedule and stages.
        num_microbatches: Microbatches a step.
        seconds_per_flop: Turns `plan.costs` into the time of a microbatch; times are in FLOPs when not given.
        recompute: Whether the backward pass repeats the forward pass.
        transfer_times: Of the messages between stages on different ranks, in the unit of the times, `[S - 1]`.
        activation_sizes: What each stage holds of a microbatch, `[S]`. Default: its share of the model's cost.
    """
    simulator = step_simulator(plan.schedule, plan.num_ranks, plan.stages_per_rank, num_microbatches)
    costs = plan.stage_costs(seconds_per_flop, recompute=recompute)
    if activation_sizes is None:
        activation_sizes = [cost / sum(plan.costs) for cost in plan.costs]
    return simulator.timeline(costs, transfer_times, activation_sizes)
