"""The weights of the best evaluation, in `<save>/best`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import (
    CheckpointError,
    CheckpointTensors,
    published_checkpoints,
    remove_checkpoint,
    save_checkpoint,
)
from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.core.tokenizers import Tokenizer
from megatron.training.config import RunConfig
from megatron.training.console import say

BEST_DIRECTORY = "best"
PREFIX = "validation_"


def best_metric(config: RunConfig, value_names: Sequence[str]) -> str | None:
    """Name of the value in a row of an evaluation that decides, or None when nothing is kept.

    Args:
        config: The run.
        value_names: Of `Evaluator`.

    Raises:
        UserError: `--keep-best` names something else.
    """
    given = config.checkpoint.keep_best
    if config.checkpoint.save is None or (given is None and config.data.objective != "text-to-text"):
        return None
    name = value_names[0] if given is None else given.removeprefix(PREFIX)
    if name not in value_names:
        raise UserError(f"--keep-best is {given}; choose from {', '.join(PREFIX + name for name in value_names)}")
    return PREFIX + name


class BestCheckpoint:
    """Keeps the weights of the best evaluation so far as a checkpoint of its own, from which a run can start.

    Args:
        config: The run; with a directory to save in.
        metric: Of `best_metric`. Losses are better when they are smaller, scores when they are larger.
        context: The layout.
        tokenizer: Kept beside it.
    """

    def __init__(self, config: RunConfig, metric: str, context: ParallelContext, tokenizer: Tokenizer) -> None:
        assert config.checkpoint.save is not None
        self.directory = Path(config.checkpoint.save, BEST_DIRECTORY)
        self.metric, self.context, self.tokenizer = metric, context, tokenizer
        self.smaller_is_better = metric.removeprefix(PREFIX).split("/")[0] == "lm_loss"  # of all, or of one kind

    def is_better(self, row: dict[str, Any], best: dict[str, Any]) -> bool:
        """Whether the row of an evaluation has a better value than the best so far."""
        value = row.get(self.metric)
        if value is None or not math.isfinite(value):
            return False
        if best.get("metric") != self.metric:
            return True
        return bool(value < best["value"] if self.smaller_is_better else value > best["value"])

    def save(
        self, iteration: int, row: dict[str, Any], tensors: CheckpointTensors, manifest: dict[str, Any]
    ) -> dict[str, Any]:
        """Replace what was kept; all ranks call it together.

        Args:
            iteration: Step of the evaluation.
            row: Its values.
            tensors: Of a training checkpoint, of which the weights are kept.
            manifest: What a training checkpoint records.

        Returns:
            What is to be remembered as the best.

        Raises:
            CheckpointError: It could not be written; what was kept before is still there.
        """
        weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}
        best = {"metric": self.metric, "value": row[self.metric], "iteration": iteration}
        path = save_checkpoint(self.directory, iteration, weights, manifest | {"best": best}, self.context)
        self.context.on_main(lambda: self._leave_alone(path))
        say(f"best {self.metric} so far, {row[self.metric]:.4g}: kept in {path}", self.context.is_main)
        return best

    def exists(self) -> bool:
        """Whether anything is kept; all ranks call it together."""
        return self.context.on_main(lambda: bool(published_checkpoints(self.directory)))

    def _leave_alone(self, path: Path) -> None:
        """Remove what else is in the directory, earlier or later (of a run that went back), and add the tokenizer."""
        try:
            for other in published_checkpoints(self.directory):
                if other != path:
                    remove_checkpoint(other)
            self.tokenizer.save(self.directory / "tokenizer")
        except OSError as error:
            raise CheckpointError(f"{self.directory}: {error.strerror}; mend this") from None
