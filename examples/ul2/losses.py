"""Prints the validation loss of each denoiser at every evaluation of a run.

python examples/ul2/losses.py runs/ul2/metrics.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

ALL = "validation_lm_loss"


def main() -> None:
    """Print a table: denoisers down, steps across, nats per target token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of a run")
    path = parser.parse_args().metrics
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {path} cannot be read: {error}")
    evaluations = [row for row in rows if ALL in row]
    names = dict.fromkeys(key for row in evaluations for key in row if key == ALL or key.startswith(f"{ALL}/"))
    print(f"{'step':<16}" + "".join(f"{row['iteration']:>9}" for row in evaluations))
    for name in names:
        cells = (f"{row[name]:9.3f}" if row.get(name) is not None else f"{'-':>9}" for row in evaluations)
        print(f"{name.removeprefix(ALL).removeprefix('/') or 'all':<16}" + "".join(cells))


if __name__ == "__main__":
    main()
