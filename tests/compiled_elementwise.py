"""Compiles the elementwise Triton kernels for a GPU that need not be there, as their operators launch them.

    python -m tests.compiled_elementwise

prints one JSON object a kernel: registers, bytes of the stack (spilled registers), and its widest loads. A process of
its own, because Triton's interpreter must be off.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from kernel_resources import resources, specialized

from megatron.core.extensions import triton_elementwise as ours

CAPABILITY = 90


def launches(hidden: int, units: int, words: int, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Kernels, arguments and options of every operator's launches."""
    found: list[tuple[Any, ...]] = []

    def record(kernel: Any, _grid: Any, _device: Any, *arguments: Any, **options: Any) -> None:
        found.append((kernel, arguments, options))

    operators = torch.ops.megatron_t5
    x, rows = torch.zeros(48, hidden, dtype=dtype), torch.zeros(48)
    weight, seed, labels = torch.zeros(hidden), torch.tensor(1), torch.zeros(48, dtype=torch.int64)
    with mock.patch.object(ours, "_launch", record):
        operators.triton_gated(torch.zeros(48, 2 * units, dtype=dtype), "gelu")
        operators.triton_gated_gradient(
            torch.zeros(48, units, dtype=dtype), torch.zeros(48, 2 * units, dtype=dtype), "silu"
        )
        operators.triton_rms_norm(x, weight, 1e-6, dtype)
        operators.triton_add_rms_norm(x, x, weight, 1e-6, dtype, 0.1, seed)
        operators.triton_rms_norm_gradient(None, x, x, weight, 1e-6, 0.0, None)
        operators.triton_rms_norm_gradient(x, x, x, weight, 1e-6, 0.1, seed)
        logits = torch.zeros(48, words, dtype=dtype)
        operators.triton_softmax_statistics(logits, labels, rows, rows.clone())
        operators.triton_logits_gradient_(logits, labels, rows, rows, rows)
    yield from found


def main() -> None:
    """Compile them all."""
    for hidden in (768, 4096, 9000):
        for kernel, arguments, options in launches(hidden, 2048, 32128, torch.bfloat16):
            constants = dict(options)
            warps = constants.pop("num_warps", 4)
            found, code = resources(specialized(kernel, arguments, constants), CAPABILITY, warps, 3)
            widest = max(int(bits or 32) for bits in re.findall(r"LDG\.E(?:\.(\d+))?", code))
            print(json.dumps({"kernel": kernel.__name__, "hidden": hidden, "widest_load_bits": widest, **found}))


if __name__ == "__main__":
    main()
