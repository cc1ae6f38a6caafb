"""Learning-rate schedules with the meaning of Megatron-LM's flags."""

from __future__ import annotations

import math
from typing import Literal

from megatron.core.config import OptimizerConfig, flag_name
from megatron.core.errors import UserError

DEFAULT_WARMUP_FRACTION = 0.01
DEFAULT_WSD_DECAY_FRACTION = 0.1

Unit = Literal["iterations", "samples"]


class LearningRateSchedule:
    """Learning rate as a pure function of the progress of the run, so that resuming needs no state.

    A linear warmup from `lr_warmup_init` to `lr`, then the decay chosen by `lr_decay_style`; after the decay length the
    rate stays at `min_lr` (`constant` never decays). Progress is counted in iterations or in samples, never in both.

    Args:
        config: The `lr*` and `min_lr` fields.
        total: Length of the run, in `unit`; the decay length unless a flag gives another.
        unit: What `total` and the argument of a call count.

    Raises:
        UserError: Flags of the other unit, or lengths that do not fit into each other.
    """

    def __init__(self, config: OptimizerConfig, total: int, unit: Unit = "iterations") -> None:
        self.style = config.lr_decay_style
        self.wsd_style = config.lr_wsd_decay_style
        self.peak = config.lr
        self.minimum = config.min_lr
        self.start = config.lr_warmup_init
        _refuse_other_unit(config, unit)
        suffix = "iters" if unit == "iterations" else "samples"
        self.decay: float = getattr(config, f"lr_decay_{suffix}") or total
        self.warmup = _warmup_length(config, self.decay, suffix)
        wsd_decay = getattr(config, f"lr_wsd_decay_{suffix}")
        self.wsd_decay: float = DEFAULT_WSD_DECAY_FRACTION * self.decay if wsd_decay is None else wsd_decay
        self._validate(suffix)

    def _validate(self, suffix: str) -> None:
        if self.start > self.peak:
            raise UserError(f"--lr-warmup-init {self.start} is above --lr {self.peak}; lower it")
        if self.style != "constant" and self.warmup >= self.decay:
            raise UserError(
                f"the warmup of {self.warmup:g} {suffix} is not shorter than the decay of {self.decay:g} "
                f"(--lr-decay-{suffix}, or the length of the run); shorten --lr-warmup-{suffix}"
            )
        if self.style == "WSD" and self.wsd_decay > self.decay - self.warmup:
            raise UserError(
                f"--lr-wsd-decay-{suffix} {self.wsd_decay:g} does not fit between the warmup of {self.warmup:g} and "
                f"the end at {self.decay:g} {suffix}; shorten it"
            )

    def __call__(self, step: int) -> float:
        """Learning rate of the update that brings progress to `step` (so the first update has step 1, not 0).

        The values are those that Megatron-LM logs at the same progress; `step` 0 gives `lr_warmup_init`.
        """
        if step <= self.warmup and self.warmup > 0:
            return self.start + (self.peak - self.start) * step / self.warmup
        if self.style == "constant":
            return self.peak
        if step > self.decay:
            return self.minimum
        if self.style == "inverse-square-root":
            return max(self.minimum, self.peak * math.sqrt(max(self.warmup, 1) / max(step, 1)))
        return self.minimum + (self.peak - self.minimum) * self._decay_factor(step)

    def _decay_factor(self, step: int) -> float:
        """Share of `peak - minimum` that is left: 1 at the end of the warmup, 0 at the end of the decay."""
        if self.style == "WSD":
            progress = (step - (self.decay - self.wsd_decay)) / self.wsd_decay
            return _shape(self.wsd_style, progress) if progress > 0 else 1.0
        return _shape(self.style, (step - self.warmup) / (self.decay - self.warmup))


def _shape(style: str, progress: float) -> float:
    """Falls from 1 at progress 0 to 0 at progress 1."""
    progress = min(max(progress, 0.0), 1.0)  # guards the ends against rounding
    if style == "linear":
        return 1.0 - progress
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if style == "exponential":
        return 2.0 * 0.5**progress - 1.0
    assert style == "minus_sqrt", style
    return 1.0 - math.sqrt(progress)


def _warmup_length(config: OptimizerConfig, decay: float, suffix: str) -> float:
    explicit: int | None = getattr(config, f"lr_warmup_{suffix}")
    if explicit is not None:
        return explicit
    fraction = DEFAULT_WARMUP_FRACTION if config.lr_warmup_fraction is None else config.lr_warmup_fraction
    return fraction * decay


def _refuse_other_unit(config: OptimizerConfig, unit: Unit) -> None:
    other, train = ("samples", "--train-iters") if unit == "iterations" else ("iters", "--train-samples")
    for name in (f"lr_decay_{other}", f"lr_warmup_{other}", f"lr_wsd_decay_{other}"):
        if getattr(config, name):
            mended = name.rsplit("_", 1)[0] + ("_iters" if unit == "iterations" else "_samples")
            raise UserError(
                f"{flag_name(name)} does not go with a run counted in {unit} ({train}); use {flag_name(mended)}"
            )
