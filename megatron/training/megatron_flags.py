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
    """Refused: obeying it is impossible and ignoring it would change the run.

    Attributes:
        reason: Why, and what to do instead.
        obeyed: The one value that asks for what happens anyway; accepted.
    """

    reason: str
    obeyed: str | None = None


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
_REPORTED = "each report holds what metrics.jsonl documents"
_NO_INDEX = "there is no sample index to build or to cache"

MEGATRON_FLAGS: dict[str, NoEffect | Refused | Translated] = {
    "--swiglu": Translated("activation_function", "gated-silu"),
    "--use-rotary-position-embeddings": Translated("position_embedding_type", "rope"),
    "--no-position-embedding": Translated("position_embedding_type", "none"),
    "--use-distributed-optimizer": Translated("data_parallel_sharding_strategy", "optim"),
    "--recompute-activations": Translated("recompute_granularity", "selective"),
    "--use-mcore-models": NoEffect("there is one implementation of the model"),
    "--num-workers": NoEffect(_BATCHES, values=1),
    "--dataloader-type": NoEffect(_BATCHES, values=1),
    "--short-seq-prob": NoEffect(_EXACT, values=1),
    "--mid-level-dataset-surplus": NoEffect(_NO_INDEX, values=1),
    "--num-dataset-builder-threads": NoEffect(_NO_INDEX, values=1),
    "--allow-ambiguous-pad-tokens": NoEffect("padding is told by position, never by the token"),
    "--no-masked-softmax-fusion": NoEffect(_TORCH_FUSES),
    "--no-bias-gelu-fusion": NoEffect(_TORCH_FUSES),
    "--no-bias-swiglu-fusion": NoEffect(_TORCH_FUSES),
    "--no-bias-dropout-fusion": NoEffect(_TORCH_FUSES),
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
    "--use-torch-fsdp2": NoEffect("torch's FSDP2 is what shards; see --data-parallel-sharding-strategy"),
    "--timing-log-level": NoEffect(_REPORTED, values=1),
    "--timing-log-option": NoEffect(_REPORTED, values=1),
    "--tensorboard-log-interval": NoEffect(_REPORTED, values=1),
    "--tensorboard-queue-size": NoEffect(_REPORTED, values=1),
    "--no-barrier-with-level-1-timing": NoEffect(_REPORTED),
    "--log-timers-to-tensorboard": NoEffect(_REPORTED),
    "--log-memory-to-tensorboard": NoEffect(_REPORTED),
    "--log-loss-scale-to-tensorboard": NoEffect(_REPORTED),
    "--log-validation-ppl-to-tensorboard": NoEffect(_REPORTED),
    "--log-world-size-to-tensorboard": NoEffect(_REPORTED),
    "--log-learning-rate-to-tensorboard": NoEffect(_REPORTED),
    "--log-progress": NoEffect(_REPORTED),
    "--ckpt-assume-constant-structure": NoEffect(_CHECKPOINT),
    "--verify-integrity": NoEffect("checksums are always written, and compared unless --no-verify-checkpoint"),
    "--no-load-rng": NoEffect("nothing random is state: it follows from --seed and the step"),
    "--no-save-rng": NoEffect("nothing random is state"),
    "--cross-entropy-loss-fusion": NoEffect("the loss is always computed a few rows at a time"),
    "--overlap-p2p-communication": NoEffect("stages always send and receive while they compute"),
    "--no-overlap-p2p-communication": NoEffect("stages always send and receive while they compute"),
    "--no-async-tensor-model-parallel-allreduce": NoEffect(_TORCH_FUSES),
    "--no-one-logger": NoEffect("there is no such logger"),
    "--no-check-for-nan-in-loss-and-grad": NoEffect("a step whose gradient is not finite is skipped and counted"),
    "--use-flash-attn": Refused("flash attention cannot take T5's relative bias; use --attention-backend triton"),
    "--squared-relu": Refused("T5 knows relu, gelu and the gated forms; use --activation-function"),
    "--quick-geglu": Refused("T5's gate is the tanh GELU; use --activation-function gated-gelu"),
    "--openai-gelu": Refused("use --activation-function gelu, which is the tanh form"),
    "--apply-layernorm-1p": Refused("norm weights are stored as they are; remove it"),
    "--group-query-attention": Refused("T5 has one key and value head for each query head; remove it"),
    "--num-query-groups": Refused("T5 has one key and value head for each query head; remove it"),
    "--num-experts": Refused("mixtures of experts are not supported; remove it"),
    "--init-method-xavier-uniform": Refused("use --init-method-std, or neither for T5X's initialisation"),
    "--context-parallel-size": Refused("context parallelism is not supported; remove it", obeyed="1"),
    "--expert-model-parallel-size": Refused("mixtures of experts are not supported; remove it", obeyed="1"),
    "--pipeline-model-parallel-split-rank": Refused("stages are cut by cost, not by a split rank; remove it"),
    "--encoder-tensor-model-parallel-size": Refused("encoder and decoder share one tensor-parallel size; remove it"),
    "--encoder-pipeline-model-parallel-size": Refused("encoder and decoder share one pipeline; remove it"),
    "--fp8-interval": NoEffect("scales are brought up to date at every step", values=1),
    "--fp8-param-gather": Refused("parameters are gathered in bf16; remove it"),
    "--fp4-format": Refused("FP4 is not supported; use --fp8-format"),
    "--enable-cuda-graph": Translated("cuda_graphs", True),
    "--cuda-graph-impl": Refused("use --cuda-graphs"),
    "--fp16-lm-cross-entropy": Refused("the loss is computed in fp32; remove it"),
    "--reset-position-ids": Refused("relative positions need no reset; remove it"),
    "--reset-attention-mask": Refused("use --packing segments, which keeps the documents of a row apart"),
    "--eod-mask-loss": Refused("every target token counts in T5's loss; remove it"),
    "--mock-data": Refused("there is no mock corpus; examples/quickstart.sh makes a real one in seconds"),
    "--data-args-path": Refused("use --data-path, or a --data-config file"),
    "--no-mmap-bin-files": Refused("datasets are always memory-mapped; remove it"),
    "--tokenizer-special-tokens": Refused("sentinels come from the tokenizer; use --vocab-extra-ids"),
    "--tokenizer-name-or-path": Refused("use --tokenizer-model"),
    "--merge-file": Refused("give the tokenizer.json of that tokenizer with --tokenizer-model"),
    "--data-impl": Refused("datasets are always memory-mapped; remove it"),
    "--per-split-data-args-path": Refused("use --data-config, a YAML file with the corpora of each split"),
    "--rampup-batch-size": Refused("the batch size is constant in this version; remove it"),
    "--exit-signal-handler": NoEffect("SIGTERM, SIGINT and SIGUSR1 always save and stop"),
    "--exit-signal": NoEffect("SIGTERM, SIGINT and SIGUSR1 always save and stop", values=1),
    "--exit-on-missing-checkpoint": NoEffect("a --load without a checkpoint always ends the run"),
    "--no-save-optim": Refused("checkpoints are always complete in this version; remove it"),
    "--non-persistent-save-interval": Refused("use --save-interval"),
    "--start-weight-decay": Refused("weight decay is constant; use --weight-decay"),
    "--end-weight-decay": Refused("weight decay is constant; use --weight-decay"),
    "--weight-decay-incr-style": Refused("weight decay is constant; use --weight-decay"),
    "--decoupled-lr": Refused("all parameters share one learning rate; use --lr"),
    "--log-params-norm": Refused("norms of parameters are not reported in this version; remove it"),
    "--log-num-zeros-in-grad": Refused("zeros in gradients are not counted in this version; remove it"),
    "--deterministic-mode": Refused(
        "on CPUs every run is deterministic; on GPUs this version cannot promise it; remove it"
    ),
    "--use-pytorch-profiler": NoEffect("torch's profiler is what --profile uses"),
    "--manual-gc": NoEffect("Python collects garbage in less than a thousandth of a step"),
    "--manual-gc-interval": NoEffect("Python collects garbage in less than a thousandth of a step", values=1),
    "--no-manual-gc-eval": NoEffect("Python collects garbage in less than a thousandth of a step"),
    "--nvtx-ranges": NoEffect("--profile names the phases of a step in its trace"),
    "--record-memory-history": Refused("memory is not recorded in this version; see --dry-run for what a rank needs"),
    "--skip-train": Refused("evaluation alone is not supported in this version; remove it"),
    "--distribute-saved-activations": Refused("use --sequence-parallel, which divides them already"),
    "--num-layers-per-virtual-pipeline-stage": Refused(
        "stages are cut by cost, not by layer counts; use --num-virtual-stages-per-pipeline-rank or --pipeline-layout"
    ),
    "--pipeline-model-parallel-layout": Refused("use --pipeline-layout, whose text names encoder and decoder layers"),
    "--decoder-first-pipeline-num-layers": Refused("stages are cut by cost; use --pipeline-layout"),
    "--decoder-last-pipeline-num-layers": Refused("stages are cut by cost; use --pipeline-layout"),
    "--tp-comm-overlap": Refused("products and collectives are not overlapped in this version; remove it"),
    "--apply-query-key-layer-scaling": Refused("T5's scores are not scaled, and softmax is accurate here; remove it"),
    "--apply-residual-connection-post-layernorm": Refused("T5 is pre-norm; remove it"),
    "--fp32-residual-connection": Refused("the residual stream is fp32 with --fp16, and bf16 with --bf16; remove it"),
    "--use-precision-aware-optimizer": Refused("optimizer state is always fp32; remove it"),
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
    ("attention_backend", "flash"): Refused("flash attention cannot take T5's relative bias; use triton"),
    ("tokenizer_type", "T5Tokenizer"): "SentencePieceTokenizer",
    ("tokenizer_type", "GPTSentencePieceTokenizer"): "SentencePieceTokenizer",
    ("tokenizer_type", "GPT2BPETokenizer"): Refused("give its tokenizer.json with HuggingFaceTokenizer"),
    ("tokenizer_type", "NullTokenizer"): Refused("span corruption needs sentinels; use ByteTokenizer"),
}
