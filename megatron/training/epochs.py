"""How often the corpora of a blend have been gone through: in the metrics, and a line when one begins anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.datasets.loader import Dataset

_MOST_COLUMNS = 64  # corpora that have a metric each; of more, only the extremes are logged
_MOST_NAMES = 5  # in a line


class EpochLog:
    """Counts epochs of a dataset and of the corpora that it blends.

    Args:
        dataset: What is trained on.
        names: Of its corpora, in its order.
        next_sample: First sample of what is logged; epochs that began before are no news.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str], next_sample: int) -> None:
        self._dataset, self._names = dataset, names
        self._begun = [int(epochs) for epochs in dataset.epochs(next_sample)]

    def row(self, next_sample: int) -> dict[str, Any]:
        """Metrics after the samples before `next_sample`."""
        row: dict[str, Any] = {"epochs": next_sample / self._dataset.windows_per_epoch}
        if len(self._names) < 2:
            return row
        epochs = self._dataset.epochs(next_sample)
        if len(self._names) > _MOST_COLUMNS:
            return row | {"epochs_min": min(epochs), "epochs_max": max(epochs)}
        return row | {f"epochs/{name}": value for name, value in zip(self._names, epochs, strict=True)}

    def news(self, next_sample: int) -> str | None:
        """A line about corpora of a blend that have begun another epoch since the last call, if any."""
        if len(self._names) < 2:
            return None
        begun = [int(epochs) for epochs in self._dataset.epochs(next_sample)]
        again = [n for n, (now, before) in enumerate(zip(begun, self._begun, strict=True)) if now > before]
        self._begun = begun
        if not again:
            return None
        shown = ", ".join(f"{self._names[n]} (epoch {begun[n] + 1})" for n in again[:_MOST_NAMES])
        return f"read again from the start: {shown}" + (
            f" and {len(again) - _MOST_NAMES} more" if len(again) > _MOST_NAMES else ""
        )
