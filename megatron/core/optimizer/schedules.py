"""Learning-rate schedules with the meaning of Megatron-LM's flags."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron.core.config import OptimizerConfig, flag_name
from megatron.core.errors import UserError

DEFAULT_WARMUP_FRACTION = 0.01
DEFAULT_WSD_DECAY_FRACTION = 0.1

Unit = Literal["iterations", "samples"]


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """Learning rate as a pure function of the progress of the run, so that resuming needs no state.

    A linear warmup from `lr_warmup_init` to `lr`, then the decay chosen by `lr_decay_style`; after the decay length the
    rate stays at `min_lr` (`constant` never decays). Progress is counted in iterations or in samples, never in both.

    Attributes:
        unit: What lengths and the argument of a call count.
        lr_decay_style: Shape after the warmup.
        lr: The highest rate.
        min_lr: The rate at the end of the decay.
        lr_warmup_init: The rate before the first step.
        lr_warmup: Length of the warmup.
        lr_decay: Progress at which the decay ends.
        lr_wsd_decay_style: WSD: shape of the final decay.
        lr_wsd_decay: WSD: length of the final decay.
    """

    unit: Unit
    lr_decay_style: str
    lr: float
    min_lr: float
    lr_warmup_init: float
    lr_warmup: float
    lr_decay: float
    lr_wsd_decay_style: str
    lr_wsd_decay: float

    @classmethod
    def from_config(cls, config: OptimizerConfig, total: int, unit: Unit = "iterations") -> LearningRateSchedule:
        """The schedule that the flags ask for.

        Args:
            config: The `lr*` and `min_lr` fields.
            total: Length of the run, in `unit`; the decay length unless a flag gives another.
            unit: What `total` counts.

        Raises:
            UserError: Flags of the other unit, or lengths that do not fit into each other.
        """
        _refuse_other_unit(config, unit)
        suffix = _suffix(unit)
        decay = getattr(config, f"lr_decay_{suffix}") or total
        wsd_decay = getattr(config, f"lr_wsd_decay_{suffix}")
        schedule = cls(
            unit=unit,
            lr_decay_style=config.lr_decay_style,
            lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_init=config.lr_warmup_init,
            lr_warmup=_warmup_length(config, decay, suffix),
            lr_decay=decay,
            lr_wsd_decay_style=config.lr_wsd_decay_style,
            lr_wsd_decay=DEFAULT_WSD_DECAY_FRACTION * decay if wsd_decay is None else wsd_decay,
        )
        schedule._validate(suffix)
        return schedule

    def _validate(self, suffix: str) -> None:
        if self.lr_warmup_init > self.lr:
            raise UserError(f"--lr-warmup-init {self.lr_warmup_init} is above --lr {self.lr}; lower it")
        if self.lr_decay_style != "constant" and self.lr_warmup >= self.lr_decay:
            raise UserError(
                f"the warmup of {self.lr_warmup:g} {suffix} is not shorter than the decay of {self.lr_decay:g} "
                f"(--lr-decay-{suffix}, or the length of the run); shorten --lr-warmup-{suffix}"
            )
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay > self.lr_decay - self.lr_warmup:
            raise UserError(
                f"--lr-wsd-decay-{suffix} {self.lr_wsd_decay:g} does not fit between the warmup of "
                f"{self.lr_warmup:g} and the end at {self.lr_decay:g} {suffix}; shorten it"
            )

    def describe(self) -> dict[str, Any]:
        """Attributes that decide any rate of this schedule, by name."""
        unused = set() if self.lr_decay_style == "WSD" else {"lr_wsd_decay_style", "lr_wsd_decay"}
        if self.lr_decay_style == "constant":
            unused |= {"min_lr", "lr_decay"}
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def __call__(self, step: int) -> float:
        """Learning rate of the update that brings progress to `step` (so the first update has step 1, not 0).

        The values are those that Megatron-LM logs at the same progress; `step` 0 gives `lr_warmup_init`.
        """
        if step <= self.lr_warmup and self.lr_warmup > 0:
            return self.lr_warmup_init + (self.lr - self.lr_warmup_init) * step / self.lr_warmup
        if self.lr_decay_style == "constant":
            return self.lr
        if step > self.lr_decay:
            return self.min_lr
        if self.lr_decay_style == "inverse-square-root":
            return max(self.min_lr, self.lr * math.sqrt(max(self.lr_warmup, 1) / max(step, 1)))
        return self.min_lr + (self.lr - self.min_lr) * self._decay_factor(step)

    def _decay_factor(self, step: int) -> float:
        """Share of `lr - min_lr` that is left: 1 at the end of the warmup, 0 at the end of the decay."""
        if self.lr_decay_style == "WSD":
            progress = (step - (self.lr_decay - self.lr_wsd_decay)) / self.lr_wsd_decay
            return _shape(self.lr_wsd_decay_style, progress) if progress > 0 else 1.0
        return _shape(self.lr_decay_style, (step - self.lr_warmup) / (self.lr_decay - self.lr_warmup))


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


def _suffix(unit: Unit) -> str:
    return "iters" if unit == "iterations" else "samples"


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
