"""The first steps of a pretraining run in bf16 beside fp32 on the same batches, and beside fp32's own rounding noise.

Each contender is a run of the trainer (`pretrain_t5.py`) with the same initial values and samples. The second one in
fp32 computes attention by another backend, so that it differs from the first by rounding alone: how far two such
runs are apart is the noise. Curves are means over 50 steps. A contender's row has its curve, the mean and the largest
difference from the first one's over the second half of the steps, what multiple of the noise that is, and how many
steps were not finite. `within_noise`: that mean difference is at most twice the noise; `difference_to_loss`: its share
of the loss at the end, which says how much it matters where the noise is very small.

Runs save when their time is up, and the same command continues them, so that long ones fit between other work. A row is
written when its run is done and the first contender's is.

    python benchmarks/convergence.py --data-path corpus --runs runs --output convergence.jsonl
    python benchmarks/convergence.py ... --minutes 8                        as much as fits; again to go on
    python benchmarks/convergence.py ... --length 2048 --rows 2 --steps 500 --runs runs-2048

Base at 512/114 is 0.43 TFLOP a sequence: 8 rows in fp32 at 45 TFLOP/s are 76 ms a step, 2,000 steps two and a half
minutes; at 2,048/410 it is 2.1, and 500 steps of 2 rows a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SMOOTHING_STEPS = 50
# Flags and environment; the first is what the others are compared with, the second differs from it by rounding alone.
CONTENDERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "fp32": ([], {}),
    "fp32, other rounding": (["--attention-backend", "sdpa"], {}),
    "bf16": (["--bf16"], {}),
    "bf16 compiled": (["--bf16", "--compile"], {}),
    "bf16, sdpa": (["--bf16", "--attention-backend", "sdpa"], {}),
    "tf32": ([], {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}),
    "fp8 torchao": (["--bf16", "--fp8-format", "e4m3", "--compile"], {}),
}
REFERENCE, NOISE = list(CONTENDERS)[:2]
NOISE_MULTIPLE = 2.0


def train(name: str, options: argparse.Namespace, minutes: float | None) -> bool:
    """Make or continue a run; whether it is done.

    Raises:
        SystemExit: The run failed.
    """
    flags, variables = CONTENDERS[name]
    save = run_directory(options.runs, name)
    save.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "pretrain_t5.py"), *model_flags(options), *flags, "--save", str(save)]
    command += ["--data-path", options.data_path, "--train-iters", str(options.steps), "--seed", str(options.seed)]
    command += ["--micro-batch-size", str(options.rows), "--optimizer", "adamw-scale", "--lr", str(options.lr)]
    command += ["--lr-warmup-iters", str(max(1, options.steps // 10)), "--split", "99,1,0", "--eval-iters", "0"]
    command += ["--log-interval", "10", "--save-interval", str(options.steps), "--keep-last", "1"]
    command += [] if minutes is None else ["--exit-duration-in-mins", f"{minutes:.6f}"]
    with (save / "log").open("a", encoding="utf-8") as log:
        done = subprocess.run(command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        words = (save / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise SystemExit(f"{name}: {words[-1] if words else 'no output'}")
    return is_done(save)


def model_flags(options: argparse.Namespace) -> list[str]:
    """The model, at the lengths that are asked for."""
    flags = ["--preset", options.preset, "--encoder-seq-length", str(options.length), "--hidden-dropout", "0"]
    flags += ["--attention-dropout", "0"]
    if options.tiny:
        flags += ["--encoder-num-layers", "1", "--decoder-num-layers", "1", "--hidden-size", "32"]
        return [*flags, "--num-attention-heads", "2", "--kv-channels", "16", "--ffn-hidden-size", "32"]
    # Longer rows have more spans of 3 tokens than T5's hundred sentinels.
    return [*flags, "--vocab-size", "32128", *(["--mean-noise-span-length", "5"] if options.length > 1024 else [])]


def run_directory(runs: Path, name: str) -> Path:
    """Where a contender saves."""
    return runs / name.replace(", ", "-").replace(" ", "-")


def is_done(save: Path) -> bool:
    """Whether the run has ended rather than stopped."""
    return (save / "finished").exists()


def metrics(save: Path) -> list[dict[str, Any]]:
    """The reports of a run."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "lm_loss" in row]


def smoothed(reports: list[dict[str, Any]]) -> dict[int, float]:
    """Mean losses by the last step of each full window of 50 steps; a window that was not finite is left out."""
    sums: dict[int, list[float]] = {}
    before = 0
    for report in reports:
        steps, before = report["iteration"] - before, report["iteration"]
        end = -(-report["iteration"] // SMOOTHING_STEPS) * SMOOTHING_STEPS
        if report["lm_loss"] is not None:
            sums.setdefault(end, []).extend([report["lm_loss"]] * steps)
    return {end: statistics.fmean(losses) for end, losses in sums.items() if end <= before}


def compared(found: dict[int, float], reference: dict[int, float]) -> dict[str, float]:
    """Differences of smoothed curves over the second half of the steps."""
    late = [end for end in reference if end in found and end > max(reference) / 2]
    gaps = [found[end] - reference[end] for end in late]
    return {
        "mean_difference": statistics.fmean(gaps),
        "mean_absolute_difference": statistics.fmean(map(abs, gaps)),
        "largest_difference": max(map(abs, gaps)),
    }


def rows_of(runs: Path, names: list[str]) -> list[dict[str, Any]]:
    """A row of each run that is done, once the reference is."""
    reports = {name: metrics(run_directory(runs, name)) for name in names if is_done(run_directory(runs, name))}
    if REFERENCE not in reports:
        return []
    curves = {name: smoothed(of_name) for name, of_name in reports.items()}
    noise = compared(curves[NOISE], curves[REFERENCE])["mean_absolute_difference"] if NOISE in curves else None
    rows = []
    for name, of_name in reports.items():
        last = of_name[-1]
        differences = compared(curves[name], curves[REFERENCE])
        gap, loss = differences["mean_absolute_difference"], curves[REFERENCE][max(curves[REFERENCE])]
        row = {
            "contender": name,
            "steps": last["iteration"],
            "final_loss": round(curves[name][max(curves[name])], 5),
            **{key: round(value, 6) for key, value in differences.items()},
            "noise": None if noise is None else round(noise, 6),
            "difference_to_noise": round(gap / noise, 2) if noise else None,
            "within_noise": None if noise is None else gap <= NOISE_MULTIPLE * noise,
            "difference_to_loss": round(gap / loss, 6),
            "nonfinite_steps": last["skipped_iterations"],
            "step_time_ms": round(statistics.median(report["step_time_ms"] for report in of_name), 2),
            "tokens_per_s": round(statistics.median(report["tokens_per_s"] for report in of_name), 1),
            "mfu": last["mfu"],
            "memory_gib": round(last["memory_gib"], 2),
            "curve": {str(end): round(value, 5) for end, value in curves[name].items()},
        }
        rows.append(row)
    return rows


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--runs", type=Path, required=True, help="directory of the runs, which are continued")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--preset", default="t5-v1_1-base")
    parser.add_argument("--length", type=int, default=512, help="encoder tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[REFERENCE, "bf16", NOISE])
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a model of one layer: a check of this program itself")
    return parser.parse_args()


def main() -> None:
    """Train what is not done, compare what is."""
    options = parse_options()
    import torch
    from report import publish

    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gpu = torch.cuda.get_device_name() if options.device == "cuda" and torch.cuda.is_available() else None
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    failures, waiting = [], []
    for name in options.contenders:
        left = None if end is None else (end - time.monotonic()) / 60
        if is_done(run_directory(options.runs, name)):
            continue
        if left is not None and left <= 0:
            waiting.append(name)
            continue
        try:
            if not train(name, options, left):
                waiting.append(name)
        except SystemExit as failure:
            failures.append(str(failure))
            print(f"error: {failure}", file=sys.stderr)
    publish(
        rows_of(options.runs, options.contenders), options.output, "convergence", preset=options.preset,
        batch=[options.rows, options.length], seed=options.seed, lr=options.lr, torch=torch.__version__, gpu=gpu,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
    )  # fmt: skip
    if waiting:
        print(f"not done: {', '.join(waiting)}; the same command continues", file=sys.stderr)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
