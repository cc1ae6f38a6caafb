"""Loss scaling for float16, with the meaning of Megatron-LM's flags."""

from __future__ import annotations

from megatron.core.config import OptimizerConfig

GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5


class LossScaler:
    """By how much the loss is multiplied before the backward pass, so that float16 gradients do not vanish.

    Dynamic unless `--loss-scale` is given: the scale doubles after `--loss-scale-window` steps in a row without an
    overflow. An overflow halves it when it is the `--hysteresis`-th since the scale last doubled, or a later one.

    Args:
        config: The loss-scale fields.
        enabled: Whether the run is in float16; if not, the scale is always 1.

    Attributes:
        scale: The present scale; after `backward`, gradients are that many times too large.
    """

    def __init__(self, config: OptimizerConfig, enabled: bool = True) -> None:
        self.dynamic = enabled and config.loss_scale is None
        self.scale = 1.0
        if enabled:
            self.scale = config.initial_loss_scale if config.loss_scale is None else config.loss_scale
        self.minimum = config.min_loss_scale
        self.window = config.loss_scale_window
        self.hysteresis = config.hysteresis
        self._good_steps = 0  # in a row
        self._overflows_left = self.hysteresis

    def update(self, found_nonfinite: bool) -> None:
        """Adapt the scale to the step just made, or skipped because its gradients were not finite."""
        if not self.dynamic:
            return
        if found_nonfinite:
            self._good_steps = 0
            self._overflows_left -= 1
            if self._overflows_left <= 0:
                self.scale = max(self.scale * BACKOFF_FACTOR, self.minimum)
            return
        self._good_steps += 1
        if self._good_steps == self.window:
            self._good_steps = 0
            self._overflows_left = self.hysteresis
            self.scale *= GROWTH_FACTOR

    @property
    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, JSON-able; nothing when the scale is constant, which says nothing of a good one."""
        if not self.dynamic:
            return {}
        return {"scale": self.scale, "good_steps": self._good_steps, "overflows_left": self._overflows_left}

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from `state`; without one, or with a scale that is not dynamic, the scale stays as configured."""
        if self.dynamic and state:
            self.scale = float(state["scale"])
            self._good_steps = int(state["good_steps"])
            self._overflows_left = int(state["overflows_left"])
