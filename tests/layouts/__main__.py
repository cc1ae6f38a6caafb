"""The table of layouts: `python -m tests.layouts` trains in every layout and compares it with one process.

It writes JSON lines to benchmarks/results/layouts.jsonl and prints the tables of docs/layouts.md.
`python -m tests.layouts dropout` does the same for training with dropout (benchmarks/results/layouts_dropout.jsonl).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tests.corpora import make_byte_dataset, write_prose
from tests.layouts.comparison import Difference, Row, compare
from tests.layouts.dropout import Sample, measure_dropout
from tests.layouts.grid import SECTIONS, Section
from tests.layouts.layout import Layout
from tests.layouts.report import dropout_table, grid_tables

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RUNS_PER_START = 8
SECONDS_PER_RUN = 150.0  # before a run counts as hanging; eight processes on two busy cores take a minute


def run_grid(
    data_path: Path,
    folder: Path,
    write: Callable[[dict[str, Any]], None],
    section: str = "",
    processes: int | None = None,
) -> bool:
    """Every layout, a few in each start of the processes; the result of each to `write`.

    Args:
        data_path: `--data-path`.
        folder: For the runs.
        write: Takes each result.
        section: Only sections whose title contains this.
        processes: Only layouts of so many processes.

    Returns:
        Whether all that run are within the limits.
    """
    sections = [
        Section(s.title, tuple(la for la in s.layouts if processes in (None, la.world_size)))
        for s in SECTIONS
        if section.lower() in s.title.lower()
    ]
    layouts = list(dict.fromkeys(layout for s in sections for layout in s.layouts))
    rows: dict[Layout, Row] = {}
    for _, same in groupby(sorted(layouts, key=lambda la: la.world_size), key=lambda la: la.world_size):
        group = list(same)
        for start in range(0, len(group), RUNS_PER_START):
            for row in compare_all(group[start : start + RUNS_PER_START], data_path, folder):
                rows[row.layout] = row
                measured = asdict(row.difference) if row.difference else {}
                write(
                    {
                        "name": row.layout.name,
                        **asdict(row.layout),
                        **measured,
                        "refusal": row.refusal,
                        "failure": row.failure,
                    }
                )
                print(f"{len(rows)}/{len(layouts)} {row}", file=sys.stderr, flush=True)
    failed = [row for row in rows.values() if not row.refusal and not row.within_limits]
    print(f"{len(rows) - len(failed)} of {len(rows)} as they should be", *failed, sep="\n", file=sys.stderr)
    return not failed


def tables(what: str, path: Path) -> str:
    """The tables of the results in a file, in Markdown."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if what == "dropout":
        return dropout_table([Sample(line["name"], tuple(line["losses"])) for line in lines])
    rows = {}
    for line in lines:
        layout = Layout(**{field.name: line[field.name] for field in fields(Layout)})
        compared = None
        if not line["refusal"] and not line["failure"]:
            compared = Difference(**{field.name: line[field.name] for field in fields(Difference)})
        rows[layout] = Row(layout, compared, line["refusal"], line["failure"])
    sections = [Section(s.title, tuple(la for la in s.layouts if la in rows)) for s in SECTIONS]
    return grid_tables([section for section in sections if section.layouts], rows)


def compare_all(layouts: Sequence[Layout], data_path: Path, folder: Path) -> list[Row]:
    """`compare`; when that fails, each layout alone, so that one failure does not hide the others."""
    try:
        return compare(layouts, data_path, folder, timeout=SECONDS_PER_RUN * len(layouts))
    except AssertionError as failure:
        if len(layouts) == 1:
            print(failure, file=sys.stderr, flush=True)
            return [Row(layouts[0], failure=str(failure).strip().splitlines()[-1])]
        return [row for layout in layouts for row in compare_all([layout], data_path, folder)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("grid", "dropout"), default="grid", help="default: grid")
    parser.add_argument("--section", default="", help="of the grid, only the sections whose title contains this")
    parser.add_argument("--processes", type=int, help="of the grid, only the layouts of so many processes")
    parser.add_argument("--results", type=Path, help="JSON lines; default: in benchmarks/results")
    parser.add_argument("--tables", action="store_true", help="print the tables of the results that are there")
    options = parser.parse_args()
    default = RESULTS / ("layouts.jsonl" if options.what == "grid" else "layouts_dropout.jsonl")
    path = options.results or default
    if options.tables:
        print(tables(options.what, path))
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, path.open("w", encoding="utf-8") as results:
        folder = Path(temporary)
        data_path = make_byte_dataset(write_prose(folder / "corpus.jsonl"))

        def write(row: dict[str, Any]) -> None:
            common = {"benchmark": f"layouts_{options.what}", "torch": torch.__version__}
            print(json.dumps(common | row), file=results, flush=True)

        succeeded = True
        if options.what == "grid":
            succeeded = run_grid(data_path, folder, write, options.section, options.processes)
        else:
            measure_dropout(data_path, folder, write)
    print(tables(options.what, path))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
