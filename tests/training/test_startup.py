"""What is imported, because imports are most of the time before the first step: `--help` without torch, a run without
torch's compiler and without the libraries that only some runs need.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("transformers", "tensorboard", "wandb", "matplotlib", "pandas", "pyarrow", "datasets", "sentencepiece")

# Runs the program with the rest of the command line; then prints which of the first argument's modules it imported.
IMPORTED = """
import runpy, sys
asked = sys.argv.pop(1).split(",")
sys.argv[0] = "pretrain_t5.py"
try:
    runpy.run_path("pretrain_t5.py", run_name="__main__")
finally:
    print("imported:", *(name for name in asked if name in sys.modules))
"""


def imported(modules: tuple[str, ...], *flags: str, status: int = 0) -> list[str]:
    """Which of `modules` a run with these flags imports."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORTED, ",".join(modules), *flags], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert result.returncode == status, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


def test_help_and_mistakes_import_no_torch() -> None:
    unneeded = ("torch", "numpy", *HEAVY)
    assert imported(unneeded, "--help") == []
    assert imported(unneeded, "--preset", "t5-v1_1-small", "--data-path", "corpus", "--print-config") == []
    assert imported(unneeded, "--hidden-sice", "512", status=2) == []
    assert imported(unneeded, "--hidden-size", "many", status=1) == []


def test_a_run_imports_no_compiler_and_nothing_of_other_runs(byte_dataset: Path) -> None:
    shape = "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 8"
    flags = f"{shape} --encoder-seq-length 64 --split 100,0,0 --train-iters 1 --data-path {byte_dataset}".split()
    assert imported(("torch._dynamo", "torch.distributed.pipelining", *HEAVY), *flags) == []
