"""Triton's interpreter, which runs kernels on CPUs for tests."""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.getenv("TRITON_INTERPRET") == "1"


def repair_loop_bounds() -> None:
    """Lets bounds of loops be tensors where numpy no longer takes an array of one element for a number.

    The interpreter of Triton 3.6 depends on that, up to numpy 2.3; later ones squeeze the array, as is done here. It
    arranges the class of tensors for each launch by a private function, so that one has to be replaced.
    """
    from triton.runtime import interpreter

    arrange = interpreter._patch_lang_tensor
    if getattr(arrange, "repaired", False):
        return

    def arrange_and_repair(tensor: Any, *scope: Any) -> None:
        arrange(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    arrange_and_repair.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = arrange_and_repair
