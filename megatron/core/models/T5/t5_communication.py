"""How many bytes a rank sends in a step, by formula, for each axis of the layout.

Shapes: b rows of a microbatch, s encoder length, t decoder length (padded under sequence parallelism), h hidden; n
tensor-parallel ranks, d data-parallel ranks, p parameters on a tensor-parallel rank, e bytes of a number.

A ring sends 2 (n - 1) / n of a tensor's bytes to sum it over n ranks, half of that to gather or to reduce-scatter it.

| axis | for each microbatch | bytes |
|---|---|---|
| tensor | encoder layer: 2 sums forward, 2 backward, or with sequence parallelism their halves | 8 (n-1)/n e b s h |
| tensor | decoder layer: 3 and 3 | 12 (n-1)/n e b t h |
| tensor | encoder output, once for all decoder layers of a stage | 2 (n-1)/n e b s h |
| tensor | embedding; head | 2 (n-1)/n e b s h and b t h; b t h |
| pipeline | messages to the next stage, their gradients to the one before | see `t5_pipeline.message_elements` |
| **axis** | **once a step** | |
| data, replicas | sum of the gradients in fp32 | 8 (d-1)/d p |
| data, sharded | parameters gathered, gradients reduced in fp32 | (e + 4) (d-1)/d p |

Parameters of layers that are released after use (`optim_grads_params`) are gathered twice a microbatch, all others once
a microbatch. Recomputing whole layers
repeats the forward part of their sums but for the last. Two numbers a token for the loss, the gradients of replicated
parameters and a few scalars a step are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.models.T5.t5_memory import T5Memory
from megatron.core.models.T5.t5_pipeline import StagePlan, message_elements


@dataclass(frozen=True)
class SentBytes:
    """Bytes that a rank sends in a step, over each axis."""

    tensor: float
    pipeline: float
    data: float


def tensor_bytes(sizes: T5Memory, stage: range) -> float:
    """What a rank sends to its tensor-parallel peers for one microbatch of a stage."""
    ranks = sizes.parallel.tensor_model_parallel_size
    if ranks == 1:
        return 0.0
    units, hidden = sizes.units, sizes.config.hidden_size
    encoder, decoder = (hidden * sizes.tokens(length)[0] for length in (sizes.encoder_length, sizes.decoder_length))
    entering, leaving = sizes.number_bytes, sizes.residual_bytes  # of numbers into and out of what ranks divide
    total = 0
    for layers, blocks, numbers in zip(sizes.layers_of(stage), (2, 3), (encoder, decoder), strict=True):
        total += 2 * len(layers) * blocks * numbers * (entering + leaving)
        recomputed = sum(map(len, sizes.recomputed(layers)))
        again = blocks * entering * sizes.parallel.sequence_parallel
        # A sum is both halves; the last of a group feeds nothing that is computed again.
        halves = 1 if sizes.parallel.sequence_parallel else 2
        sums = recomputed * blocks - len(sizes.recomputed(layers))
        total += numbers * (recomputed * again + sums * halves * leaving)
    total += 2 * encoder * entering * bool(sizes.layers_of(stage)[1])
    total += 2 * encoder * leaving * (units.encoder_embedding in stage)
    total += 2 * decoder * leaving * (units.decoder_embedding in stage)
    total += 2 * decoder * entering * (units.head in stage)
    return total * (ranks - 1) / ranks


def pipeline_bytes(sizes: T5Memory, plan: StagePlan, rank: int) -> float:
    """What a pipeline rank sends to other pipeline ranks for one microbatch."""
    elements = message_elements(sizes.config, plan.stages, sizes.encoder_length, sizes.decoder_length)
    parts = sizes.parallel.tensor_model_parallel_size if sizes.parallel.sequence_parallel else 1
    ranks = plan.ranks
    sent = 0
    for stage in plan.stages_of(rank):
        if stage + 1 < len(ranks) and ranks[stage + 1] != rank:
            sent += elements[stage]
        if stage > 0 and ranks[stage - 1] != rank:
            sent += elements[stage - 1]
    return sent * sizes.micro_batch_size * sizes.residual_bytes / parts


def data_bytes(
    sizes: T5Memory, parameters: Sequence[int], strategy: str, num_ranks: int, microbatches: int, outermost: int = 0
) -> float:
    """What a rank sends to its data-parallel peers in a step.

    Args:
        sizes: Precision.
        parameters: Numbers of parameters on a tensor-parallel rank, e.g. of its stages.
        strategy: Of data parallelism.
        num_ranks: Data-parallel ranks.
        microbatches: Microbatches of a step.
        outermost: How many of the parameters are outside the layers.
    """
    if strategy == "no_shard":
        return 2 * 4 * sum(parameters) * (num_ranks - 1) / num_ranks
    gathered = sum(parameters)
    if strategy == "optim_grads_params":
        gathered = microbatches * (2 * gathered - outermost)
    return (gathered * sizes.number_bytes + 4 * sum(parameters)) * (num_ranks - 1) / num_ranks
