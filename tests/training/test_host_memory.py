"""Memory that a process has had once is kept: pages are not faulted in again and again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.training import host_memory
from megatron.training.host_memory import keep_freed_memory

FAULTS = """
import resource, torch
from megatron.training.host_memory import keep_freed_memory
kept = keep_freed_memory(torch.device("cpu"))
def step():
    tensors = [torch.zeros(mib * 2**18) for mib in (1, 40, 3, 9)]  # as large as a step's, one above 32 MiB
    return torch.cat(tensors)
for _ in range(3):  # until the places of the blocks have settled
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES_OF_A_STEP = 2 * 53 * 2**20 // 4096


def faults(**environment: str) -> tuple[bool, int]:
    """Whether the allocator was told, and page faults of three steps, in a process of its own."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=Path(__file__).parents[2],
        env=plain | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    kept, count = result.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_step_faults_no_memory_in_again() -> None:
    kept, count = faults()
    assert kept and count < PAGES_OF_A_STEP // 100
    left, by_default = faults(MALLOC_MMAP_MAX_="65536")  # what glibc does by itself
    assert not left and by_default > PAGES_OF_A_STEP


def fail(*arguments: object) -> None:
    raise AssertionError("the C library was asked")


@pytest.mark.parametrize(
    "variable", ["MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"]
)
def test_settings_of_the_user_win(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.ctypes, "CDLL", fail)
    cpu = torch.device("cpu")
    assert not keep_freed_memory(cpu, {variable: "1"})
    assert not keep_freed_memory(cpu, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})


def test_nothing_changes_for_gpus_and_other_c_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.ctypes, "CDLL", fail)
    assert not keep_freed_memory(torch.device("cuda", 0), {})

    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")  # musl, macOS

    monkeypatch.setattr(os, "confstr", unknown)
    assert not keep_freed_memory(torch.device("cpu"), {})
    monkeypatch.delattr(os, "confstr")  # Windows
    assert not keep_freed_memory(torch.device("cpu"), {})
