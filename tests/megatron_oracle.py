"""Megatron-LM's own code as an oracle, from the wheel of megatron-core.

Its import name is ours, so the wheel is unpacked into a folder of its own and runs in processes of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

VERSION = "0.16.1"


def megatron_core_directory() -> Path:
    """Folder that holds Megatron-LM's `megatron` package; downloaded once.

    It lies in `$MEGATRON_ORACLE_DIR`, or in `.cache/megatron-core` of the checkout. Skips the calling test when the
    wheel cannot be had: no network, or none for this Python.
    """
    default = Path(__file__).resolve().parent.parent / ".cache" / "megatron-core"
    cache = Path(os.environ.get("MEGATRON_ORACLE_DIR", default))
    directory = cache / f"{VERSION}-{sys.implementation.cache_tag}"
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", temporary, f"megatron-core=={VERSION}"]
        process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if process.returncode or not wheels:
            pytest.skip(f"no wheel of megatron-core {VERSION}: {process.stderr.strip()[-200:]}")
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked)
        unpacked.rename(directory)
    return directory


def run_megatron(script: str, *arguments: str | Path, timeout: float = 120.0) -> str:
    """Run a Python script that imports Megatron-LM's `megatron`, and return what it printed.

    Args:
        script: Source text.
        arguments: Its `sys.argv[1:]`.
        timeout: Seconds.
    """
    environment = dict(os.environ, PYTHONPATH=str(megatron_core_directory()), OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as elsewhere:  # the checkout, if current, would shadow PYTHONPATH
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
            cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout
