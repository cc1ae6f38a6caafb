"""One contender of `train_step.py` and `memory.py` in a process of its own, which makes steps when it is told to.

The process gets what it is as JSON in its only argument, and commands as lines of JSON on its standard input; each is
answered by a line on its standard output (what libraries print there goes to standard error). Not to be started by
hand.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LEARNING_RATE = 1e-4
SEED = 1
# What each imports before its memory counts.
IMPORTS = {
    "floor": ["megatron.training.model_setup"],
    "ours": ["megatron.core.optimizer", "megatron.training.arguments", "megatron.training.model_setup"],
    "theirs": [
        "megatron.training.arguments", "transformers", "transformers.models.mt5.modeling_mt5",
        "transformers.models.t5.modeling_t5",
    ],
}  # fmt: skip
FIRST_WORD, WORDS = 3, 32_000  # ids that every vocabulary has as words


@dataclass(frozen=True)
class Case:
    """What is trained, and by whom.

    Attributes:
        preset: Model.
        precision: `fp32` or `bf16`: products in bf16 with fp32 weights.
        rows: Rows of a microbatch.
        encoder_length: Tokens of an encoder row.
        decoder_length: Tokens of a decoder row.
        threads: Threads of torch on a CPU.
        code: `floor`, `ours` or `theirs`.
        attention: Of theirs: `eager` or `sdpa`.
        compiled: Whether it is compiled.
        pure: Of theirs: the weights and the optimizer's state are bf16, too.
        recompute: Of ours `selective`, of theirs `full`: what is not kept for the backward pass; None: all is.
        clips: Of ours: the gradients are clipped by their norm, as the trainer does.
        keeps_freed_memory: Whether the C library keeps what is freed, as it does for the trainer on CPUs.
        same_weights: Whether theirs has to have the weights of ours.
        microbatches: Of a step, whose gradients are summed.
        model_flags: Further flags of the trainer about the model, for all contenders.
        our_flags: Further flags of the trainer that only ours has.
    """

    preset: str
    precision: str
    rows: int
    encoder_length: int
    decoder_length: int
    threads: int
    code: str
    attention: str = "eager"
    compiled: bool = False
    pure: bool = False
    recompute: str | None = None
    clips: bool = False
    keeps_freed_memory: bool = True
    same_weights: bool = True
    microbatches: int = 1
    model_flags: Sequence[str] = ()
    our_flags: Sequence[str] = ()

    def to_json(self) -> str:
        """The argument of the process."""
        return json.dumps(asdict(self))

    @property
    def tokens(self) -> int:
        """Encoder and decoder tokens of a step."""
        return self.step_rows * (self.encoder_length + self.decoder_length)

    @property
    def step_rows(self) -> int:
        """Rows of a step."""
        return self.rows * self.microbatches

    def flags(self) -> list[str]:
        """Flags of the trainer for the same steps."""
        flags = ["--preset", self.preset, "--micro-batch-size", str(self.rows), "--lr", str(LEARNING_RATE)]
        flags += ["--global-batch-size", str(self.step_rows)] if self.microbatches > 1 else []
        flags += ["--seed", str(SEED), "--lr-decay-style", "constant", "--optimizer", "adamw", "--z-loss-weight", "0"]
        flags += ["--hidden-dropout", "0", "--attention-dropout", "0"]
        flags += ["--encoder-seq-length", str(self.encoder_length)]
        flags += ["--bf16"] if self.precision == "bf16" else []
        flags += ["--compile"] if self.compiled else []
        flags += self.model_flags
        if self.code != "ours":
            return flags
        return flags + (["--recompute-granularity", self.recompute] if self.recompute else []) + [*self.our_flags]


class Contender(Protocol):
    """Makes steps."""

    def step(self) -> Any:
        """One step; the loss before it, 0-dimensional, or None."""


class Ours:
    """This project's step, as the trainer puts it together."""

    def __init__(self, case: Case) -> None:
        from megatron.core.datasets.loader import TensorBatch
        from megatron.core.optimizer import build_optimizer
        from megatron.core.parallel_state import ParallelContext
        from megatron.training.initialize import choose_device
        from megatron.training.model_setup import DistributedModel

        config = run_config(case)
        self.context = ParallelContext(choose_device())
        self.model = DistributedModel(config, self.context, None, case.microbatches)
        self.optimizer = build_optimizer(config.optimizer, self.model.parameters, self.context)
        self.clips, self.max_norm = case.clips, config.optimizer.clip_grad
        self.batch = TensorBatch(**batch(case)).to(self.context.device)
        self.factor = 1 / (self.batch.labels >= 0).sum()

    def step(self) -> Any:
        """Forward and backward pass and update."""
        sums = self.model.forward_backward(self.batch, self.factor)
        assert sums is not None
        self.model.finish_gradients()
        self.optimizer.step(LEARNING_RATE, self._divisor(sums) if self.clips else None)
        self.optimizer.zero_grad()
        return sums[0] * self.factor

    def _divisor(self, sums: Any) -> Any:
        """What clipping divides the gradients by."""
        from megatron.core.distributed import global_grad_norm, gradient_divisor

        norm = global_grad_norm(self.model.parameters, self.context, 1.0, sums)
        assert math.isfinite(norm.item())  # the trainer looks, too
        return gradient_divisor(norm, self.max_norm)


class Theirs:
    """The same step with the model of `transformers` and the AdamW of torch."""

    def __init__(self, case: Case) -> None:
        import torch

        from megatron.training.initialize import choose_device
        from tests.huggingface import huggingface_model

        self.case, self.device = case, choose_device()
        config = run_config(case)
        with self.device:
            self.model = huggingface_model(case.preset.rsplit("-", 1)[0], config.model, case.attention).train()
        if case.same_weights:
            give_our_weights(self.model, config.model, self.device)
        self.model.to(torch.bfloat16 if case.pure else torch.float32)
        self.model.config.use_cache = False
        if case.recompute == "full":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if case.compiled:
            self.model.compile()
        optimizer = config.optimizer
        betas = (optimizer.adam_beta1, optimizer.adam_beta2)
        assert optimizer.adam_eps is not None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, betas, optimizer.adam_eps, optimizer.weight_decay, fused=True
        )
        tensors = {name: ids.to(self.device) for name, ids in batch(case).items()}
        inputs = {
            "input_ids": tensors["encoder_input_ids"],
            "decoder_input_ids": tensors["decoder_input_ids"],
            "labels": tensors["labels"].long(),
        }
        parts = {name: ids.chunk(case.microbatches) for name, ids in inputs.items()}
        self.microbatches = [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]

    def step(self) -> Any:
        """Forward and backward pass and update."""
        import torch

        casts = self.case.precision == "bf16" and not self.case.pure
        losses = []
        for inputs in self.microbatches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=casts):
                loss = self.model(**inputs).loss / self.case.microbatches  # all have equally many targets
            loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(losses)


def floor(case: Case) -> Contender:
    """The products of the step alone."""
    import torch
    from step_floor import Floor, step_products

    from megatron.core.models.T5.t5_flops import training_flops_per_sequence
    from megatron.training.initialize import choose_device

    model = run_config(case).model
    products = step_products(model, case.rows, case.encoder_length, case.decoder_length) * case.microbatches
    flops = case.step_rows * training_flops_per_sequence(model, case.encoder_length, case.decoder_length)
    assert sum(product.flops for product in products) == flops, "the floor's products are not the step's"
    return Floor(products, torch.bfloat16 if case.precision == "bf16" else torch.float32, choose_device())


def run_config(case: Case) -> Any:
    """The trainer's configuration of the case."""
    from megatron.training.arguments import parse_args

    return parse_args(case.flags()).config


def give_our_weights(theirs: Any, config: Any, device: Any) -> None:
    """The initial weights of this project's model, in theirs, both on `device`."""
    import torch

    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.parameters import initialize_parameters
    from tests.huggingface import copy_weights

    with torch.device("meta"):
        model = T5Model(config)
    model.to_empty(device=device)
    initialize_parameters(model, SEED)
    copy_weights(model, theirs)


def batch(case: Case) -> dict[str, Any]:
    """Words drawn at random, the same for every contender."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    words = min(WORDS, run_config(case).model.vocab_size)
    encoder, labels = (
        torch.randint(FIRST_WORD, words, (case.step_rows, length), generator=generator, dtype=torch.int32)
        for length in (case.encoder_length, case.decoder_length)
    )
    decoder = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], dim=1)
    return {"encoder_input_ids": encoder, "decoder_input_ids": decoder, "labels": labels}


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the most so far) of this process, from Linux; elsewhere the most so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_steps(contender: Contender, count: int) -> dict[str, Any]:
    """Seconds of a step (on a GPU by its own clock), page faults of a step, and the losses before each."""
    import torch

    has_gpu = torch.cuda.is_available()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * has_gpu)]
    if has_gpu:
        torch.cuda.synchronize()
        events[0].record()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    began = time.perf_counter()
    losses = [contender.step() for _ in range(count)]
    seconds = (time.perf_counter() - began) / count
    if has_gpu:
        events[1].record()
        events[1].synchronize()
        seconds = events[0].elapsed_time(events[1]) / 1e3 / count
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    values = [None if loss is None else float(loss) for loss in losses]
    return {"seconds": seconds, "page_faults": faults // count, "losses": values}


def peak_bytes(before: int) -> int:
    """The most memory so far: allocated on the GPU, or resident beyond `before`."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_bytes("VmHWM") - before


def describe(case: Case) -> dict[str, Any]:
    """The model of the case, what the planner thinks that its activations need, and what it is measured with."""
    import torch

    from megatron.core.models.T5.t5_flops import training_flops_per_sequence
    from megatron.core.models.T5.t5_memory import T5Memory
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.models.T5.t5_units import Units

    config, has_gpu, lengths = run_config(case), torch.cuda.is_available(), (case.encoder_length, case.decoder_length)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in T5Model(config.model).parameters())
    memory = T5Memory(
        config.model, config.compute, config.parallel, case.rows, *lengths,
        device_type="cuda" if has_gpu else "cpu", casts_weights=config.compute.bf16,
    )  # fmt: skip
    everything = Units.of(config.model).all
    return {
        "parameters": parameters,
        "flops": case.step_rows * training_flops_per_sequence(config.model, *lengths),
        "planned_bytes": sum(
            count(everything) for count in (memory.stage_bytes, memory.workspace_bytes, memory.cast_bytes)
        ),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "torch": torch.__version__.split("+")[0],
        "transformers": version("transformers"),
        "tf32": has_gpu and torch.backends.cuda.matmul.allow_tf32,
    }


def main() -> None:
    """Build the contender, then obey."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case = Case(**json.loads(sys.argv[1]))
    import torch

    from megatron.training.host_memory import keep_freed_memory
    from megatron.training.initialize import choose_device

    kept = case.keeps_freed_memory and keep_freed_memory(choose_device())
    torch.set_num_threads(case.threads)
    for module in IMPORTS[case.code]:
        import_module(module)
    before = resident_bytes("VmRSS")
    contender: Contender = {"ours": Ours, "theirs": Theirs, "floor": floor}[case.code](case)
    print(json.dumps({"keeps_freed_memory": kept, "imports_bytes": before}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        answer = describe(case) if command == "describe" else run_steps(contender, command)
        print(json.dumps(answer | {"peak_bytes": peak_bytes(before)}), file=answers)


if __name__ == "__main__":
    main()
