"""R9: pickles planted where a run or a tool reads never run, and forged checkpoints do no harm.

Each trial plants one kind of pickle in one place of a run's directory or data, then continues the run by the same
command and lets `tools/verify.py` look at it. The pickle would make a directory, the canary.
"""

from __future__ import annotations

import io
import os
import pickle
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.corpora import make_byte_dataset, write_prose
from tests.reliability.forged_checkpoints import count_forged, rewrite_header, seal, shards
from tests.reliability.jobs import ROOT, ForkedJob
from tests.reliability.small_checkpoints import count_trials, scratch

FLAGS = shlex.split(
    "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 16 --num-attention-heads 2 --kv-channels 8 "
    "--encoder-seq-length 64 --split 90,10,0 --micro-batch-size 2 --eval-iters 0 "
    "--save-interval 1 --train-iters 4 --exit-interval 2"  # stopped after two steps, the same command continues
)
VERIFY = str(ROOT / "tools" / "verify.py")
CHECKPOINT = "save/iter_0000002"  # the newest of a trial's directory
DATA = "bytes_text_document"
RUN_WITHIN_S = 120.0


class Plant:
    """What makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.canary),)


def payloads(canary: Path) -> dict[str, bytes]:
    """Kinds of pickles, by name."""
    plant = Plant(canary)
    torch_file, numpy_file = io.BytesIO(), io.BytesIO()
    torch.save({"model": plant}, torch_file)
    np.save(numpy_file, np.array([plant], dtype=object), allow_pickle=True)
    return {
        "pickle": pickle.dumps(plant, protocol=4),
        "text pickle": pickle.dumps(plant, protocol=0),
        "torch.save": torch_file.getvalue(),
        "numpy.save": numpy_file.getvalue(),
    }


def check_payloads(canary: Path) -> None:
    """Every payload does make the canary where it is unpickled."""
    read: dict[str, Callable[[io.BytesIO], Any]] = {
        "torch.save": partial(torch.load, weights_only=False),
        "numpy.save": partial(np.load, allow_pickle=True),
    }
    for name, payload in payloads(canary).items():
        read.get(name, pickle.load)(io.BytesIO(payload))
        canary.rmdir()


Position = Callable[[Path, bytes], object]
"""Plants a payload in a trial's directory, which holds `save` and the data."""


def _file(directory: Path, payload: bytes, name: str) -> None:
    """A whole file."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)


def _newest(directory: Path) -> Path:
    return directory / CHECKPOINT


def _shard(directory: Path, payload: bytes) -> None:
    """A whole shard, which the manifest vouches for."""
    shards(_newest(directory))[0].write_bytes(payload)
    seal(_newest(directory))


def _front_of_shard(directory: Path, payload: bytes) -> None:
    """The beginning of a shard, with its size and checksum as recorded."""
    shard = shards(_newest(directory))[0]
    shard.write_bytes(payload + shard.read_bytes()[len(payload) :])
    seal(_newest(directory))


def _shard_metadata(directory: Path, payload: bytes) -> None:
    """What safetensors keeps besides the tensors."""
    text = payload.decode("latin-1")
    rewrite_header(_newest(directory), lambda header: header | {"__metadata__": {"format": "pt", "pickle": text}})


def _manifest_value(directory: Path, payload: bytes) -> None:
    """Strings of the manifest that nothing needs."""
    text = payload.decode("latin-1")
    seal(_newest(directory), lambda manifest: manifest.update({"pickle": text, "torch_version": text}))


def _front_of(directory: Path, payload: bytes, name: str) -> None:
    path = directory / name
    path.write_bytes(payload + path.read_bytes()[len(payload) :])


def _whole(name: str) -> Position:
    return partial(_file, name=name)


READ: dict[str, Position] = {  # what is read, or could be
    "shard, checksum forged": _shard,
    "front of a shard, checksum forged": _front_of_shard,
    "metadata of a shard": _shard_metadata,
    "values in a manifest": _manifest_value,
    **{
        name: _whole(name)
        for name in (
            f"{CHECKPOINT}/shard_00000_of_00001.safetensors", f"{CHECKPOINT}/manifest.json",
            "save/latest_checkpointed_iteration.txt", "save/metrics.jsonl", "save/finished",
            "save/tokenizer/tokenizer_config.json", f"{DATA}.json", f"{DATA}.idx", f"{DATA}.bin",
            f"{DATA}_tokenizer/tokenizer_config.json",
        )
    },
    "front of an index": partial(_front_of, name=f"{DATA}.idx"),
    "front of tokens": partial(_front_of, name=f"{DATA}.bin"),
}  # fmt: skip
EXTRA: dict[str, Position] = {  # what other programs read; this one must not even notice
    name: _whole(name)
    for name in (
        f"{CHECKPOINT}/.metadata", f"{CHECKPOINT}/common.pt", f"{CHECKPOINT}/__0_0.distcp",
        f"{CHECKPOINT}/pytorch_model.bin", f"{CHECKPOINT}/shard_00001_of_00002.safetensors",
        "save/iter_0000001/metadata.json", "save/iter_0000009/mp_rank_00/model_optim_rng.pt",
        "save/tokenizer/tokenizer.pkl", f"{DATA}_tokenizer/added_tokens.json", f"{DATA}.pkl",
    )
}  # fmt: skip


def run(command: list[str], log: Path, program: str | None = None) -> tuple[int, str]:
    """Exit status and output of a program of one process."""
    job = ForkedJob(command, 1, log) if program is None else ForkedJob(command, 1, log, program)
    try:
        assert job.ended(RUN_WITHIN_S), f"did not end within {RUN_WITHIN_S:.0f} s"
    finally:
        job.kill(None)
    (status,) = job.statuses()
    return status, log.read_text(errors="replace")


def training_command(directory: Path) -> list[str]:
    """Flags of the run of a directory."""
    return [*FLAGS, "--data-path", str(directory / "bytes"), "--save", str(directory / "save")]


def prepare(directory: Path) -> None:
    """A run that has been stopped in the middle, with its data."""
    directory.mkdir()
    make_byte_dataset(write_prose(directory / "corpus.jsonl"))
    status, output = run(training_command(directory), directory.with_suffix(".log"))
    assert status == 0 and _newest(directory).is_dir(), output


def _try(source: Path, directory: Path, position: Position, payload: bytes, canary: Path, noticed: bool) -> None:
    shutil.copytree(source, directory)
    position(directory, payload)
    for program, command in ((None, training_command(directory)), (VERIFY, [str(directory / "save")])):
        log = directory / "log"
        log.unlink(missing_ok=True)
        status, output = run(command, log, program)
        assert not canary.exists(), "the pickle has run"
        assert "Traceback" not in output, output[-500:]
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        if program is None:
            assert (status, len(errors)) in ([(0, 0), (1, 1)] if noticed else [(0, 0)]), f"status {status}: {output}"
        else:
            assert status in (0, 1), f"status {status}: {output}"
    shutil.rmtree(directory)


def trials(folder: Path, positions: list[str], kinds: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trial for each kind of pickle in each position."""
    canary = folder / "canary"
    check_payloads(canary)
    prepare(folder / "source")
    for number, (name, kind) in enumerate(product(positions, kinds)):
        position = (READ | EXTRA)[name]
        arguments = folder / "source", folder / str(number), position, payloads(canary)[kind], canary, name in READ
        yield f"{kind} as {name}", partial(_try, *arguments)


def count_pickles(positions: list[str] | None = None, kinds: list[str] | None = None) -> dict[str, Any]:
    """A row over positions and kinds (default: all)."""
    with scratch() as folder:
        chosen = positions or [*READ, *EXTRA], kinds or list(payloads(Path("unused")))
        what = "pickles planted where runs and tools read, none has run"
        return count_trials("R9", what, trials(Path(folder), *chosen))


Manifest = dict[str, Any]
ENTRIES: dict[str, Callable[[Manifest], object]] = {  # what a run takes from a manifest, forged
    "no configuration": lambda m: m.pop("config"),
    "configuration that is a list": lambda m: m.update(config=[]),
    "architecture that is null": lambda m: m["config"].update(model=None),
    "no progress": lambda m: m.pop("progress"),
    "unknown kind of progress": lambda m: m["progress"].update(pickle="x"),
    "iteration that is text": lambda m: m["progress"].update(iteration="2"),
    "negative iteration": lambda m: m["progress"].update(iteration=-5),
    "huge iteration": lambda m: m["progress"].update(iteration=10**30),
    "half a sample": lambda m: m["progress"].update(consumed_samples=1.5),
    "losses that are text": lambda m: m["progress"].update(recent_losses=["6.1"]),
    "evaluation of an unknown split": lambda m: m["progress"].update(pending_evaluations=["../x"]),
    "schedule that is null": lambda m: m.update(schedule=None),
    "batch size that is text": lambda m: m.update(global_batch_size="4"),
    "dataset that is null": lambda m: m.update(dataset=None),
    "tokenizer that is a list": lambda m: m.update(tokenizer=[1]),
}


def _try_entry(source: Path, directory: Path, change: Callable[[Manifest], object]) -> None:
    shutil.copytree(source, directory)
    seal(_newest(directory), change)
    status, output = run(training_command(directory), directory / "log")
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (status, len(errors)) == (1, 1) and CHECKPOINT in errors[0], f"status {status}: {output[-500:]}"
    assert "Traceback" not in output, output[-500:]
    shutil.rmtree(directory)


def count_entries() -> dict[str, Any]:
    """A row over forged progress and configuration."""
    with scratch() as folder:
        source = Path(folder, "source")
        prepare(source)
        every = [
            (name, partial(_try_entry, source, Path(folder, str(number)), change))
            for number, (name, change) in enumerate(ENTRIES.items())
        ]
        return count_trials("R9", "forged progress and configuration refused in one line by a run", every)


def count() -> list[dict[str, Any]]:
    """Planted pickles and forged checkpoints."""
    return [count_pickles(), count_entries(), *count_forged()]
