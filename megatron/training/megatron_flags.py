"""Megatron-LM's flags that are not fields of our configuration: translated, accepted with a warning, or refused.

No flag of a Megatron-LM command line is ignored in silence. What is neither a field nor listed here is an unknown
flag, refused with the nearest spelling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NoEffect:
    """Accepted with one warning line.

    Attributes:
        reason: Why the flag changes nothing here.
        values: Number of values that follow the flag (`"*"` for any).
    """

    reason: str
    values: int | str = 0


@dataclass(frozen=True)
class Refused:
    """Refused: obeying it is impossible and ignoring it would change the run."""

    reason: str


@dataclass(frozen=True)
class Translated:
    """Stands for a value of one of our fields."""

    field: str
    value: Any


_BATCHES = "batches are filled in microseconds by C++ in the training process"
_EXACT = "samples have exact lengths, so that none is short"
_TORCH_FUSES = "torch chooses its own fused operations"
_CHECKPOINT = "there is one checkpoint format: safetensors shards and a manifest"
_FP32 = "it is always so here"
_NO_INDEX = "there is no sample index to build or to cache"

MEGATRON_FLAGS: dict[str, NoEffect | Refused | Translated] = {
    "--swiglu": Translated("activation_function", "gated-silu"),
    "--use-rotary-position-embeddings": Translated("position_embedding_type", "rope"),
    "--no-position-embedding": Translated("position_embedding_type", "none"),
    "--use-distributed-optimizer": Translated("data_parallel_sharding_strategy", "optim_grads"),
    "--recompute-activations": Translated("recompute_granularity", "selective"),
    "--use-mcore-models": NoEffect("there is one implementation of the model"),
    "--num-workers": NoEffect(_BATCHES, values=1),
    "--dataloader-type": NoEffect(_BATCHES, values=1),
    "--short-seq-prob": NoEffect(_EXACT, values=1),
    "--mid-level-dataset-surplus": NoEffect(_NO_INDEX, values=1),
    "--data-cache-path": NoEffect(_NO_INDEX, values=1),
    "--num-dataset-builder-threads": NoEffect(_NO_INDEX, values=1),
    "--allow-ambiguous-pad-tokens": NoEffect("padding is told by position, never by the token"),
    "--no-masked-softmax-fusion": NoEffect(_TORCH_FUSES),
    "--no-bias-gelu-fusion": NoEffect(_TORCH_FUSES),
    "--no-bias-swiglu-fusion": NoEffect(_TORCH_FUSES),
    "--no-bias-dropout-fusion": NoEffect(_TORCH_FUSES),
    "--no-gradient-accumulation-fusion": NoEffect(_TORCH_FUSES),
    "--no-persist-layer-norm": NoEffect(_TORCH_FUSES),
    "--no-rope-fusion": NoEffect(_TORCH_FUSES),
    "--attention-softmax-in-fp32": NoEffect(_FP32),
    "--accumulate-allreduce-grads-in-fp32": NoEffect(_FP32),
    "--calculate-per-token-loss": NoEffect(_FP32),
    "--log-throughput": NoEffect("throughput is always logged"),
    "--overlap-grad-reduce": NoEffect("communication overlaps by itself"),
    "--overlap-param-gather": NoEffect("communication overlaps by itself"),
    "--use-cpu-initialization": NoEffect("initial values are the same on every device"),
    "--ckpt-format": NoEffect(_CHECKPOINT, values=1),
    "--dist-ckpt-format": NoEffect(_CHECKPOINT, values=1),
    "--use-dist-ckpt": NoEffect(_CHECKPOINT),
    "--auto-detect-ckpt-format": NoEffect(_CHECKPOINT),
    "--ckpt-fully-parallel-save": NoEffect("every process always saves its own share"),
    "--no-one-logger": NoEffect("there is no such logger"),
    "--no-check-for-nan-in-loss-and-grad": NoEffect("a step whose gradient is not finite is skipped and counted"),
    "--use-flash-attn": Refused("flash attention cannot take T5's relative bias; use --attention-backend sdpa"),
    "--squared-relu": Refused("T5 knows relu, gelu and the gated forms; use --activation-function"),
    "--quick-geglu": Refused("T5's gate is the tanh GELU; use --activation-function gated-gelu"),
    "--openai-gelu": Refused("use --activation-function gelu, which is the tanh form"),
    "--apply-layernorm-1p": Refused("norm weights are stored as they are; remove it"),
    "--group-query-attention": Refused("T5 has one key and value head for each query head; remove it"),
    "--num-query-groups": Refused("T5 has one key and value head for each query head; remove it"),
    "--num-experts": Refused("mixtures of experts are not supported; remove it"),
    "--init-method-xavier-uniform": Refused("use --init-method-std, or neither for T5X's initialisation"),
    "--context-parallel-size": Refused("context parallelism is not supported; remove it"),
    "--expert-model-parallel-size": Refused("mixtures of experts are not supported; remove it"),
    "--pipeline-model-parallel-split-rank": Refused("stages are cut by cost, not by a split rank; remove it"),
    "--encoder-tensor-model-parallel-size": Refused("encoder and decoder share one tensor-parallel size; remove it"),
    "--encoder-pipeline-model-parallel-size": Refused("encoder and decoder share one pipeline; remove it"),
    "--fp8-format": Refused("fp8 is not supported in this version; use --bf16"),
    "--fp8-recipe": Refused("fp8 is not supported in this version; use --bf16"),
    "--fp16-lm-cross-entropy": Refused("the loss is computed in fp32; remove it"),
    "--loss-scale": Refused("it belongs to --fp16, which T5 overflows; use --bf16"),
    "--initial-loss-scale": Refused("it belongs to --fp16, which T5 overflows; use --bf16"),
    "--reset-position-ids": Refused("relative positions need no reset; remove it"),
    "--reset-attention-mask": Refused("packing by segments is not supported in this version; remove it"),
    "--eod-mask-loss": Refused("every target token counts in T5's loss; remove it"),
    "--mock-data": Refused("there is no mock corpus; examples/quickstart.sh makes a real one in seconds"),
    "--train-data-path": Refused("use --data-path with --split"),
    "--valid-data-path": Refused("use --data-path with --split"),
    "--test-data-path": Refused("use --data-path with --split"),
    "--data-args-path": Refused("use --data-path, or data_path in a --config file"),
    "--no-mmap-bin-files": Refused("datasets are always memory-mapped; remove it"),
    "--tokenizer-special-tokens": Refused("sentinels come from the tokenizer; use --vocab-extra-ids"),
    "--yaml-cfg": Refused("use --config"),
    "--model-parallel-size": Refused("use --tensor-model-parallel-size"),
    "--batch-size": Refused("use --micro-batch-size"),
    "--warmup": Refused("use --lr-warmup-fraction"),
    "--checkpoint-activations": Refused("use --recompute-granularity full"),
}

# Values of Megatron-LM's that go by another name here: (field, value) -> our value, or the reason for a refusal.
MEGATRON_VALUES: dict[tuple[str, str], str | Refused] = {
    ("optimizer", "adam"): "adamw",
    ("optimizer", "sgd"): Refused("T5 does not train with plain SGD; use adamw-scale, adafactor or adamw"),
    ("optimizer", "lion"): Refused("not supported; use adamw-scale, adafactor or adamw"),
    ("optimizer", "muon"): Refused("not supported; use adamw-scale, adafactor or adamw"),
    ("attention_backend", "fused"): "sdpa",
    ("attention_backend", "local"): "unfused",
    ("attention_backend", "flash"): Refused("flash attention cannot take T5's relative bias; use sdpa"),
    ("tokenizer_type", "T5Tokenizer"): "SentencePieceTokenizer",
    ("tokenizer_type", "GPTSentencePieceTokenizer"): "SentencePieceTokenizer",
    ("tokenizer_type", "GPT2BPETokenizer"): Refused("give its tokenizer.json with HuggingFaceTokenizer"),
    ("tokenizer_type", "NullTokenizer"): Refused("span corruption needs sentinels; use ByteTokenizer"),
}
