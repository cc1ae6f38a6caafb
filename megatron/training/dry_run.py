"""`--dry-run`: what a run would need on every rank of a world of any size, on one machine without GPUs or data.

Each pipeline rank is built in turn as the trainer builds it, with torch's fake process group and on the meta device, so
that layouts are refused and parameters divided by the same code. What is not allocated there is computed: activations
by `T5Memory` for the microbatches that the schedule has in flight, gradients and optimizer state by what they are kept
for. Data- and tensor-parallel peers need the same (the first of them the most), so one rank stands for them.

The CUDA context, the buffers of the communication library and fragmentation come on top: a few GiB on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

import torch

from megatron.core.config import DataConfig
from megatron.core.datasets.blending import corpora_of
from megatron.core.datasets.corpus_cache import is_text
from megatron.core.datasets.denoising import DenoisingPlan, mode_tokenizer
from megatron.core.distributed import DataParallel
from megatron.core.errors import UserError
from megatron.core.models.T5.t5_communication import SentBytes, data_bytes, pipeline_bytes, tensor_bytes
from megatron.core.models.T5.t5_flops import training_flops_per_sequence
from megatron.core.models.T5.t5_memory import T5Memory
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_pipeline import message_elements, simulate_plan
from megatron.core.models.T5.t5_units import Units
from megatron.core.optimizer.memory import optimizer_state_bytes
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import ModelParameter, local_tensor, model_parameters, sharded_axes
from megatron.core.pipeline_parallel.simulator import TimedAction
from megatron.core.tensor_parallel import TensorParallel
from megatron.core.tokenizers import DEFAULT_EXTRA_IDS, build_tokenizer
from megatron.training.backends import has_segments
from megatron.training.config import DryRunConfig, RunConfig
from megatron.training.console import say
from megatron.training.data import fit_vocabulary, open_data, row_lengths, tokenizer_of_tasks
from megatron.training.model_setup import build_stages, plan_stages, sharding_strategy

GIB = 2**30


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank needs at the peak of a step.

    Attributes:
        weights: fp32 parameters, the part that this rank keeps.
        gathered: Parameters of others that FSDP2 has gathered to compute with, or 16-bit copies of the rank's own.
        gradients: fp32 sums over the microbatches, and the part that this rank keeps of their sum over the ranks.
        optimizer: State of the optimizer.
        activations: What forward passes keep for backward passes.
        messages: Hidden states and gradients that stages pass on.
        workspace: Gradients of activations, recomputed activations, or buffers of the gradients' reduction.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int
    messages: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


# Columns of the printed table and their widths.
_COLUMNS = {field.name: max(len(field.name), 7) for field in fields(RankMemory)} | {"total": 7}


@dataclass(frozen=True)
class DryRank:
    """One pipeline rank, for all its data- and tensor-parallel ranks.

    Attributes:
        pp_rank: Its number.
        num_parameters: Parameters of its stages, before any division; copies that other stages hold too are counted.
        owned_parameters: Parameters that are counted here when copies are counted once.
        memory: Of its first rank.
        sent: What a rank sends to the others in a step.
        busy: Share of the step that it works, simulated.
    """

    pp_rank: int
    num_parameters: int
    owned_parameters: int
    memory: RankMemory
    sent: SentBytes
    busy: float


class DryRun:
    """A run that is looked at and not made.

    Args:
        config: The run; its vocabulary is known.
        world_size: Ranks.
        encoder_length: Tokens of an encoder row.
        decoder_length: Tokens of a decoder row.

    Raises:
        UserError: The layout is impossible.
    """

    def __init__(self, config: RunConfig, world_size: int, encoder_length: int, decoder_length: int) -> None:
        self.config, self.world_size = config, world_size
        self.lengths = (encoder_length, decoder_length)
        parallel = config.parallel
        with _fake_world(config, 0, world_size) as context:
            self.dp_size = context.dp_size
            self.num_microbatches = config.training.num_microbatches(context.dp_size)
            self.plan = plan_stages(config, context, encoder_length, decoder_length, self.num_microbatches)
            self.strategy = sharding_strategy(config) if context.dp_size > 1 else "no_shard"
        self.global_batch_size = config.training.micro_batch_size * self.dp_size * self.num_microbatches
        compute = config.compute
        self.memory = T5Memory(
            config.model, compute, parallel, config.training.micro_batch_size, encoder_length, decoder_length,
            casts_weights=(compute.bf16 or compute.fp16) and self.strategy == "no_shard",
            has_segments=has_segments(config.data),
        )  # fmt: skip
        self.ranks_per_stage = world_size // parallel.pipeline_model_parallel_size

    @property
    def flops(self) -> int:
        """Operations of a step over all ranks, without recomputation."""
        return training_flops_per_sequence(self.config.model, *self.lengths) * self.global_batch_size

    def ranks(self) -> list[DryRank]:
        """Every pipeline rank."""
        peaks, busy = self._simulate()
        ranks, seen = [], set()
        for pp_rank in range(self.config.parallel.pipeline_model_parallel_size):
            stages, data_parallel = self.build(pp_rank * self.ranks_per_stage)
            parameters = model_parameters(stages)
            owned = {p.name: p.shape.numel() for p in parameters if p.name not in seen}
            seen |= set(owned)
            needs = max(self.memory.workspace_bytes(stage.units) for stage in stages)
            casts = sum(self.memory.cast_bytes(stage.units) for stage in stages)
            memory = self._memory(parameters, data_parallel, *peaks[pp_rank], needs, casts)
            num_parameters = sum(p.shape.numel() for p in parameters)
            sent = self._sent(pp_rank, stages, parameters, data_parallel)
            ranks.append(DryRank(pp_rank, num_parameters, sum(owned.values()), memory, sent, busy[pp_rank]))
        return ranks

    def build(self, rank: int) -> tuple[list[T5Model], list[DataParallel]]:
        """The stages of a rank on the meta device, divided as the trainer divides them."""
        with _fake_world(self.config, rank, self.world_size) as context:
            tensor_parallel = TensorParallel.of(context, self.config.parallel)
            return build_stages(self.config, context, self.plan, tensor_parallel)

    def _simulate(self) -> tuple[list[tuple[int, int]], Sequence[float]]:
        """Of each pipeline rank, bytes of activations and messages at the peak, and share of the step at work."""
        if self.plan is None:
            return [(self.memory.stage_bytes(Units.of(self.config.model).all), 0)], [1.0]
        recompute = self.config.compute.recompute_granularity == "full"
        timeline = simulate_plan(self.plan, self.num_microbatches, recompute=recompute)
        return [self._peak(actions) for actions in timeline.actions], timeline.busy_fractions

    def _peak(self, actions: Sequence[TimedAction]) -> tuple[int, int]:
        """The most activations and messages that the actions of a rank hold at a time.

        A stage holds those of a microbatch from its forward pass to its backward pass; of a split one, what the second
        part needs to that.
        """
        assert self.plan is not None
        messages = self._message_bytes()
        peak, kept, passed = (0, 0), 0, 0
        for timed in actions:
            number, kind = timed.action.stage, timed.action.kind
            stage = self.plan.stages[number]
            in_full, deferred = self.memory.stage_bytes(stage), self.memory.deferred_bytes(stage)
            kept += {"F": in_full, "B": -in_full, "I": deferred - in_full, "W": -deferred}[kind]
            passed += {"F": messages[number], "W": 0}.get(kind, -messages[number])
            peak = max(peak, (kept, passed), key=sum)
        assert kept == passed == 0
        return peak[0], peak[1] + 2 * max(messages)  # gradients that come: one in use and one on its way

    def _message_bytes(self) -> list[int]:
        """What each stage holds of a microbatch's messages until its backward pass, beside what autograd keeps.

        That is what it has sent, and under sequence parallelism its part of what it has received and gathered.
        """
        assert self.plan is not None
        sent = message_elements(self.config.model, self.plan.stages, *self.lengths)
        parallel = self.config.parallel
        parts = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        received = [0, *sent[:-1]] if parts > 1 else [0] * len(sent)
        number_bytes = self.config.training.micro_batch_size * self.memory.residual_bytes
        return [(out + into) * number_bytes // parts for out, into in zip(sent, received, strict=True)]

    def _memory(
        self,
        parameters: Sequence[ModelParameter],
        data_parallel: Sequence[DataParallel],
        activations: int,
        messages: int,
        workspace: int,
        casts: int,
    ) -> RankMemory:
        """Memory of a rank from its parameters, its FSDP2 units, and what passes need."""
        kept = 4 * sum(local_tensor(p.parameter.detach()).numel() for p in parameters)
        layers, outermost = _unit_bytes(data_parallel)
        gathered, gradients, reduction = casts, 0, 0
        if outermost:
            in_use = whole = sum(layers) + sum(outermost)
            largest = max([*layers, *outermost])
            if self.strategy == "optim_grads_params":  # of layers, one unit is in use and the next on its way
                in_use = min(whole, sum(outermost) + 2 * max(layers, default=0))
            gathered = in_use * self.memory.number_bytes // 4
            # FSDP2 sums the microbatches' whole gradients in fp32; it reduces those of a single microbatch at once.
            gradients = whole if self.num_microbatches > 1 else largest * self.memory.number_bytes // 4
            reduction = largest
        return RankMemory(
            weights=kept,
            gathered=gathered,
            gradients=kept + gradients,
            optimizer=optimizer_state_bytes(self.config.optimizer, parameters),
            activations=activations,
            messages=messages,
            workspace=max(workspace, reduction - activations),  # most activations are gone when gradients are reduced
        )

    def _sent(
        self,
        pp_rank: int,
        stages: Sequence[T5Model],
        parameters: Sequence[ModelParameter],
        data_parallel: Sequence[DataParallel],
    ) -> SentBytes:
        """What a rank sends in a step."""
        outermost = sum(_unit_bytes(data_parallel)[1]) // 4
        tensor_size = self.config.parallel.tensor_model_parallel_size
        numbers = [p.parameter.numel() // (tensor_size if "tp" in sharded_axes(p.parameter) else 1) for p in parameters]
        messages = 0.0 if self.plan is None else pipeline_bytes(self.memory, self.plan, pp_rank)
        return SentBytes(
            tensor=self.num_microbatches * sum(tensor_bytes(self.memory, stage.units) for stage in stages),
            pipeline=self.num_microbatches * messages,
            data=data_bytes(self.memory, numbers, self.strategy, self.dp_size, self.num_microbatches, outermost),
        )


def _unit_bytes(data_parallel: Sequence[DataParallel]) -> tuple[list[int], list[int]]:
    """Bytes in fp32 of the FSDP2 units of layers, and of the outermost unit of each stage; both empty for replicas."""
    layers = [size for each in data_parallel for size in each.unit_bytes[:-1]]
    return layers, [size for each in data_parallel for size in each.unit_bytes[-1:]]


def dry_run(config: RunConfig, options: DryRunConfig, vocab_size_given: bool = False) -> None:
    """Print what the run of `config` would need.

    Args:
        config: The run. Its data is only needed when the model's vocabulary is to be that of its tokenizer.
        options: World and device.
        vocab_size_given: Keep the configured vocabulary size instead of taking the tokenizer's.

    Raises:
        UserError: The layout is impossible, or does not fit into `--device-memory-gib`.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # under a launcher, one process is enough
    encoder_length, decoder_length = _open(config, vocab_size_given)
    parallel = config.parallel
    smallest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    world_size = options.dry_run_world_size or int(os.environ.get("WORLD_SIZE", smallest))
    if options.dry_run_rank is not None and options.dry_run_rank >= world_size:
        raise UserError(f"--dry-run-rank is {options.dry_run_rank}, but ranks end at {world_size - 1}; lower it")
    run = DryRun(config, world_size, encoder_length, decoder_length)
    ranks = run.ranks()
    for line in describe(run, ranks):
        say(line)
    if options.dry_run_rank is not None:
        for line in describe_rank(run, options.dry_run_rank):
            say(line)
    if options.device_memory_gib is not None:
        check_fit(run, ranks, options.device_memory_gib)
        say(f"all ranks fit into {options.device_memory_gib:g} GiB")


def _open(config: RunConfig, vocab_size_given: bool) -> tuple[int, int]:
    """Tokens of both rows; gives the model the vocabulary of the data, if there are any.

    Text is not prepared; its tokenizer tells all. Without data, a mode of UL2 counts as one token, and the sentinels
    are as many as the flags ask for.
    """
    data = config.data
    if data.objective == "text-to-text":
        fit_vocabulary(config, tokenizer_of_tasks(config), vocab_size_given)
        return row_lengths(data)
    asked_for = config.tokenizer.vocab_extra_ids
    if not (data.data_path or data.train_data_path or data.data_config):
        plan = DenoisingPlan.build(data, DEFAULT_EXTRA_IDS if asked_for is None else asked_for)
    elif _has_text(data):
        tokenizer = build_tokenizer(config.tokenizer)
        tokenizer = tokenizer if asked_for is None else tokenizer.with_sentinels(asked_for)
        plan = DenoisingPlan.build(data, len(tokenizer.sentinel_ids), mode_tokenizer(tokenizer))
        fit_vocabulary(config, tokenizer, vocab_size_given)
    else:
        opened = open_data(config)
        fit_vocabulary(config, opened.tokenizer, vocab_size_given)
        return opened.train.encoder_length, opened.train.decoder_length
    return plan.encoder_length, plan.decoder_length


def _has_text(data: DataConfig) -> bool:
    """Whether a corpus is text."""
    return any(is_text(corpus.path) for corpus in corpora_of(data).corpora)


def describe(run: DryRun, ranks: Sequence[DryRank]) -> Iterator[str]:
    """What is printed, line by line."""
    model, parallel, training = run.config.model, run.config.parallel, run.config.training
    compute = run.config.compute
    precision = "bf16" if compute.bf16 else "fp16" if compute.fp16 else "fp32"
    yield (
        f"model: {sum(rank.owned_parameters for rank in ranks):,} parameters; {model.encoder_num_layers} encoder and "
        f"{model.decoder_num_layers} decoder layers, hidden size {model.hidden_size}, "
        f"{model.num_attention_heads} heads, vocabulary {model.padded_vocab_size}"
    )
    yield (
        f"layout: {run.world_size:,} ranks = {parallel.pipeline_model_parallel_size} pipeline x {run.dp_size} data x "
        f"{parallel.tensor_model_parallel_size} tensor{' and sequence' * parallel.sequence_parallel} parallel"
    )
    yield (
        f"choices: {precision}, sharding {run.strategy}, optimizer {run.config.optimizer.optimizer}, "
        f"recomputation {compute.recompute_granularity or 'none'}"
    )
    microbatches = "1 microbatch" if run.num_microbatches == 1 else f"{run.num_microbatches} microbatches"
    yield (
        f"step: {run.global_batch_size:,} samples of {run.lengths[0]} + {run.lengths[1]} tokens in {microbatches} of "
        f"{training.micro_batch_size}; {run.flops / 1e12:,.1f} TFLOP, {run.flops / run.world_size / 1e12:,.2f} a rank"
    )
    if run.plan is not None:
        yield run.plan.describe()
    yield "memory at the peak of a step in GiB, without CUDA context, communication buffers and fragmentation:"
    yield (
        f"{'rank':>4} {'parameters':>10} " + " ".join(f"{name:>{w}}" for name, w in _COLUMNS.items()) + f" {'busy':>6}"
    )
    for rank in ranks:
        sizes = {**asdict(rank.memory), "total": rank.memory.total}
        cells = " ".join(f"{sizes[name] / GIB:{width}.2f}" for name, width in _COLUMNS.items())
        yield f"{rank.pp_rank:>4} {rank.num_parameters / 1e6:>8,.0f} M {cells} {rank.busy:>6.1%}"
    sent = {field.name: max(getattr(rank.sent, field.name) for rank in ranks) / GIB for field in fields(SentBytes)}
    parts = ", ".join(f"{sent[name]:.2f} over {name}" for name in sent)
    yield f"sent by a rank in a step, at most, GiB: {parts} parallel ranks"
    if run.plan is not None:
        busy, fullest = sum(rank.busy for rank in ranks) / len(ranks), max(ranks, key=lambda rank: rank.memory.total)
        yield (
            f"pipeline rank {fullest.pp_rank} needs the most; ranks work {busy:.1%} of a step "
            "(simulated, without communication)"
        )


def describe_rank(run: DryRun, rank: int) -> Iterator[str]:
    """The tensors of one rank, line by line."""
    tensor_size = run.config.parallel.tensor_model_parallel_size
    pp_rank, within = divmod(rank, run.ranks_per_stage)
    yield f"rank {rank}: pipeline {pp_rank}, data {within // tensor_size}, tensor {within % tensor_size}"
    yield f"{'local':>16} {'global':>16}  parameter"
    for p in model_parameters(run.build(rank)[0]):
        local = local_tensor(p.parameter.detach())
        shapes = [" x ".join(map(str, tensor.shape)) for tensor in (local, p.parameter)]
        yield f"{shapes[0]:>16} {shapes[1]:>16}  {p.name}"


def check_fit(run: DryRun, ranks: Sequence[DryRank], device_memory_gib: float) -> None:
    """Raise `UserError` when a rank needs more than the device has, with what would help most."""
    worst = max(ranks, key=lambda rank: rank.memory.total)
    need = worst.memory.total / GIB
    if need <= device_memory_gib:
        return
    first = worst.pp_rank * run.ranks_per_stage
    last = first + run.ranks_per_stage - 1
    largest = max(asdict(worst.memory).items(), key=lambda part: part[1])[0]
    named = f"rank {first}" if first == last else f"ranks {first}-{last}"
    raise UserError(
        f"--device-memory-gib {device_memory_gib:g} is not enough: {named} (pipeline rank {worst.pp_rank}) "
        f"need{'s' * (first == last)} {need:.3g} GiB, mostly {largest}; {_cure(run, largest)}"
    )


def _cure(run: DryRun, largest: str) -> str:
    """What makes the largest part of the memory smaller, the cheapest first."""
    parallel, training, compute = run.config.parallel, run.config.training, run.config.compute
    if largest in ("activations", "messages", "workspace"):
        if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
            return "add --sequence-parallel"
        if training.micro_batch_size > 1:
            return f"lower --micro-batch-size, which is {training.micro_batch_size}"
        if compute.recompute_granularity != "full":
            return "add --recompute-granularity full"
    stronger = {"no_shard": "optim_grads", "optim": "optim_grads", "optim_grads": "optim_grads_params"}
    if run.dp_size > 1 and run.strategy in stronger:
        return f"use --data-parallel-sharding-strategy {stronger[run.strategy]}"
    if largest == "optimizer" and run.config.optimizer.optimizer != "adafactor":
        return "raise --tensor-model-parallel-size or --pipeline-model-parallel-size, or use --optimizer adafactor"
    return "raise --tensor-model-parallel-size or --pipeline-model-parallel-size"


@contextmanager
def _fake_world(config: RunConfig, rank: int, world_size: int) -> Iterator[ParallelContext]:
    """The layout as one rank of `world_size` sees it; collectives do nothing."""
    # Not public, and the only process group whose peers need not exist.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield ParallelContext.create(config.parallel, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
