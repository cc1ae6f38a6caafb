"""Triton's interpreter, which runs kernels on CPUs for tests, and what it gets wrong."""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.getenv("TRITON_INTERPRET") == "1"


def repair_interpreter() -> None:
    """Makes the interpreter of Triton 3.6 and 3.7 compute what compiled kernels do; for good, and only once.

    Bounds of loops may be tensors: it takes an array of one element for a number, which numpy no longer does from 2.4
    on (later versions of Triton squeeze the array, as is done here). Products of bf16, which it keeps as integers, are
    products of those integers there. It has no public way to change either.
    """
    from triton.runtime import interpreter

    if getattr(interpreter, "repaired_for_attention", False):
        return
    arrange, multiply = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def arrange_with_index(tensor: Any, *scope: Any) -> None:
        arrange(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    def multiply_in_fp32(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return multiply(self, _widened(a), _widened(b), *arguments)

    interpreter._patch_lang_tensor = arrange_with_index
    interpreter.InterpreterBuilder.create_dot = multiply_in_fp32
    interpreter.repaired_for_attention = True


def _widened(handle: Any) -> Any:
    """A tensor of bf16, kept as uint16, in fp32; others as they are."""
    import numpy as np
    import triton.language as tl

    if handle.dtype != tl.bfloat16:
        return handle
    return type(handle)((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
