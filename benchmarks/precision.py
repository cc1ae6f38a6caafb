"""Training in bf16 with fp32 master weights beside training in fp32: the losses at the end of a quickstart.

The model, the corpus and the flags of `examples/quickstart.sh` in one process, from the same initial values and on the
same samples; `--data-path` is its dataset. The loss is that of the whole validation split after the last step. Prints
one JSON object a row.

    bash examples/quickstart.sh
    python benchmarks/precision.py --data-path quickstart-run/corpus [--output benchmarks/results/precision.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FLAGS = (
    "--encoder-num-layers 4 --decoder-num-layers 4 --hidden-size 192 --num-attention-heads 6 --kv-channels 32 "
    "--ffn-hidden-size 512 --encoder-seq-length 64 --split 90,10,0 --micro-batch-size 8 --global-batch-size 8 "
    "--optimizer adamw-scale --lr 2e-2 --lr-decay-style cosine --lr-warmup-iters 200 --clip-grad 1.0"
)
# Flags and threads; the number of threads changes the order of the products' sums, so that the second contender shows
# how far two trainings in fp32 are apart.
CONTENDERS: dict[str, tuple[list[str], int]] = {
    "fp32": ([], 2),
    "fp32, one thread": ([], 1),
    "bf16": (["--bf16"], 2),
    "bf16 compiled": (["--bf16", "--compile"], 2),
}


def final_losses(data_path: str, steps: int, seed: int, flags: list[str], threads: int) -> dict[str, Any]:
    """The last validation row of a run."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        command = [sys.executable, str(ROOT / "pretrain_t5.py"), *FLAGS.split(), *flags, "--data-path", data_path]
        command += ["--train-iters", str(steps), "--seed", str(seed), "--eval-interval", str(steps)]
        command += ["--eval-iters", "1000000", "--metrics-file", str(metrics)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(flags) or 'fp32'}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return next(row for row in reversed(rows) if "validation_lm_loss" in row)


def main() -> None:
    """Train each seed in every precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2, 3, 4])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["fp32", "fp32, one thread", "bf16"])
    options = parser.parse_args()
    import torch
    from report import publish

    rows = []
    for seed in options.seeds:
        reference: float | None = None
        for name in options.contenders:
            found = final_losses(options.data_path, options.steps, seed, *CONTENDERS[name])
            loss = found["validation_lm_loss"]
            reference = loss if reference is None else reference
            noise = found["validation_noise_lm_loss"]
            difference = round(loss - reference, 5)
            rows.append({"name": name, "seed": seed, "validation_lm_loss": round(loss, 5), "difference": difference}
                        | {"validation_noise_lm_loss": round(noise, 5)})  # fmt: skip
            print(rows[-1], file=sys.stderr)
    publish(rows, options.output, "precision", steps=options.steps, torch=torch.__version__)


if __name__ == "__main__":
    main()
