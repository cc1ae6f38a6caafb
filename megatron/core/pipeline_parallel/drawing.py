"""Pictures of simulated steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.errors import UserError
from megatron.core.pipeline_parallel.schedules import Kind
from megatron.core.pipeline_parallel.simulator import Timeline

# Kind of action -> label in the legend, colour map. A rank's earlier stages are lighter.
_KINDS: dict[Kind, tuple[str, str]] = {
    "F": ("forward", "Blues"),
    "B": ("backward", "Greens"),
    "I": ("backward of the input", "Greens"),
    "W": ("backward of the weights", "Oranges"),
}
_IDLE = "0.92"  # grey


def draw_timelines(timelines: Sequence[tuple[str, Timeline]], path: Path, *, unit: str = "") -> None:
    """Draw steps, one below the other on the same time axis, a row for each rank.

    Args:
        timelines: Title and step.
        path: Picture to write.
        unit: Of the times; without one, the time axis is in shares of the longest step.

    Raises:
        UserError: matplotlib is missing, or the picture cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs the package matplotlib; pip install 'megatron-t5[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = max(timeline.makespan for _, timeline in timelines)
    scale = 1.0 if unit else 1.0 / longest
    heights = [len(timeline.actions) + 2.0 for _, timeline in timelines]  # rows, and room for the title
    figure, axes = pyplot.subplots(
        len(timelines), 1, figsize=(14, 1.2 + 0.27 * sum(heights)), height_ratios=heights, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (title, timeline), panel in zip(timelines, axes[:, 0], strict=True):
        _draw(panel, timeline, scale)
        panel.set_title(f"{title}: ranks are busy {timeline.busy_fraction:.1%} of the step", loc="left", fontsize=10)
        panel.set_xlim(0, 1.002 * longest * scale)
    axes[-1, 0].set_xlabel(f"time ({unit})" if unit else "time (1 = the longest step)")
    figure.legend(
        handles=_legend([timeline for _, timeline in timelines]), loc="outside upper right", ncols=5, fontsize=9,
        frameon=False, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture format
        raise UserError(f"{path}: {error}; give a file such as timeline.png") from None
    finally:
        pyplot.close(figure)


def _draw(panel: Any, timeline: Timeline, scale: float) -> None:
    """One step: a row of bars for each rank, the first on top."""
    num_ranks = len(timeline.actions)
    for rank, actions in enumerate(timeline.actions):
        stages = sorted({timed.action.stage for timed in actions})
        bars = defaultdict(list)
        for timed in actions:
            bars[timed.action.kind, stages.index(timed.action.stage)].append(
                (timed.start * scale, (timed.end - timed.start) * scale)
            )
        for (kind, chunk), spans in bars.items():
            colour = _colour(kind, chunk, len(stages))
            panel.broken_barh(spans, (rank - 0.42, 0.84), facecolors=colour, edgecolors="white", linewidth=0.25)
        if len(actions) * num_ranks <= 300:  # more would not be legible
            for timed in actions:
                middle = (timed.start + timed.end) / 2 * scale
                colour = "white" if _shade(stages.index(timed.action.stage), len(stages)) > 0.6 else "black"
                number = str(timed.action.microbatch)
                panel.text(middle, rank, number, ha="center", va="center", fontsize=7, color=colour)
    panel.set_ylim(num_ranks - 0.4, -0.6)
    labels = [f"rank {rank}   {busy:4.0%}" for rank, busy in enumerate(timeline.busy_fractions)]
    panel.set_yticks(range(num_ranks), labels, fontsize=8)
    panel.tick_params(axis="y", length=0)
    panel.axvspan(0, timeline.makespan * scale, facecolor=_IDLE, zorder=0)  # what shows between bars
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _colour(kind: Kind, chunk: int, num_chunks: int) -> Any:
    """Colour of a rank's `chunk`-th stage: 0 is light, the last dark."""
    import matplotlib

    return matplotlib.colormaps[_KINDS[kind][1]](_shade(chunk, num_chunks))


def _shade(chunk: int, num_chunks: int) -> float:
    """0 is light, 1 is dark."""
    return 0.7 if num_chunks == 1 else 0.4 + 0.45 * chunk / (num_chunks - 1)


def _legend(timelines: Sequence[Timeline]) -> list[Any]:
    """A patch for each kind of action that occurs, one for idle time, and what the shades mean."""
    from matplotlib.patches import Patch

    actions = [timed.action for timeline in timelines for rank in timeline.actions for timed in rank]
    kinds = {action.kind for action in actions}
    labels = {kind: label for kind, (label, _) in _KINDS.items() if kind in kinds}
    if {"B", "I"} <= kinds:  # the same colour
        del labels["I"]
        labels["B"] = "backward (of the input, where split)"
    patches = [Patch(facecolor=_colour(kind, 0, 1), label=label) for kind, label in labels.items()]
    patches.append(Patch(facecolor=_IDLE, edgecolor="0.7", label="idle"))
    if any(len({timed.action.stage for timed in rank}) > 1 for timeline in timelines for rank in timeline.actions):
        patches.append(Patch(alpha=0, label="light to dark: a rank's first to last stage"))
    return patches
