"""Configuration dataclasses: the single truth behind the command-line flags.

Each field is one flag in Megatron-LM's spelling (`hidden_size` is `--hidden-size`); the string under a field is its
`--help` text. A default of `None` means "derive it": `__post_init__` derives what can be derived from the same
dataclass, so that fields typed without `None` always have a value, and refuses what cannot work. Nothing here imports
torch, so that `--help` is quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.core.errors import UserError


def option(default: Any = None, *, aliases: tuple[str, ...] = (), negative: str | None = None) -> Any:
    """A config field that has more spellings than its own name, or whose default is derived.

    Args:
        default: Default value.
        aliases: Further flags that set the same field, e.g. `("--seq-length",)`.
        negative: For booleans, the flag that sets False; `--no-<name>` when not given.
    """
    return field(default=default, metadata={"aliases": aliases, "negative": negative})


def flag_name(field_name: str) -> str:
    """`hidden_size` -> `--hidden-size`."""
    return "--" + field_name.replace("_", "-")


def require_positive(config: Any, *names: str) -> None:
    """Raise `UserError` for the first named field that is set but not greater than zero."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"{flag_name(name)} is {value}; it must be greater than 0")


def require_in_unit_interval(config: Any, *names: str) -> None:
    """Raise `UserError` for the first named field outside [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value < 1.0:
            raise UserError(f"{flag_name(name)} is {value}; it must be at least 0 and less than 1")


DEFAULT_TARGET_LENGTH = 128  # tokens of a decoder row of text-to-text

PositionEmbedding = Literal["relative", "learned_absolute", "rope", "none"]
Activation = Literal["relu", "gelu", "gated-gelu", "gated-silu"]


@dataclass(kw_only=True)
class ModelConfig:
    """Architecture of the encoder-decoder: everything that decides shapes or the function computed."""

    encoder_num_layers: int = option(aliases=("--num-layers",))
    """Transformer layers of the encoder."""
    decoder_num_layers: int = option()
    """Transformer layers of the decoder. Default: as many as the encoder has."""
    hidden_size: int = option()
    """Width of the residual stream (d_model)."""
    num_attention_heads: int = option()
    """Attention heads of each layer."""
    kv_channels: int = option()
    """Width of one head (d_kv). Heads x width need not equal the hidden size. Default: hidden size / heads."""
    ffn_hidden_size: int = option()
    """Inner width of the feed-forward block (d_ff). Default: 4 x hidden size, or 8/3 x rounded up to 64 when gated."""
    activation_function: Activation = "gated-gelu"
    """Feed-forward activation; the gated ones have two input projections. gelu is the tanh form, as in T5."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Normalisation before each sub-layer and at the end of each stack."""
    norm_epsilon: float = option(1e-6, aliases=("--layernorm-epsilon",))
    """Added to the variance inside the normalisation."""
    add_bias_linear: bool = option(False, negative="--disable-bias-linear")
    """Give linear layers a bias (T5 has none)."""
    share_embeddings_and_output_weights: bool = option(False, negative="--untie-embeddings-and-output-weights")
    """Use the word embedding as output projection too (T5 v1.0)."""
    scale_logits: bool = option()
    """Multiply the decoder output by hidden_size**-0.5 before the head. Default: only when the head is tied, as T5."""
    position_embedding_type: PositionEmbedding = "relative"
    """Position information: T5's relative bias, learned absolute, rotary (self-attention), or none."""
    relative_attention_num_buckets: int = 32
    """Buckets of the relative position bias."""
    relative_attention_max_distance: int = 128
    """Distance from which all relative positions share the last bucket."""
    relative_attention_bias_per_layer: bool = False
    """Give every layer a table of its own for the relative position bias (UMT5), instead of one a stack."""
    max_position_embeddings: int = 512
    """Rows of the learned absolute position table; no effect with the other position types."""
    rotary_base: int = 10000
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of each head's width that is rotated."""
    scale_attention_scores: bool = False
    """Divide attention scores by sqrt(kv_channels); T5 does not."""
    hidden_dropout: float = 0.0
    """Dropout after embeddings, sub-layers, the feed-forward activation and the final norms."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    init_method_std: float | None = None
    """Draw matrices from N(0, std), residual outputs from N(0, std / sqrt(2 layers)). Default: T5X's initialisation."""
    vocab_size: int | None = None
    """Ids the tokenizer uses, sentinels included. Default: taken from the tokenizer."""
    make_vocab_size_divisible_by: int = 128
    """The embedding and the head get rows up to the next multiple of this."""

    def __post_init__(self) -> None:
        for name in ("encoder_num_layers", "hidden_size", "num_attention_heads"):
            if getattr(self, name) is None:
                raise UserError(f"{flag_name(name)} is missing; give it, or choose a model with --preset")
        if self.decoder_num_layers is None:
            self.decoder_num_layers = self.encoder_num_layers
        require_positive(
            self, "encoder_num_layers", "decoder_num_layers", "hidden_size", "num_attention_heads", "kv_channels",
            "ffn_hidden_size", "norm_epsilon", "relative_attention_num_buckets", "relative_attention_max_distance",
            "max_position_embeddings", "vocab_size", "make_vocab_size_divisible_by", "init_method_std", "rotary_base",
        )  # fmt: skip
        require_in_unit_interval(self, "hidden_dropout", "attention_dropout")
        self._derive_widths()
        self._validate_positions()
        if self.scale_logits is None:
            self.scale_logits = self.share_embeddings_and_output_weights

    def _derive_widths(self) -> None:
        if self.kv_channels is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"--hidden-size {self.hidden_size} is not a multiple of --num-attention-heads "
                    f"{self.num_attention_heads}; give the width of a head with --kv-channels"
                )
            self.kv_channels = self.hidden_size // self.num_attention_heads
        if self.ffn_hidden_size is None:
            if self.gated:
                self.ffn_hidden_size = -(-(8 * self.hidden_size // 3) // 64) * 64
            else:
                self.ffn_hidden_size = 4 * self.hidden_size

    def _validate_positions(self) -> None:
        if self.position_embedding_type == "relative":
            # The encoder halves the buckets by sign (of an odd number it leaves the last one unused), and half of those
            # are exact: fewer than 4 leaves none.
            if self.relative_attention_num_buckets < 4:
                raise UserError(
                    f"--relative-attention-num-buckets is {self.relative_attention_num_buckets}; it must be at least 4"
                )
            if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
                raise UserError(
                    f"--relative-attention-max-distance is {self.relative_attention_max_distance}; it must be greater "
                    f"than half of --relative-attention-num-buckets ({self.relative_attention_num_buckets // 2})"
                )
        elif self.relative_attention_bias_per_layer:
            raise UserError("--relative-attention-bias-per-layer needs --position-embedding-type relative; drop one")
        if self.position_embedding_type == "rope":
            rotated = int(self.kv_channels * self.rotary_percent)
            if not 0.0 < self.rotary_percent <= 1.0 or rotated < 2 or rotated % 2:
                raise UserError(
                    f"--rotary-percent {self.rotary_percent} of --kv-channels {self.kv_channels} rotates {rotated} "
                    "channels; the number must be even and at least 2"
                )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a gate and an up projection."""
        return self.activation_function.startswith("gated-")

    @property
    def inner_size(self) -> int:
        """Width of all heads together (may differ from the hidden size)."""
        return self.num_attention_heads * self.kv_channels

    def check_heads(self, tensor_ranks: int) -> None:
        """Raise `UserError` when the heads do not divide among the tensor-parallel ranks."""
        if self.num_attention_heads % tensor_ranks:
            raise UserError(
                f"--num-attention-heads {self.num_attention_heads} is not a multiple of --tensor-model-parallel-size "
                f"{tensor_ranks}; choose a size that divides it"
            )

    def check_vocabulary(self, tensor_ranks: int) -> None:
        """Raise `UserError` when the vocabulary is too small to give every tensor-parallel rank an id."""
        size = self.padded_vocab_size
        rows = -(-size // tensor_ranks)
        if rows * (tensor_ranks - 1) >= size:
            raise UserError(
                f"--tensor-model-parallel-size {tensor_ranks} divides the vocabulary of {size} ids into parts of "
                f"{rows}, which leaves none for the last rank; lower it, or raise --make-vocab-size-divisible-by"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        if self.vocab_size is None:
            raise UserError("--vocab-size is not known; give it, or a tokenizer to take it from")
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple


@dataclass(kw_only=True)
class ComputeConfig:
    """How the model is computed; never changes what is computed beyond rounding."""

    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights, gradient reductions and loss."""
    fp16: bool = False
    """Compute in float16 with a dynamic loss scale, an fp32 residual stream, master weights and loss."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Linear layers and norms of the stacks: our own, or Transformer Engine's."""
    attention_backend: Literal["auto", "cpu", "sdpa", "flex", "triton", "transformer_engine", "unfused"] = "auto"
    """cpu, triton: our kernels for CPUs and for GPUs, with the position bias as a vector; flex: torch's flex_attention;
    sdpa: torch's scaled_dot_product_attention; unfused: plain matrix products. auto: see docs/backends.md."""
    norm_backend: Literal["auto", "cpu", "torch", "triton", "apex", "transformer_engine"] = "auto"
    """Kernels of the norms. auto: cpu on CPUs; on GPUs triton where it is installed, but torch with --compile."""
    activation_backend: Literal["auto", "cpu", "torch", "triton"] = "auto"
    """Kernels of the gated activations; auto as for norms."""
    cross_entropy_backend: Literal["auto", "cpu", "torch", "triton"] = "auto"
    """Kernels of the loss; auto: cpu on CPUs, triton on GPUs where it is installed."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute the linear layers of the stacks in FP8 (with --bf16): E4M3 throughout, or E5M2 for gradients (hybrid). By
    torchao, or by Transformer Engine where that is --transformer-impl."""
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "tensorwise"
    """Scaling of FP8 tensors: by the tensor's own largest number (tensorwise, the only one of torchao), by those of
    earlier steps (delayed), or block by block."""
    fp8_margin: int = 0
    """delayed: powers of two by which the scale stays below the largest possible."""
    fp8_amax_history_len: int = 1024
    """delayed: forward passes (microbatches of training) whose largest numbers are remembered."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "max"
    """delayed: which of the remembered numbers makes the scale."""
    fp8_wgrad: bool = True
    """Compute the gradients of weights in FP8, too."""
    first_last_layers_bf16: bool = False
    """Leave the first and the last layer of each stack out of FP8."""
    cuda_graphs: bool = False
    """Capture the passes of a microbatch as a CUDA graph and replay it, which spares the launch of each kernel."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the sum over microbatches within their product: apex's where installed, else torch's."""
    compile: bool = False
    """Compile each layer with torch.compile: slower to start, faster to run."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute in the backward pass: whole layers (full) or the attention scores (selective)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Full recomputation: keep the input of every group of layers (uniform, the default), or recompute only the first
    layers of each stack or stage (block)."""
    recompute_num_layers: int | None = None
    """Layers of a group (uniform; default 1), or recomputed layers of each stack or stage (block; default all)."""

    def __post_init__(self) -> None:
        if self.fp16 and self.bf16:
            raise UserError("--fp16 and --bf16 are both given; choose one")
        require_positive(self, "recompute_num_layers")
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(self, name) is not None and self.recompute_granularity != "full":
                raise UserError(f"{flag_name(name)} needs --recompute-granularity full; add it or remove the flag")
        if self.transformer_impl == "transformer_engine" and self.norm_backend == "auto":
            self.norm_backend = "transformer_engine"
        require_positive(self, "fp8_amax_history_len")


@dataclass(kw_only=True)
class ParallelConfig:
    """The layout of processes."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each layer: attention heads, feed-forward units and the vocabulary."""
    sequence_parallel: bool = False
    """Split activations between layers along the sequence over the tensor-parallel ranks."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the stack of layers."""
    pipeline_schedule: Literal["auto", "gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv", "dualpipev"] = "auto"
    """Order of the microbatches' passes. auto: schedule, cuts and stages a rank with the least simulated step time."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Stages on each pipeline rank. Default: what the schedule needs or, if it can have any number, the best."""
    pipeline_layout: str | None = None
    """Stages by hand instead of by cost, e.g. "E8|E4 D2|D10" (see docs/pipeline.md)."""
    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] | None = None
    """What data-parallel ranks divide among them (each further part saves memory and costs time). Default: by size."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. Default: nccl on GPUs, gloo on CPUs."""
    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer than this ends the job."""

    def __post_init__(self) -> None:
        require_positive(
            self, "tensor_model_parallel_size", "pipeline_model_parallel_size", "distributed_timeout_minutes",
            "num_virtual_stages_per_pipeline_rank",
        )  # fmt: skip
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError(
                "--sequence-parallel needs --tensor-model-parallel-size above 1; raise it or remove the flag"
            )
        if self.pipeline_model_parallel_size == 1:
            for name in ("num_virtual_stages_per_pipeline_rank", "pipeline_layout"):
                if getattr(self, name) is not None:
                    raise UserError(f"{flag_name(name)} needs --pipeline-model-parallel-size above 1; raise it")


@dataclass(kw_only=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and the regularisers of the loss."""

    optimizer: Literal["adamw", "adamw-scale", "adafactor"] = "adamw-scale"
    """adamw-scale: AdamW, steps multiplied by each matrix's RMS, which T5 needs from scratch; adafactor: T5X's."""
    optimizer_backend: Literal["torch", "apex"] = "torch"
    """Fused kernels of adamw and adamw-scale."""
    lr: float = option()
    """Peak learning rate. Default: 2e-2 for adamw-scale, 1e-2 for adafactor, 1e-4 for adamw."""
    min_lr: float = 0.0
    """The schedule never goes below this."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the schedule after the warmup."""
    lr_decay_iters: int | None = None
    """Iterations over which the rate decays. Default: the length of the run."""
    lr_decay_samples: int | None = None
    """Samples over which the rate decays (with --train-samples)."""
    lr_warmup_iters: int | None = None
    """Iterations of linear warmup."""
    lr_warmup_samples: int | None = None
    """Samples of linear warmup (with --train-samples)."""
    lr_warmup_fraction: float | None = None
    """Warmup as a share of the decay length. Default: 0.01 when no other warmup is given."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warmup."""
    lr_wsd_decay_iters: int | None = None
    """WSD: iterations of the final decay. Default: a tenth of the decay length."""
    lr_wsd_decay_samples: int | None = None
    """WSD: samples of the final decay (with --train-samples)."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """WSD: shape of the final decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (adamw, adamw-scale); norms, biases and position tables have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = option()
    """Added to the root of the second moment. Default: 1e-6 for adamw-scale, 1e-8 for adamw."""
    adafactor_decay_rate: float = 0.8
    """Adafactor: the second moment's decay at step t is 1 - t**-rate."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this; 0 leaves gradients as they are."""
    z_loss_weight: float = 1e-4
    """Weight of the squared log-partition function in the loss, as in T5X; 0 turns it off."""
    loss_scale: float | None = None
    """fp16: a constant loss scale. Default: dynamic."""
    initial_loss_scale: float = 2.0**32
    """fp16: first loss scale."""
    min_loss_scale: float = 1.0
    """fp16: the loss scale never goes below this."""
    loss_scale_window: int = 1000
    """fp16: steps without an overflow after which the loss scale doubles."""
    hysteresis: int = 2
    """fp16: overflows (since the scale last doubled) from which on each halves the loss scale."""

    def __post_init__(self) -> None:
        defaults = {"adamw": (1e-4, 1e-8), "adamw-scale": (2e-2, 1e-6), "adafactor": (1e-2, None)}
        default_lr, default_eps = defaults[self.optimizer]
        self.lr = default_lr if self.lr is None else self.lr
        self.adam_eps = default_eps if self.adam_eps is None else self.adam_eps
        require_positive(
            self, "lr", "lr_decay_iters", "lr_decay_samples", "adam_eps", "adafactor_decay_rate", "loss_scale",
            "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis",
        )  # fmt: skip
        require_in_unit_interval(self, "adam_beta1", "adam_beta2", "lr_warmup_fraction")
        for name in ("min_lr", "lr_warmup_init", "weight_decay", "clip_grad", "z_loss_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{flag_name(name)} is {getattr(self, name)}; it must not be negative")
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}; lower it")
        if self.optimizer == "adafactor" and self.weight_decay:
            raise UserError("--weight-decay has no effect with --optimizer adafactor; remove it or use adamw-scale")
        warmups = [n for n in ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction") if getattr(self, n)]
        if len(warmups) > 1:
            raise UserError(f"{' and '.join(map(flag_name, warmups))} both set the warmup; give one of them")


@dataclass(kw_only=True)
class TokenizerConfig:
    """The tokenizer of the data; training takes the one of the data's manifest when none is named."""

    tokenizer_type: (
        Literal[
            "SentencePieceTokenizer",
            "HuggingFaceTokenizer",
            "BertWordPieceCase",
            "BertWordPieceLowerCase",
            "ByteTokenizer",
        ]
        | None
    ) = None
    """Kind of tokenizer. Default: told by the tokenizer that travels with the data, or by the file's name."""
    tokenizer_model: str | None = None
    """SentencePiece model file or Hugging Face tokenizer.json (or the directory that holds it)."""
    vocab_file: str | None = None
    """WordPiece vocabulary, one token a line."""
    vocab_extra_ids: int | None = None
    """Sentinels to add for span corruption. Default: the tokenizer's own, else 100."""

    def __post_init__(self) -> None:
        if self.vocab_extra_ids is not None and not 0 <= self.vocab_extra_ids <= 1_000_000:
            raise UserError(f"--vocab-extra-ids is {self.vocab_extra_ids}; it must lie between 0 and 1000000")

    @property
    def names_tokenizer(self) -> bool:
        """Whether the flags name a tokenizer."""
        return bool(self.tokenizer_type or self.tokenizer_model or self.vocab_file)


@dataclass(kw_only=True)
class DataConfig:
    """The corpora and the objective."""

    data_path: list[str] = field(default_factory=list)
    """Corpora: prefixes of indexed datasets (<prefix>.bin and .idx, or <prefix>_text_document.bin and .idx) or files of
    text, which are tokenized into a cache; each with a weight before it, or none of them. text-to-text: JSONL files of
    inputs and targets, one a task."""
    data_config: str | None = None
    """YAML file of corpora, their weights and the splits they are for, instead of the paths."""
    train_data_path: list[str] = field(default_factory=list)
    """Corpora of which all documents are trained on, written like --data-path, instead of it."""
    valid_data_path: list[str] = field(default_factory=list)
    """Corpora of which all documents are validated on, beside --train-data-path. text-to-text: JSONL files of the
    validation examples, in the order of the tasks."""
    test_data_path: list[str] = field(default_factory=list)
    """Likewise for the test."""
    split: str = "969,30,1"
    """Shares of the documents of each corpus for training, validation and test; text-to-text has files for each
    instead."""
    objective: Literal["span-corruption", "ul2", "prefix-lm", "text-to-text"] = "span-corruption"
    """span-corruption: T5's denoising; ul2: a mixture of denoisers; prefix-lm: the end of a text from its beginning;
    text-to-text: targets from inputs, to tune for tasks."""
    encoder_seq_length: int = option(512, aliases=("--seq-length",))
    """Tokens of an encoder row."""
    decoder_seq_length: int | None = None
    """Upper bound on the tokens of a decoder row. Default: what the objective needs; text-to-text: 128."""
    noise_density: float = option(0.15, aliases=("--mask-prob",))
    """span-corruption: share of the raw tokens that is masked."""
    mean_noise_span_length: float = 3.0
    """span-corruption: mean number of tokens in a masked span."""
    denoisers: list[str] = field(default_factory=list)
    """ul2: the denoisers, each MODE:MEAN_SPAN:DENSITY or MODE:prefix:DENSITY, with a rate after another colon unless
    all are equal; MODE is text put before the inputs, or nothing. Default: UL2's seven."""
    task_config: str | None = None
    """text-to-text: YAML file of tasks (name, train, validation, test, prefix, keys, metrics) instead of the paths."""
    inputs_key: str = "inputs"
    """text-to-text: JSON key of the input text."""
    targets_key: str = "targets"
    """text-to-text: JSON key of the target text."""
    text_key: str = "text"
    """JSON key of the text in corpora that are given as JSON lines or Parquet."""
    task_prefix: str = ""
    """text-to-text: put before each input, e.g. "translate English to German: "."""
    mixture_max_examples: int | None = None
    """text-to-text: a task counts for at most so many examples when tasks are mixed in proportion to their sizes."""
    mixture_temperature: float = 1.0
    """Mix tasks, or corpora without weights, in proportion to size ** (1 / temperature); above 1 favours small ones.
    mT5's exponent of 0.3 is a temperature of 3.33."""
    mixture_max_epochs: float | None = None
    """Mix corpora by UniMax: evenly, but none for more than so many epochs of --mixture-budget-tokens."""
    mixture_budget_tokens: int | None = None
    """UniMax: raw tokens that the mixture is planned for, whatever the run's length, so that this changes no sample."""
    shuffle_block_windows: int = 1
    """Order an epoch in blocks of so many neighbouring windows, for disks that are slow at random reads; see
    docs/how-to/corpora.md for what that does to randomness."""
    packing: Literal["segments", "pairs", "none"] | None = None
    """segments: several documents (text-to-text: examples) a row, kept apart by segment ids; pairs: two windows a row
    that fill it exactly, prefix-lm only; none: one window or example a row. Default: segments for text-to-text, pairs
    for prefix-lm, else none."""
    packing_window: int = 4096
    """Examples or documents that are packed together into rows."""
    truncate_targets: bool = False
    """text-to-text: cut targets that are too long instead of refusing them; inputs are always cut, and counted."""
    data_cache_path: str | None = None
    """Directory for what is tokenized at start-up. Default: beside each file."""

    def __post_init__(self) -> None:
        require_positive(
            self, "encoder_seq_length", "decoder_seq_length", "mean_noise_span_length", "mixture_max_examples",
            "mixture_temperature", "mixture_max_epochs", "mixture_budget_tokens", "shuffle_block_windows",
            "packing_window",
        )  # fmt: skip
        if self.objective == "text-to-text" and self.decoder_seq_length is None:
            self.decoder_seq_length = DEFAULT_TARGET_LENGTH
        if self.packing is None:
            self.packing = {"text-to-text": "segments", "prefix-lm": "pairs"}.get(self.objective, "none")  # type: ignore[assignment]
        if self.packing == "pairs" and self.objective != "prefix-lm":
            raise UserError(f"--packing pairs does not go with --objective {self.objective}; give segments or none")
        if self.denoisers and self.objective != "ul2":
            raise UserError(f"--denoisers goes with --objective ul2, not {self.objective}; drop one of them")
        if self.shuffle_block_windows > 1 and (self.packing == "segments" or self.objective == "text-to-text"):
            raise UserError("--shuffle-block-windows is about windows, not about packed documents; drop it")
        if not 0.0 < self.noise_density < 1.0:
            raise UserError(f"--noise-density is {self.noise_density}; it must lie between 0 and 1")
        self._check_corpora()
        self.split_weights()

    def _check_corpora(self) -> None:
        """Refuse flags about corpora that contradict each other."""
        given = [name for name in ("data_path", "train_data_path", "data_config") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(map(flag_name, given))} are given; give one of them")
        if self.objective == "text-to-text":
            for name in ("train_data_path", "data_config", "mixture_max_epochs"):
                if getattr(self, name):
                    raise UserError(f"{flag_name(name)} does not go with --objective text-to-text; drop one of them")
        elif (self.valid_data_path or self.test_data_path) and not self.train_data_path:
            raise UserError(
                "--valid-data-path and --test-data-path go with --train-data-path, or use --data-path and --split"
            )
        if (self.mixture_max_epochs is None) != (self.mixture_budget_tokens is None):
            raise UserError("--mixture-max-epochs and --mixture-budget-tokens go together; give both or neither")

    def split_weights(self, split: str | None = None) -> tuple[float, float, float]:
        """The three shares of `split`, by default those of `--split`, summing to 1."""
        split = self.split if split is None else split
        try:
            parts = [float(part) for part in split.split(",")]
        except ValueError:
            parts = []
        if not 1 <= len(parts) <= 3 or min(parts, default=-1) < 0 or not 0 < sum(parts) < math.inf:
            raise UserError(f"--split is {split!r}; give up to three non-negative shares such as 969,30,1")
        parts += [0.0] * (3 - len(parts))
        total = sum(parts)
        return parts[0] / total, parts[1] / total, parts[2] / total
