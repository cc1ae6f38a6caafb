"""What our Triton kernels need of a GPU, found by compiling them only: no GPU is used.

Each kernel is compiled as its launch would compile it, for the tiles of its table, and disassembled: registers, shared
memory, bytes of the stack (spilled registers), and how often its code has an instruction of a kind. Counts are of the
code, where a loop's body stands once; they tell whether matrix instructions are the ones of the architecture
(`HGMMA`: of a warp group, compute capability 9.0; `UTCHMMA`: 10.0; `HMMA`: of a warp) and how a tile's bias is read.

    python benchmarks/kernel_resources.py --output benchmarks/results/kernel_resources.jsonl
    python benchmarks/kernel_resources.py --capability 90 --head-dim 64 --sass /tmp/sass

TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from attention_contenders import Shape
from attention_launches import launches
from report import publish
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Bytes that a program of each compute capability may have.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# LDG, LDGSTS: loads from memory into registers and into shared memory; LDS, STS: shared memory; LDL, STL: spills.
INSTRUCTIONS = (
    "HGMMA", "UTCHMMA", "HMMA", "LDG", "LDGSTS", "UTMALDG", "STG", "LDS", "LDSM", "STS", "LDL", "STL", "SHFL", "BAR",
    "MUFU", "FFMA", "IMAD", "ATOM", "RED",
)  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Masks and biases that decide which loops a kernel of attention has.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "bias": {},
    "causal": {"causal": True},
    "packed": {"segments": True, "dropout": 0.1},
}


def specialized(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """A kernel as Triton specializes it for these arguments: integers 1 and None are constants, multiples of 16 known.

    Tensors stand for pointers to aligned memory.
    """
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    given = dict(zip((parameter.name for parameter in kernel.params), arguments, strict=False)) | constants
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], values[index,] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, values, attributes)


def resources(source: ASTSource, capability: int, warps: int, stages: int) -> tuple[dict[str, Any], str]:
    """What the compiled kernel needs, and its code."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    of_kind = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", code, re.MULTILINE))
    found = {
        "registers": int(of_kind["REG"]),
        "stack_bytes": int(of_kind["STACK"]),
        "shared_bytes": compiled.metadata.shared,
        "instructions": {name: opcodes[name] for name in INSTRUCTIONS if opcodes[name]},
    }
    return found, code


def attention_launches(
    capability: int, dtype: torch.dtype, head_dim: int, *, causal: bool = False, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Launches of all kernels of attention of 16 rows of 512 tokens, and their tiles."""
    from megatron.core.extensions.triton_attention_tiles import choose_tiles

    tiles = choose_tiles((capability // 10, capability % 10), head_dim, dtype.itemsize)
    shape = Shape(16, 12, 512, head_dim, causal, dtype)
    for name, launch in launches(shape, torch.device("meta"), tiles=tiles, **options).items():
        yield launch, getattr(tiles, name, None)


def attention_rows(
    capability: int, dtype: str, head_dim: int, variant: str, sass: Path | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each kernel of attention."""
    for launch, tile in attention_launches(capability, DTYPES[dtype], head_dim, **VARIANTS[variant]):
        constants = dict(launch.meta)
        warps, stages = constants.pop("num_warps", 4), constants.pop("num_stages", 3)
        found, code = resources(specialized(launch.kernel, launch.arguments, constants), capability, warps, stages)
        name = launch.kernel.fn.__name__
        if sass is not None:
            sass.mkdir(parents=True, exist_ok=True)
            (sass / f"{name}-{capability}-{dtype}-{head_dim}-{variant}.sass").write_text(code)
        yield {
            "kernel": name, "capability": capability, "dtype": dtype, "head_dim": head_dim, "variant": variant,
            "tile": None if tile is None else list(tile[:2]), "warps": warps, "stages": stages, **found,
        }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """For people: a line each, with what is over a limit marked."""
    lines = ["| kernel | for | tile, warps, stages | registers | stack | shared KiB | instructions |"]
    lines.append("| --- | --- | --- | --: | --: | --: | --- |")
    for row in rows:
        tile = "x".join(map(str, row["tile"])) if row["tile"] else ""
        shared = f"{row['shared_bytes'] / 1024:.0f}" + "!" * (row["shared_bytes"] > SHARED_MEMORY[row["capability"]])
        counts = " ".join(f"{name} {count}" for name, count in row["instructions"].items())
        case = f"{row['capability']} {row['dtype']} {row['head_dim']} {row['variant']}"
        cells = [row["kernel"], case, f"{tile} {row['warps']} {row['stages']}", row["registers"]]
        lines.append(f"| {' | '.join(map(str, [*cells, row['stack_bytes'] or '', shared, counts]))} |")
    return "\n".join(lines)


def main() -> None:
    """Compile, print, and save when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows to this file too")
    parser.add_argument("--capability", nargs="+", type=int, default=[80, 90, 100], choices=list(SHARED_MEMORY))
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--sass", type=Path, help="write the code of each kernel into this folder")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    rows = []
    for case in product(options.capability, options.dtype, options.head_dim, options.variant):
        rows += attention_rows(*case, sass=options.sass)
        print(json.dumps(rows[-1]), flush=True)
    publish(rows, options.output, "kernel_resources", torch=torch.__version__, triton=triton.__version__)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
