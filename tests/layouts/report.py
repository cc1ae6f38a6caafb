"""The results as Markdown, for docs/layouts.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.layouts.comparison import Difference, Row
from tests.layouts.dropout import Sample
from tests.layouts.grid import Section
from tests.layouts.layout import Layout

COLUMNS = "loss | gradient norm | validation loss | parameters | optimizer state |"


def grid_tables(sections: Sequence[Section], rows: Mapping[Layout, Row]) -> str:
    """The worst of each section and precision, then one table a section with one row a layout."""
    return "\n\n".join([_summary(sections, rows), *(_section(section, rows) for section in sections)])


def _summary(sections: Sequence[Section], rows: Mapping[Layout, Row]) -> str:
    lines = [f"| largest of | layouts | {COLUMNS}", "|---|---|---|---|---|---|---|"]
    for section in sections:
        compared = [row.difference for layout in section.layouts if (row := rows[layout]).difference is not None]
        if compared:
            worst = [max(values) for values in zip(*map(_values, compared), strict=True)]
            cells = [section.title, str(len(compared)), *(f"{value:.1e}" for value in worst)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _section(section: Section, rows: Mapping[Layout, Row]) -> str:
    lines = [
        f"### {section.title}",
        f"| processes | layout | model | {COLUMNS}",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layout in section.layouts:
        row = rows[layout]
        cells = [str(layout.world_size), layout.name, _model(layout)]
        if row.difference is None:
            cells += [f"refused: {row.refusal}" if row.refusal else f"FAILED: {row.failure}", "", "", "", ""]
        else:
            cells += [f"{value:.1e}" for value in _values(row.difference)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _model(layout: Layout) -> str:
    optimizer = "" if layout.optimizer == Layout().optimizer else f", {layout.optimizer}"
    return f"{layout.variant}{optimizer}"


def _values(difference: Difference) -> tuple[float, ...]:
    return (
        difference.loss,
        difference.grad_norm,
        difference.validation_loss,
        difference.parameter,
        difference.optimizer_state,
    )


def dropout_table(samples: Sequence[Sample]) -> str:
    """One row a layout; the first sample is what the others are compared with."""
    first = samples[0]
    lines = ["| layout | mean final loss | difference | in standard errors |", "|---|---|---|---|"]
    for sample in samples:
        cells = [sample.name, f"{sample.mean:.4f}", "", ""]
        if sample is not first:
            mean, error = sample.differences(first)
            cells[2:] = [f"{mean:+.4f} ± {error:.4f}", f"{abs(mean) / error:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
