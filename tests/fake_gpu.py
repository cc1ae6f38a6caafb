"""Programs that run on a GPU which is not there: shapes, dtypes and devices without numbers or memory.

Whatever would mix tensors of the host and of the device, or read a number from the device, raises, as does an operator
that has no rule for shapes. What kernels compute is not looked at.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]


class NoCopies(TorchDispatchMode):
    """Refuses copies between devices, for which the host may have to wait."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("copy", "lift")):
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            assert len({tensor.device.type for tensor in tensors}) == 1, func
        return result


def build(folder: Path) -> Path:
    """The library that makes torch believe in a GPU, compiled in `folder`; skips the test where that cannot be."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    if torch.version.cuda is not None:
        pytest.skip("needs a torch that is built without CUDA")
    installed, library = Path(torch.__file__).parent, folder / "fake_gpu.so"
    command = [compiler, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{installed}/include", "-o", str(library)]
    command += [str(ROOT / "tests" / "fake_gpu.cpp"), f"-L{installed}/lib", "-ltorch_cpu", "-lc10"]
    done = subprocess.run([*command, f"-Wl,-rpath,{installed}/lib"], capture_output=True, text=True, check=False)
    if done.returncode:  # it leans on headers of torch that may change
        pytest.skip(f"the fake GPU does not compile with torch {torch.__version__}: {done.stderr[:300]}")
    return library


def run(library: Path, function: FunctionType, *arguments: str) -> str:
    """What `function`, of a module's top level, prints in a process that has a fake GPU."""
    folders = [str(ROOT), str(Path(function.__code__.co_filename).parent)]
    program = (
        f"import ctypes, importlib, sys; ctypes.CDLL({str(library)!r}); sys.path[:0] = {folders!r}; "
        f"importlib.import_module({function.__module__!r}).{function.__name__}(*sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
