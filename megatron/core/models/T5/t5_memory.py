"""How much memory activations take, by formula: what a stage keeps of a microbatch until its backward pass.

Shapes: b rows of a microbatch, s encoder length, t decoder length, h hidden, n heads, i = n x width of a head, f
feed-forward width, V rows of the vocabulary. n, i, f and V are a tensor-parallel rank's share; s' and t' are its parts
of the sequences under sequence parallelism (whose lengths are padded to divide) and s and t without.

What is kept, in numbers, for a sequence of s tokens:

| part | kept |
|---|---|
| norm | its input, the normalised input (RMSNorm), the result: 3 b s' h; the result is kept gathered, b s h |
| self-attention | q, k, v 3 b s i and the output b s i; unfused, also the probabilities b n s s |
| cross-attention | q b t i, k and v 2 b s i, the output b t i; unfused, also the probabilities b n t s |
| gated feed-forward | gate and up 2 b s f, activated gate b s f, their product b s f |
| feed-forward | its inner units before and after the activation, 2 b s f (ReLU: after, b s f) |
| dropout | a byte for each number it is applied to, and probabilities a second time |
| encoder output | gathered once for all decoder layers of a stage: b s h |
| position bias | once for all layers of a stack on the stage: n s s, with fused attention or recomputation |
| its own in a layer | instead of that: n s s in each layer, with fused attention or selective recomputation |
| segments | matrices for each row: b times the position bias and b s s bytes beside it; cross-attention's b t s |
| head | gradients instead of what they are made from: the input's b t h and, in fp32, the table's V h |
| weights | without FSDP2 on CPUs, or with FP8: each microbatch keeps 16-bit copies of the weights it has used |

On GPUs all microbatches share one set of 16-bit copies, which a rank keeps beside its weights.

Full recomputation keeps the inputs of the groups of layers, and a group's own activations while it is worked on.
Selective recomputation spares the probabilities. A number of the residual stream has 4 bytes with fp16, otherwise it
has the dtype of matrix products; biases, statistics of the norms and ids are small and left out.

With the C++ operators (fp32 and bf16 on CPUs) norms keep no normalised input, gated feed-forward keeps gate and up and
their product, dropout keeps nothing, the position bias is a vector, and attention keeps two numbers a query and head
(and the probabilities only where its operator does, which selective recomputation spares). Triton's kernels, which
GPUs have unless other backends are named or layers are compiled, keep as little of norms and gated feed-forward, and
nothing of the dropout before a norm. Torch's own operations on
CPUs have masks of dropout that are numbers, norms of 16-bit numbers that keep their input in fp32, and no fused
attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from megatron.core.config import ComputeConfig, ModelConfig, ParallelConfig
from megatron.core.extensions import cpu_attention
from megatron.core.extensions.attention import attention_backend
from megatron.core.models.T5.t5_model import recomputation_groups
from megatron.core.models.T5.t5_units import Units
from megatron.core.tensor_parallel.head_loss import chunk_rows

STATISTICS_BYTES = 8  # of a query and head: the largest score and the sum


@dataclass(frozen=True)
class T5Memory:
    """Bytes that stages of the model need on a rank for activations.

    Attributes:
        config: Architecture.
        compute: Precision, recomputation.
        parallel: Tensor and sequence parallelism.
        micro_batch_size: Rows of a microbatch, b.
        encoder_length: Tokens of an encoder row, s.
        decoder_length: Tokens of a decoder row, t.
        device_type: `cuda` or `cpu`.
        casts_weights: Whether weights are cast to 16 bits, and not by FSDP2.
        allows_operators: Whether C++ operators run where they can; off to check the rest of the formulas on a CPU.
        has_segments: Whether rows hold several samples, or padding.
    """

    config: ModelConfig
    compute: ComputeConfig
    parallel: ParallelConfig
    micro_batch_size: int
    encoder_length: int
    decoder_length: int
    device_type: Literal["cuda", "cpu"] = "cuda"
    casts_weights: bool = False
    allows_operators: bool = True
    has_segments: bool = False

    @property
    def has_operators(self) -> bool:
        """Whether what lies between matrix products are the C++ operators for CPUs."""
        return self.allows_operators and self.device_type == "cpu" and not self.compute.fp16

    @property
    def has_attention_operator(self) -> bool:
        """Whether attention is the C++ operator for CPUs."""
        return self.has_operators and self.compute.attention_backend in ("auto", "cpu")

    @property
    def has_norm_kernel(self) -> bool:
        """Whether a norm is one operator with the sum and the dropout before it."""
        return self.config.normalization == "RMSNorm" and self._has_kernel(self.compute.norm_backend)

    def _has_kernel(self, backend: str) -> bool:
        """Whether norms or gated activations of `backend` are C++ operators or Triton's kernels."""
        chosen = backend == "auto" and self.device_type == "cuda" and not self.compute.compile
        return self.has_operators or backend == "triton" or chosen

    @property
    def shares_casts(self) -> bool:
        """Whether weights are cast once a step, for all microbatches."""
        other_products = self.compute.fp8_format is not None or self.compute.transformer_impl != "local"
        return self.casts_weights and self.device_type == "cuda" and not other_products

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in matrix products."""
        return 2 if self.compute.bf16 or self.compute.fp16 else 4

    @property
    def residual_bytes(self) -> int:
        """Bytes of a number of the residual stream."""
        return 2 if self.compute.bf16 else 4

    @property
    def fused_attention(self) -> bool:
        """Whether attention keeps no probabilities, recomputed or not."""
        if not self.has_attention_operator:
            return self.device_type == "cuda" and self.compute.attention_backend != "unfused"
        dtype = torch.bfloat16 if self.compute.bf16 else torch.float32
        return not cpu_attention.keeps_probabilities(dtype, self.config.kv_channels, self.config.attention_dropout)

    @property
    def keeps_matrices(self) -> bool:
        """Whether attention takes all that is added to its scores as a matrix, and keeps that."""
        given = self.compute.attention_backend
        if self.has_attention_operator:
            return False
        # With a bias or segments, `auto` is Triton's kernel on GPUs.
        if self.device_type == "cuda" and attention_backend("triton" if given == "auto" else given).bias == "vector":
            return False
        return self.fused_attention or self.compute.recompute_granularity is not None

    @property
    def has_bias_matrices(self) -> bool:
        """Whether a position bias is a matrix for each head, and kept as one."""
        return self.keeps_matrices and self.config.position_embedding_type == "relative"

    def _mask_bytes(self, number_bytes: int, *, divided: bool = False) -> int:
        """Bytes of an entry of the mask of a dropout of numbers of so many bytes, maybe of divided activations."""
        if self.has_operators:
            return 0
        splits = divided and self.parallel.tensor_model_parallel_size > 1 and not self.parallel.sequence_parallel
        return 1 if self.device_type == "cuda" or splits else number_bytes

    @cached_property
    def units(self) -> Units:
        """Numbers of the model's units."""
        return Units.of(self.config)

    def _share(self, size: int) -> int:
        return -(-size // self.parallel.tensor_model_parallel_size)

    def tokens(self, length: int) -> tuple[int, int]:
        """Tokens of a microbatch with the padding of sequence parallelism, and a rank's part of them between blocks."""
        if not self.parallel.sequence_parallel:
            return self.micro_batch_size * length, self.micro_batch_size * length
        part = self._share(length)
        return self.micro_batch_size * part * self.parallel.tensor_model_parallel_size, self.micro_batch_size * part

    def _norm(self, length: int) -> int:
        """A norm, with what matrix products read of it."""
        tokens, part = self.tokens(length)
        kept = self.number_bytes * tokens * self.config.hidden_size
        return kept + self._normalised(part)

    def _normalised(self, part: int) -> int:
        """What the normalisation itself keeps of `part` tokens."""
        if self.has_norm_kernel:
            return self.residual_bytes * part * self.config.hidden_size
        input_bytes = 4 if self.device_type == "cpu" else self.residual_bytes
        rms_bytes = self.residual_bytes * (self.config.normalization == "RMSNorm")
        return (input_bytes + rms_bytes) * part * self.config.hidden_size

    def _dropped(self, part: int) -> int:
        """Mask of a dropout on the hidden states of `part` tokens."""
        return self._mask_bytes(self.residual_bytes) * part * self.config.hidden_size * (self.config.hidden_dropout > 0)

    def _bias(self, length: int) -> int:
        """The position bias of a stack or a layer: without segments one for all rows."""
        padded = self.tokens(length)[0] // self.micro_batch_size
        of_a_row = self.number_bytes * self._share(self.config.num_attention_heads) * padded**2
        return self.micro_batch_size * (of_a_row + padded**2) if self.has_segments else of_a_row

    def _hidden_keys(self, queries: int, keys: int) -> int:
        """What hides other segments' keys, for all layers of a stack, where no position bias is made with it."""
        kept = self.has_segments and self.keeps_matrices
        scores = self.tokens(queries)[0] * (self.tokens(keys)[0] // self.micro_batch_size)
        return self.number_bytes * scores if kept else 0

    def _bias_vector(self, length: int) -> int:
        """The position bias of a stack as a number for each diagonal of the scores, and the bucket of each."""
        padded = self.tokens(length)[0] // self.micro_batch_size
        return (4 * self._share(self.config.num_attention_heads) + 8) * (2 * padded - 1)

    def _own_bias(self, length: int) -> int:
        """The bias of a layer's own table, as far as its attention keeps it."""
        kept = self.fused_attention or self.compute.recompute_granularity == "selective"
        kept = kept and self.has_bias_matrices and self.config.relative_attention_bias_per_layer
        return self._bias(length) if kept else 0

    def _attention(self, queries: int, keys: int, *, probabilities: bool) -> int:
        """Attention with its output projection, without the norm before it."""
        q, k, inner = self.tokens(queries)[0], self.tokens(keys)[0], self._share(self.config.inner_size)
        kept = self.number_bytes * (2 * q + 2 * k) * inner
        if self.has_attention_operator:
            kept += STATISTICS_BYTES * q * self._share(self.config.num_attention_heads)
        return kept + (self._probabilities(queries, keys) if probabilities else 0)

    def _probabilities(self, queries: int, keys: int) -> int:
        scores = self.tokens(queries)[0] * (self.tokens(keys)[0] // self.micro_batch_size)
        scores *= self._share(self.config.num_attention_heads)
        if not self.config.attention_dropout or self.has_attention_operator:
            return self.number_bytes * scores
        return (
            2 * self.number_bytes + self._mask_bytes(self.number_bytes, divided=True)
        ) * scores  # before and after dropout, and its mask

    def _feed_forward(self, length: int) -> int:
        inner = self.tokens(length)[0] * self._share(self.config.ffn_hidden_size)
        has_dropout = self.config.hidden_dropout > 0
        numbers = 2
        if self.config.gated:
            numbers = 3 if self._has_kernel(self.compute.activation_backend) else 4
        if self.config.activation_function == "relu" and not has_dropout:
            numbers = 1  # the result of the activation is all that its gradient and the product need
        return (self.number_bytes * numbers + self._mask_bytes(self.number_bytes, divided=True) * has_dropout) * inner

    def _block(self, unit: int, norms: int) -> int:
        """What a layer keeps beside attention and feed-forward: its norms, their dropout, its cast weights."""
        length = self.encoder_length if unit in self.units.encoder_layers else self.decoder_length
        masks = 1 if self.has_norm_kernel else norms  # of dropout, which the kernel draws again
        kept = norms * self._norm(length) + masks * self._dropped(self.tokens(length)[1])
        return kept + (self._matrix_bytes(unit) if self.casts_weights and not self.shares_casts else 0)

    def cast_bytes(self, stage: range) -> int:
        """16-bit copies of weights that all microbatches share."""
        return sum(self._matrix_bytes(unit) for unit in stage) if self.shares_casts else 0

    def _matrix_bytes(self, unit: int) -> int:
        """The matrices of a layer in the dtype of products; 0 for other units."""
        hidden = self.config.hidden_size
        attention = 4 * hidden * self._share(self.config.inner_size)
        feed_forward = (3 if self.config.gated else 2) * hidden * self._share(self.config.ffn_hidden_size)
        if unit in self.units.encoder_layers:
            return self.number_bytes * (attention + feed_forward)
        if unit in self.units.decoder_layers:
            return self.number_bytes * (2 * attention + feed_forward)
        return 0

    def unit_bytes(self, unit: int) -> int:
        """What a unit keeps of a microbatch when it is not recomputed as a whole."""
        units, s, t = self.units, self.encoder_length, self.decoder_length
        probabilities = not self.fused_attention and self.compute.recompute_granularity != "selective"
        if unit in units.encoder_layers:
            attention = self._attention(s, s, probabilities=probabilities) + self._own_bias(s)
            return self._block(unit, norms=2) + attention + self._feed_forward(s)
        if unit in units.decoder_layers:
            attention = self._attention(t, t, probabilities=probabilities) + self._own_bias(t)
            attention += self._attention(t, s, probabilities=probabilities)
            return self._block(unit, norms=3) + attention + self._feed_forward(t)
        if unit in (units.encoder_norm, units.decoder_norm):
            # What comes out is the encoder output, which the stages that read it count, or what the head does not keep.
            part = self.tokens(s if unit == units.encoder_norm else t)[1]
            return self._normalised(part) + self._dropped(part)
        if unit == units.head:
            return self._head_gradients()
        return self._dropped(self.tokens(s if unit == units.encoder_embedding else t)[1])

    def _head_gradients(self) -> int:
        """Of the head's input and of its table, which are there from the forward pass on."""
        input_bytes = 4 if self.compute.fp16 else self.number_bytes
        numbers = input_bytes * self.tokens(self.decoder_length)[0] + 4 * self._share(self.config.padded_vocab_size)
        return numbers * self.config.hidden_size

    def _head_workspace(self) -> int:
        """The logits of a chunk, and the table in 16 bits where it is cast."""
        table_rows = self._share(self.config.padded_vocab_size)
        num_tokens = self.micro_batch_size * self.decoder_length
        rows = chunk_rows(num_tokens, table_rows, self.number_bytes, self.device_type)
        return self.number_bytes * table_rows * (rows + self.casts_weights * self.config.hidden_size)

    def layers_of(self, stage: range) -> list[range]:
        """The encoder layers and the decoder layers of a stage."""
        stacks = (self.units.encoder_layers, self.units.decoder_layers)
        return [range(max(stage.start, stack.start), min(stage.stop, stack.stop)) for stack in stacks]

    def stage_bytes(self, stage: range) -> int:
        """What the units `stage` together keep of a microbatch."""
        kept = sum(self.unit_bytes(unit) for unit in stage)
        tokens, _ = self.tokens(self.encoder_length)
        for layers, length in zip(self.layers_of(stage), (self.encoder_length, self.decoder_length), strict=True):
            if not layers:
                continue
            own_bias = self.config.relative_attention_bias_per_layer
            if self.config.position_embedding_type == "relative" and not own_bias:
                kept += self._bias(length) if self.has_bias_matrices else self._bias_vector(length)
            elif not own_bias or self.compute.recompute_granularity == "full":  # else each layer adds it to its bias
                kept += self._hidden_keys(length, length)
            if layers[0] in self.units.decoder_layers:
                kept += self._hidden_keys(length, self.encoder_length)
                kept += self.number_bytes * tokens * self.config.hidden_size  # the encoder output
            for group in self.recomputed(layers):
                input_bytes = self.residual_bytes * self.tokens(length)[1] * self.config.hidden_size
                kept += input_bytes - sum(self.unit_bytes(unit) for unit in group)
        return kept

    def recomputed(self, layers: range) -> list[range]:
        """Groups of a stage's layers of one stack that keep their input alone."""
        groups = recomputation_groups(self.compute, len(layers))
        return [range(layers[0] + group[0], layers[0] + group[-1] + 1) for group, again in groups if again and group]

    def deferred_bytes(self, stage: range) -> int:
        """What a split backward pass of the units `stage` holds between its two parts.

        The input of each product and the gradient of its output, from which the gradient of its weight is computed.
        """
        hidden, inner = self.config.hidden_size, self._share(self.config.inner_size)
        width = self._share(self.config.ffn_hidden_size)
        feed_forward = 2 * hidden + ((3 if self.config.gated else 2) * width)  # numbers a token
        attention = 2 * hidden + 4 * inner
        s, t = (self.tokens(length)[0] for length in (self.encoder_length, self.decoder_length))
        encoder_layers, decoder_layers = (len(layers) for layers in self.layers_of(stage))
        numbers = encoder_layers * s * (attention + feed_forward)
        numbers += decoder_layers * (t * (2 * hidden + 2 * inner + attention + feed_forward) + s * 2 * inner)
        numbers += bool(decoder_layers) * s * hidden  # the encoder output, which all of them read
        return self.number_bytes * numbers

    def workspace_bytes(self, stage: range) -> int:
        """The most that the backward pass of the units `stage` needs beside what is kept.

        Gradients of the activations of a layer (the feed-forward block's are the largest, or those of unfused scores)
        or a chunk of logits in the head's forward pass, and with full recomputation the activations of a group of
        layers.
        """
        needs = [0]
        lengths = (self.encoder_length, self.decoder_length)
        for layers, length in zip(self.layers_of(stage), lengths, strict=True):
            if not layers:
                continue
            numbers = 5 if self.config.gated else 2  # of the inner units, their inputs, and those interleaved again
            inner = numbers * self.tokens(length)[0] * self._share(self.config.ffn_hidden_size) * self.number_bytes
            scores = 0 if self.has_attention_operator and self.fused_attention else 2
            needs.append(max(inner, scores * self._probabilities(length, self.encoder_length)))
            for group in self.recomputed(layers):
                needs.append(needs[1] + sum(self.unit_bytes(unit) for unit in group))
        if self.units.head in stage:
            needs.append(self._head_workspace())
        return max(needs)
