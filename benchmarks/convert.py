"""Time and peak memory of converting a model between transformers and training checkpoints, each way.

The model of transformers is a sparse file of zeros, which takes no room on the disk; what is written does. Each
conversion is a run of tools/checkpoint/convert.py, whose peak memory is the maximum resident set that the kernel counts
for that process, torch included. In between, blocks of zeros of the checkpoint are given back to the disk, where it has
the means for that. Prints one JSON object a row.

    python benchmarks/convert.py [--model t5-v1_0-11b] [--output benchmarks/results/convert.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.config import ModelConfig
from megatron.core.huggingface.configuration import Origin, config_json
from megatron.core.models.T5.special_ids import SpecialIds
from megatron.core.models.T5.t5_huggingface import correspondences, parameter_shapes
from megatron.core.models.T5.t5_presets import PRESETS

TOOL = Path(__file__).resolve().parents[1] / "tools" / "checkpoint" / "convert.py"
DTYPE = torch.bfloat16
HF, MEGATRON = "hf", "megatron"


def make_source(preset: str, directory: Path) -> int:
    """Make a directory of transformers with zeros for weights; returns the number of parameters."""
    config = ModelConfig(**PRESETS[preset])
    shapes = parameter_shapes(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for correspondence in correspondences(config):
        for name, shape in correspondence.source_shapes(shapes[correspondence.name]).items():
            end = position + torch.Size(shape).numel() * DTYPE.itemsize
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
            position = end
    text = json.dumps(header).encode()
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    written = config_json(config, SpecialIds(0, 1, 0), Origin(), DTYPE, encoder_only=False)
    (directory / "config.json").write_text(json.dumps(written))
    return position // DTYPE.itemsize


def convert(loader: str, saver: str, source: Path, target: Path) -> dict[str, Any]:
    """Run one conversion; returns its measures."""
    command = [sys.executable, str(TOOL), "--model-type", "T5"]
    command += ["--loader", loader, "--saver", saver, "--load-dir", str(source), "--save-dir", str(target)]
    command += ["--target-params-dtype", "bfloat16"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"error: {' '.join(command)} failed")
    return {
        "conversion": f"{loader} to {saver}",
        "time_s": round(seconds, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_gib": round(usage.ru_maxrss * 1024 / 2**30, 3),
    }


def give_back_zeros(directory: Path) -> None:
    """Free the blocks of zeros of the files under `directory`."""
    if shutil.which("fallocate"):
        for file in directory.rglob("*.safetensors"):
            subprocess.run(["fallocate", "--dig-holes", str(file)], check=False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t5-v1_0-11b", choices=list(PRESETS), help="preset to convert")
    parser.add_argument("--output", type=Path, help="file for the rows")
    parser.add_argument("--directory", type=Path, help="directory on the disk to use; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        source, checkpoint, target = (Path(folder) / name for name in ("source", "checkpoint", "target"))
        parameters = make_source(options.model, source)
        rows = [convert(HF, MEGATRON, source, checkpoint)]
        give_back_zeros(checkpoint)
        rows.append(convert(MEGATRON, HF, checkpoint, target))
    publish(
        rows, options.output, "convert", model=options.model, parameters=parameters, dtype="bfloat16",
        gib=round(parameters * DTYPE.itemsize / 2**30, 2), torch=torch.__version__.split("+")[0],
        load_average=round(os.getloadavg()[0], 1),  # above 1, others used the machine
        command=f"python benchmarks/convert.py --model {options.model}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
