"""The tables of the rows of `attention.py` for people."""

from __future__ import annotations

from typing import Any

from attention_contenders import CONTENDERS

PASSES = {"forward": "forward", "forward_backward": "forward and backward"}
CASE = ("channels", "length", "causal")
FAILED = "failed"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of times for each pass, one of errors, and what failed."""
    if any("variant" in row for row in rows):
        return _best_variants(rows)
    parts = []
    for which, title in PASSES.items():
        if of_pass := [row for row in rows if row.get("pass") == which]:
            parts.append(f"{title}, ms (TFLOP/s, peak MiB)\n\n{_times(of_pass)}")
    if timed := [row for row in rows if row.get("pass") == "forward_backward"]:
        parts.append(f"relative error against float64: output, query, key, value, bias\n\n{_errors(timed)}")
    failed = [row for row in rows if "error_message" in row]
    parts += [f"{_case(row)}: {row['contender']} failed: {row['error_message']}" for row in failed]
    return "\n\n".join(parts)


def _case(row: dict[str, Any]) -> str:
    return f"{row['channels']}, {row['length']}{', causal' if row['causal'] else ''}"


def _by_case(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(_case(row), {})[row["contender"]] = row
    return cases


def _lines(cells: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(cells[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))


def _times(rows: list[dict[str, Any]]) -> str:
    """Ours against the best other one that has the bias, and against flash attention, which has none."""
    cells = [
        ["d, length", *(contender.title for contender in CONTENDERS.values()), "best other / ours", "flash / ours"]
    ]
    for case, of_case in _by_case(rows).items():
        line = [case]
        for name in CONTENDERS:
            row = of_case.get(name)
            peak = "" if row is None or row["peak_mib"] is None else f", {row['peak_mib']:.0f}"
            line.append(FAILED if row is None else f"{row['ms']:.3f} ({row['tflops']:.0f}{peak})")
        others = [of_case[name]["ms"] for name in ("sdpa", "flex") if name in of_case]
        ours = of_case.get("triton")
        flash = of_case.get("flash")
        line.append(f"{min(others) / ours['ms']:.2f}" if ours and others else "")
        line.append(f"{flash['ms'] / ours['ms']:.2f}" if ours and flash else "")
        cells.append(line)
    return _lines(cells)


def _errors(rows: list[dict[str, Any]]) -> str:
    cells = [["d, length", *(contender.title for contender in CONTENDERS.values())]]
    for case, of_case in _by_case(rows).items():
        found = [of_case[name]["error"].values() if name in of_case else () for name in CONTENDERS]
        cells.append([case, *(" ".join(f"{value:.1e}" for value in values) or FAILED for values in found)])
    return _lines(cells)


def _best_variants(rows: list[dict[str, Any]]) -> str:
    """The fastest tiles of each kernel and shape beside those of the table."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if "ms" not in row:
            continue
        key = (row["kernel"], _case(row))
        if key not in best or row["ms"] < best[key]["ms"]:
            best[key] = row
        if row["of_table"]:
            chosen[key] = row
    cells = [["kernel", "d, length", "best", "ms", "of the table", "ms", "ratio"]]
    for key, row in sorted(best.items()):
        table = chosen.get(key)
        compared = ["", "", ""] if table is None else [table["variant"], f"{table['ms']:.3f}", ""]
        if table is not None:
            compared[2] = f"{table['ms'] / row['ms']:.2f}"
        cells.append([*key, row["variant"], f"{row['ms']:.3f}", *compared])
    return _lines(cells)
