"""Losses and scores on held-out data: always the same samples, each exactly once over all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch

from megatron.core.datasets.loader import Dataset, T5Loader, TensorBatch
from megatron.core.datasets.metrics import compute_metrics
from megatron.core.datasets.t5_dataset import SpecialTokens
from megatron.core.datasets.text_to_text_tasks import Example, Task, example_chunks
from megatron.core.inference.generation_config import GenerationConfig
from megatron.core.inference.scoring import generate_targets
from megatron.core.models.T5.special_ids import SpecialIds
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parallel_state import ParallelContext
from megatron.training.config import RunConfig
from megatron.training.console import say
from megatron.training.data import TrainingData
from megatron.training.model_setup import DistributedModel, inference_copy

DEFAULT_METRICS = ("exact_match",)


class EvaluationResult(NamedTuple):
    """Mean cross-entropies in nats.

    Attributes:
        lm_loss: Per target token.
        noise_lm_loss: Per target token that is no sentinel and no end-of-sequence, which are easy.
        num_targets: Target tokens in `lm_loss`.
        num_noise_tokens: Target tokens in `noise_lm_loss`.
        lm_loss_by_kind: `lm_loss` of the samples of each kind that there is, by name.
    """

    lm_loss: float
    noise_lm_loss: float
    num_targets: int
    num_noise_tokens: int
    lm_loss_by_kind: dict[str, float]


def special_token_mask(special: SpecialTokens, padded_vocab_size: int, device: torch.device) -> torch.Tensor:
    """Which ids are sentinels or end-of-sequence: bool `[padded_vocab_size]`."""
    mask = torch.zeros(padded_vocab_size, dtype=torch.bool, device=device)
    mask[torch.tensor([special.eos_id, *special.sentinel_ids], device=device)] = True
    return mask


def kinds_of_targets(row_kinds: torch.Tensor, batch: TensorBatch) -> torch.Tensor:
    """Kind of the sample that each target belongs to `[b, t]`, from those of the rows' segments `[b, segments]`.

    Without segment ids a row is one sample. Padding has no kind, -1.
    """
    if batch.decoder_segment_ids is None:
        return row_kinds[:, :1].expand(batch.labels.shape)
    with_padding = torch.nn.functional.pad(row_kinds, (1, 0), value=-1)  # segment ids begin with 1
    return with_padding.gather(1, batch.decoder_segment_ids.long())


@torch.no_grad()
def evaluate(
    model: DistributedModel,
    loader: T5Loader,
    num_samples: int,
    is_special: torch.Tensor,
    context: ParallelContext,
    interrupted: Callable[[], bool] = lambda: False,
) -> EvaluationResult | None:
    """Evaluate on samples 0 .. `num_samples` of the loader's dataset, each exactly once over all ranks.

    Args:
        model: The model; in training mode afterwards.
        loader: Of the dataset to evaluate on.
        num_samples: How many.
        is_special: Of `special_token_mask`.
        context: The layout.
        interrupted: Asked before each batch, on all ranks together, whether to give up; same answer on all.

    Returns:
        The losses, or None when it was given up.
    """
    dataset, device = loader.dataset, context.device
    totals = torch.zeros(len(dataset.kinds), 4, dtype=torch.float64, device=device)
    rounds = (num_samples, model.evaluation_microbatches)
    model.train_mode(False)
    for ids, batch in zip(loader.evaluation_ids(*rounds), loader.evaluation_batches(*rounds), strict=True):
        if interrupted():
            model.train_mode(True)
            return None
        inputs = batch.to(device)
        losses = model.token_losses(inputs)
        if losses is None or not model.counts_loss:
            continue
        counted = inputs.labels >= 0
        noise = counted & ~is_special[inputs.labels.clamp(min=0)]
        values = torch.stack([losses, losses * noise, counted, noise]).double()  # [4, b, t]
        if len(dataset.kinds) == 1:
            totals += values.sum((1, 2))
        else:
            kinds = kinds_of_targets(torch.from_numpy(dataset.row_kinds(ids)).to(device), inputs)
            totals += torch.stack([(values * (kinds == kind)).sum((1, 2)) for kind in range(len(dataset.kinds))])
    if context.world_size > 1:
        torch.distributed.all_reduce(totals)
    model.train_mode(True)
    loss, noise_loss, targets, noise_tokens = totals.sum(0).tolist()
    noise_mean = noise_loss / noise_tokens if noise_tokens else math.nan  # targets may be sentinels alone
    by_kind = {name: row[0] / row[2] for name, row in zip(dataset.kinds, totals.tolist(), strict=True) if row[2]}
    return EvaluationResult(loss / targets, noise_mean, int(targets), int(noise_tokens), by_kind)


class Evaluator:
    """Evaluates a run's model: losses on a fixed set of samples, and scores of the targets that it generates for tasks.

    Args:
        config: The run.
        data: Its data.
        context: The layout.
        model: The model.
        build_loader: Makes the loader of a dataset.
        interrupted: Asked between batches, on all ranks together, whether to give up; same answer on all.
    """

    def __init__(
        self,
        config: RunConfig,
        data: TrainingData,
        context: ParallelContext,
        model: DistributedModel,
        build_loader: Callable[[Dataset], T5Loader],
        interrupted: Callable[[], bool],
    ) -> None:
        self.config, self.data, self.context, self.model = config, data, context, model
        self.build_loader, self.interrupted = build_loader, interrupted
        self.is_special = special_token_mask(data.special, config.model.padded_vocab_size, context.device)
        # A pipeline has no stage that could decode; its checkpoints can be scored.
        self.generates = bool(data.tasks) and config.training.eval_examples > 0 and context.pp_size == 1
        # Unknown metrics and missing packages show here, before anything is trained.
        self._metrics = {
            task.name: list(compute_metrics(self._requested(task), ["-"], ["-"]))
            for task in (data.tasks if self.generates else ())
            if task.validation is not None
        }
        self._examples: dict[tuple[Path, Task], list[Example]] = {}

    @property
    def value_names(self) -> list[str]:
        """Names of what an evaluation may find, without the split's; the first is the one that matters most."""
        means = dict.fromkeys(name for names in self._metrics.values() for name in names)
        by_task = [f"{task}/{name}" for task, names in self._metrics.items() for name in names]
        kinds = self.data.train.kinds
        by_kind = [f"lm_loss/{kind}" for kind in kinds] if len(kinds) > 1 else []
        return [*means, *(by_task if len(self._metrics) > 1 else ()), "lm_loss", *by_kind]

    def _examples_of(self, task: Task, file: Path) -> list[Example]:
        """The examples of a file that are scored; read once, so that they stay the same."""
        if (file, task) not in self._examples:  # tasks may read other keys of the same file
            examples = chain.from_iterable(example_chunks(file, task))
            self._examples[file, task] = list(islice(examples, self.config.training.eval_examples))
        return self._examples[file, task]

    def _requested(self, task: Task) -> Sequence[str]:
        return task.metrics or self.config.training.eval_metrics or DEFAULT_METRICS

    def losses(self, split: str, step: int) -> dict[str, float] | None:
        """Mean losses of `validation` or `test` by name; nothing without data, None when it was given up."""
        dataset = self.data.valid if split == "validation" else self.data.test
        if dataset is None or self.config.training.eval_iters == 0:
            return {}
        start, loader = time.perf_counter(), self.build_loader(dataset)
        num_samples = min(self.config.training.eval_iters * loader.global_batch_size, dataset.windows_per_epoch)
        result = evaluate(self.model, loader, num_samples, self.is_special, self.context, self.interrupted)
        if result is None:
            return None
        row, line = {f"{split}_lm_loss": result.lm_loss}, f"{split} at step {step} | lm loss {result.lm_loss:.4f}"
        if self.config.data.objective != "text-to-text":
            row[f"{split}_noise_lm_loss"] = result.noise_lm_loss
            line += f" | noise tokens alone {result.noise_lm_loss:.4f}"
        say(f"{line} | {num_samples} samples in {time.perf_counter() - start:.1f} s", self.context.is_main)
        if len(dataset.kinds) > 1:
            row |= {f"{split}_lm_loss/{kind}": loss for kind, loss in result.lm_loss_by_kind.items()}
            shown = " | ".join(f"{kind} {loss:.3f}" for kind, loss in result.lm_loss_by_kind.items())
            say(f"{split} by denoiser | {shown}", self.context.is_main)
        return row

    def scores(self, split: str, step: int) -> dict[str, float] | None:
        """Metrics of generated targets by name, and by task where there are several; None when it was given up."""
        files = {task: task.validation if split == "validation" else task.test for task in self.data.tasks}
        if not self.generates or not any(files.values()):
            return {}
        start = time.perf_counter()
        model = inference_copy(self.model, self.config, self.context)
        by_task: dict[str, dict[str, float]] = {}
        for task, file in files.items():
            if file is None:
                continue
            found = self._score(model, task, file)
            if found is None:
                return None
            by_task[task.name] = found
        row: dict[str, float] = {}
        for metric in dict.fromkeys(metric for values in by_task.values() for metric in values):
            values = [values[metric] for values in by_task.values() if metric in values]
            row[f"{split}_{metric}"] = sum(values) / len(values)
        shown = " | ".join(f"{name.removeprefix(split + '_')} {value:.2f}" for name, value in row.items())
        say(
            f"{split} at step {step} | {shown} | generated in {time.perf_counter() - start:.1f} s", self.context.is_main
        )
        if len(by_task) > 1:
            row |= {f"{split}_{task}/{name}": v for task, values in by_task.items() for name, v in values.items()}
        return row

    def _score(self, model: T5Model, task: Task, file: Path) -> dict[str, float] | None:
        training, context = self.config.training, self.context
        examples = self._examples_of(task, file)
        rows = self.data.train
        generated = generate_targets(
            model,
            self.data.tokenizer,
            SpecialIds(self.data.special.pad_id, self.data.special.eos_id, self.data.special.decoder_start_id),
            [task.prefix + example.inputs for example in examples],
            max_input_length=rows.encoder_length,
            generation=GenerationConfig(max_new_tokens=rows.decoder_length, num_beams=training.eval_num_beams),
            rank=context.dp_rank,
            num_ranks=context.dp_size,
            interrupted=self.interrupted,
        )
        if generated is None:
            return None
        of_ranks: list[dict[int, str]] = [generated]
        if context.world_size > 1:
            of_ranks = [{} for _ in range(context.world_size)]
            torch.distributed.all_gather_object(of_ranks, generated, group=context.control_group)
        texts = {index: text for texts in of_ranks for index, text in texts.items()}
        predictions = [texts[index] for index in range(len(examples))]
        references = [example.targets for example in examples]
        return context.on_main(lambda: compute_metrics(self._requested(task), predictions, references))
