"""Draws the loss curves of one or more runs from their metrics files.

python tools/plot_metrics.py --output loss.png runs/a/metrics.jsonl [runs/b/metrics.jsonl ...]
"""

import argparse
import json
from pathlib import Path

from megatron.core.errors import UserError
from megatron.training.arguments import run_command_line


def read_series(path: Path, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of the rows of a metrics file that have `key`."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a metrics.jsonl that pretrain_t5.py wrote") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not a metrics file: {error}") from None
    points = [(row["iteration"], row[key]) for row in rows if key in row]
    return [x for x, _ in points], [y for _, y in points]


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
    series = {
        "lm_loss": ("training", "-", 1.0),
        "validation_lm_loss": ("validation", "o-", 1.5),
        "validation_noise_lm_loss": ("validation, noise tokens alone", "s-", 1.5),
    }
    for path in arguments.metrics:
        prefix = f"{path.parent.name}: " if len(arguments.metrics) > 1 else ""
        for key, (label, style, width) in series.items():
            steps, values = read_series(path, key)
            if steps:
                axes.plot(steps, values, style, markersize=4, linewidth=width, label=prefix + label)
    if not axes.lines:
        raise UserError(f"{arguments.metrics[0]} holds no losses yet; train for at least --log-interval steps")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.output, dpi=120)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_command_line(main)
