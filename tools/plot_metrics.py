"""Draws the loss curves of one or more runs from their metrics files.

python tools/plot_metrics.py --output loss.png runs/a/metrics.jsonl [runs/b/metrics.jsonl ...]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron.core.errors import UserError
from megatron.training.arguments import run_command_line

# Key of a row -> (label, line style, line width).
SERIES = {
    "lm_loss": ("training", "-", 1.0),
    "validation_lm_loss": ("validation", "o-", 1.5),
    "validation_noise_lm_loss": ("validation, noise tokens alone", "s-", 1.5),
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that is still being written is left out."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a metrics.jsonl that pretrain_t5.py wrote") from None
    try:
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as error:  # JSON and Unicode errors
        raise UserError(f"{path} is not a metrics file: {error}") from None
    if not all(isinstance(row, dict) and "iteration" in row for row in rows):
        raise UserError(f"{path} is not a metrics file: a line has no iteration")
    return rows


def points(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of the rows that have `key`; a loss that was not finite (null) leaves a gap."""
    chosen = [row for row in rows if key in row]
    return [row["iteration"] for row in chosen], [float("nan") if row[key] is None else row[key] for row in chosen]


def main() -> None:
    """Draw every file's training and validation losses into one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="+", type=Path, metavar="FILE", help="metrics.jsonl of a run")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG", help="picture to write")
    arguments = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise UserError("this tool needs the package matplotlib; pip install 'megatron-t5[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for path in arguments.metrics:
        prefix = f"{path.parent.name}: " if len(arguments.metrics) > 1 else ""
        rows = read_rows(path)
        for key, (label, style, width) in SERIES.items():
            steps, values = points(rows, key)
            if steps:
                axes.plot(steps, values, style, markersize=4, linewidth=width, label=prefix + label)
    if not axes.lines:
        raise UserError(f"{arguments.metrics[0]} holds no losses yet; train for at least --log-interval steps")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(arguments.output, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture format
        raise UserError(f"--output {arguments.output}: {error}; give a file such as loss.png") from None
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_command_line(main)
