"""How the process gets and keeps memory of the host while it trains on CPUs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

import torch

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_SETTINGS_OF_THE_USER = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory(device: torch.device, environment: Mapping[str, str] = os.environ) -> bool:
    """Let the C library keep what it has had once, for a process that computes on CPUs.

    glibc maps each large block anew and unmaps it when it is freed, so that every step of training has the kernel
    clear the same memory and fault it in page by page: a tenth of a step and more. Told not to, it takes large blocks
    from its heap too, and a step meets the pages of the step before. The heap never shrinks: the process holds its
    peak until it ends. On GPUs large tensors are the business of torch's own allocator, and nothing is changed; nor
    where the C library is another, nor when the user has set one of glibc's variables for this (`MALLOC_...`, or
    `GLIBC_TUNABLES` with `glibc.malloc`). To be called before large tensors are made; it cannot be undone.

    Args:
        device: The device of the run.
        environment: The environment variables.

    Returns:
        Whether the allocator was told.
    """
    if device.type != "cpu" or _set_by_user(environment) or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # No large threshold instead of a maximum of 0: glibc takes none above 32 MiB, and many tensors are larger.
    # -1 is "never": glibc keeps the number without sign, and so free memory at the heap's end is not returned.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def _set_by_user(environment: Mapping[str, str]) -> bool:
    tunables = environment.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name in environment for name in _SETTINGS_OF_THE_USER)


def _is_glibc() -> bool:
    """Whether the C library of this process is glibc; other systems do not know the question."""
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):
        return False
