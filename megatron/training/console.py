"""What a run prints. Imports no torch, so that mistakes in the flags are answered quickly."""

from __future__ import annotations

import sys
from typing import Any


def format_duration(seconds: float) -> str:
    """`93.4` -> `1:33`, with hours when there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(message: str, is_main: bool = True) -> None:
    """Print a line at once, on the process that prints."""
    if is_main:
        # Names of files that are no text are shown as bytes; stderr does so by itself.
        print(message.encode(errors="backslashreplace").decode(), flush=True)


def warn(message: str, is_main: bool = True) -> None:
    """Print a warning line to stderr, on the process that prints."""
    if is_main:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def progress_line(row: dict[str, Any], total_iterations: int, eta_s: float) -> str:
    """The console line of one report."""
    width = len(str(total_iterations))
    iteration = row["iteration"]
    parts = [
        f"step {iteration:{width}}/{total_iterations} ({iteration / total_iterations:4.0%})",
        f"lm loss {row['lm_loss']:.4f}",
        f"grad norm {row['grad_norm']:.3f}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['step_time_ms']:.0f} ms/step",
        f"{row['tokens_per_s']:,.0f} tokens/s",
        f"{row['tflops_per_s']:.3g} TFLOP/s" + (f" ({row['mfu']:.1%} MFU)" if row["mfu"] is not None else ""),
        f"ETA {format_duration(eta_s)}",
    ]
    if "profiled_steps" in row:
        steps = row["profiled_steps"]
        parts.append(f"{steps} step{'s' * (steps > 1)} slowed by the profiler")
    return " | ".join(parts)
