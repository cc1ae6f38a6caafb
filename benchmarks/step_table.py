"""The tables of the training step's rows for people."""

from __future__ import annotations

from typing import Any

COLUMNS = {
    "ours": "ours",
    "ours compiled": "ours, compiled",
    "Hugging Face eager": "HF eager",
    "Hugging Face SDPA": "HF SDPA",
    "Hugging Face compiled": "HF compiled",
    "Hugging Face SDPA compiled": "HF SDPA, compiled",
    "Hugging Face bf16 weights": "HF bf16 weights¹",
    "Hugging Face bf16 weights compiled": "HF bf16 weights¹, compiled",
}
FOOTNOTE = "¹ Weights and optimizer state in bf16, too: trains differently."


def markdown(rows: list[dict[str, Any]]) -> str:
    """Tables of steps and of the trainer's loop, as far as there are rows of them."""
    loop = [row for row in rows if "trainer_to_step" in row]
    steps = [row for row in rows if "share_of_floor" in row]
    return "\n\n".join(table for table in (steps and step_table(steps), loop and loop_table(loop)) if table)


def step_table(rows: list[dict[str, Any]]) -> str:
    """A line for each shape and precision: shares of the floor, the best of the line in bold, and who wins."""
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["preset"], row["precision"]), {})[row["contender"]] = row
    shown = {name: title for name, title in COLUMNS.items() if any(name in case for case in cases.values())}
    titles = ["model", "precision", "floor, ms", *shown.values(), "tokens/s, best of ours", "best of theirs", "ratio"]
    has_gpu = any(row.get("gpu") for row in rows)
    titles += ["TFLOP/s", "MFU", "peak GiB ours / theirs"] * has_gpu
    lines = [titles, ["---", "---", *["--:"] * (len(titles) - 2)]]
    lines += [_step_line(*key, case, shown, has_gpu) for key, case in cases.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return table + (f"\n\n{FOOTNOTE}" if any(row["trains_differently"] for row in rows) else "")


def _step_line(
    preset: str, precision: str, case: dict[str, dict[str, Any]], shown: dict[str, str], has_gpu: bool
) -> list[str]:
    contenders = [row for row in case.values() if row["code"] != "floor"]
    alike = [row for row in contenders if not row["trains_differently"]]
    fastest = max(row["share_of_floor"] for row in alike)
    cells = []
    for name in shown:
        share = case[name]["share_of_floor"] if name in case else None
        cell = "" if share is None else f"{share:.2f}"
        cells.append(f"**{cell}**" if share == fastest and case[name] in alike else cell)
    ours, theirs = (_best([row for row in alike if row["code"] == code]) for code in ("ours", "theirs"))
    line = [preset, precision, f"{case['floor']['step_ms']:,.0f}", *cells]
    line += [f"{side['tokens_per_s']:,.0f}" if side else "" for side in (ours, theirs)]
    line.append(_ratio(ours, theirs, [row for row in contenders if row["trains_differently"]]))
    if has_gpu:
        line += [f"{ours['tflops']:,.0f}", f"{ours['mfu']:.1%}" if "mfu" in ours else ""] if ours else ["", ""]
        line.append(" / ".join(f"{side['peak_memory_gib']:.1f}" if side else "" for side in (ours, theirs)))
    return line


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["share_of_floor"], default={})


def _ratio(ours: dict[str, Any], theirs: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """How much faster the best of ours is than the best of theirs, by shares of the floor; who wins, if not ours."""
    if not (ours and theirs):
        return ""
    ratio = ours["share_of_floor"] / theirs["share_of_floor"]
    if ratio < 1:
        return f"{ratio:.2f}, **{theirs['contender']} wins**"
    faster = [row for row in others if row["share_of_floor"] > ours["share_of_floor"]]
    return f"{ratio:.2f}" + (f", **{_best(faster)['contender']} is faster¹**" if faster else "")


def loop_table(rows: list[dict[str, Any]]) -> str:
    """A line for each shape and precision: the trainer's speed beside that of the bare step."""
    lines = [
        "| model | precision | trainer, tokens/s | bare step | with norm and clipping | trainer / bare step "
        "| trainer / with clipping |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['preset']} | {row['precision']} | {row['trainer_tokens_per_s']:,.0f} "
        f"| {row['step_tokens_per_s']:,.0f} | {row['clipped_step_tokens_per_s']:,.0f} "
        f"| {row['trainer_to_step']:.3f} | {row['trainer_to_clipped_step']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)
