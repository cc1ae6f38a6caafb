"""Say in one line for each dataset and checkpoint whether it is sound and, if not, where not.

A PATH is the prefix of a dataset (or its .bin, .idx or .json), the prefix of a sharded one (or its .json), a checkpoint
(`iter_0000100`), or a directory of checkpoints, all of which are read. Everything is read: of a dataset every entry of
the index, every id, the copy of the tokenizer and all checksums; of a sharded one all its shards; of a checkpoint the
manifest, all checksums and what its files say they hold.
Exit status: 0 all are sound, 1 one is not, 2 unknown flag, 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron.core.datasets.indexed_dataset import bin_path, idx_path, is_dataset
from megatron.core.datasets.verification import verify_dataset
from megatron.core.errors import UserError
from megatron.training.arguments import Parser, exit_status

SUFFIXES = (".bin", ".idx", ".json")


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s PATH [PATH...]"
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="dataset, checkpoint or directory of checkpoints")
    return parser


def describe_dataset(prefix: Path) -> str:
    """Size of a sound dataset.

    Raises:
        UserError: it is not sound.
    """
    report = verify_dataset(prefix)
    unchecked = f"; not checked: {', '.join(report.unchecked)}" if report.unchecked else ""
    shards = f" in {report.num_shards:,} shards" if report.num_shards else ""
    return (
        f"{report.num_tokens:,} tokens, {report.num_documents:,} documents{shards}, {size(report.num_bytes)}{unchecked}"
    )


def describe_checkpoint(path: Path) -> str:
    """Size of a sound checkpoint.

    Raises:
        UserError: it is not sound.
    """
    from megatron.core.dist_checkpointing import read_manifest, verify_checkpoint  # imports torch

    verify_checkpoint(path)
    manifest = read_manifest(path)
    verify_shard_headers(path, manifest["tensors"], set(manifest["files"]))
    elements = sum(math.prod(tensor["shape"]) for tensor in manifest["tensors"].values())
    num_bytes = sum((path / name).stat().st_size for name in manifest["files"])
    return f"{len(manifest['tensors']):,} tensors, {elements:,} elements, {size(num_bytes)}"


def verify_shard_headers(path: Path, tensors: dict, files: set[str]) -> None:
    """Check with the safetensors library that each file holds the pieces of tensors that the manifest says, only those.

    Raises:
        UserError: one does not.
    """
    from safetensors import SafetensorError, safe_open

    for name in sorted(files):
        expected = {
            chunk["key"]: (tensor["dtype"], chunk["sizes"])
            for tensor in tensors.values()
            for chunk in tensor["chunks"]
            if chunk["file"] == name
        }
        try:
            with safe_open(path / name, framework="numpy") as shard:
                pieces = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118 - it is no dictionary
                found = {key: (piece.get_dtype(), list(piece.get_shape())) for key, piece in pieces.items()}
        except SafetensorError as error:
            raise UserError(f"{path / name} is no valid safetensors file: {error}; use another checkpoint") from error
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise UserError(
                    f"{path / name}: tensor {key} is {found.get(key, 'missing')}, {expected.get(key, 'not listed')} in "
                    "the manifest; use another checkpoint"
                )


def targets(path: Path) -> Iterator[tuple[Path, Callable[[Path], str]]]:
    """What `path` means, and the functions that describe it.

    Raises:
        UserError: there is neither a dataset nor a checkpoint.
    """
    if path.is_dir() and not is_dataset(path):
        from megatron.core.dist_checkpointing import published_checkpoints

        checkpoints = [path] if (path / "manifest.json").exists() else published_checkpoints(path)
        if not checkpoints:
            raise UserError("is neither a checkpoint (no manifest.json) nor a directory of them (no iter_*)")
        yield from ((checkpoint, describe_checkpoint) for checkpoint in reversed(checkpoints))
        return
    prefixes = [path, Path(f"{path}_text_document")]
    prefixes += [path.with_suffix("")] if path.suffix in SUFFIXES else []
    prefix = next(filter(is_dataset, prefixes), None)
    if prefix is None:
        raise UserError(
            f"is no dataset (no {idx_path(path).name} or {bin_path(path).name}) and no checkpoint directory"
        )
    yield prefix, describe_dataset


def size(num_bytes: int) -> str:
    """Bytes in the unit that suits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"


def verify(path: Path) -> bool:
    """Print a line for each dataset or checkpoint that `path` means; returns whether all are sound."""
    try:
        found = list(targets(path))
    except (UserError, OSError) as error:
        return report_problem(path, error)
    sound = [verify_target(target, describe) for target, describe in found]
    return all(sound)


def verify_target(path: Path, describe: Callable[[Path], str]) -> bool:
    """Print the line of one dataset or checkpoint; returns whether it is sound."""
    start = time.monotonic()
    try:
        description = describe(path)
    except (UserError, OSError, RecursionError) as error:  # the last from JSON that is nested too deeply
        return report_problem(path, error)
    print(one_line(f"{path}: sound: {description}; {time.monotonic() - start:.1f} s"), flush=True)
    return True


def report_problem(path: Path, error: Exception) -> bool:
    """Print why something is not sound; returns False."""
    print(one_line(f"{path}: NOT SOUND: {error}"), flush=True)
    return False


def one_line(text: str) -> str:
    """A text without line ends; one may be in a file's name."""
    return text.strip().replace("\n", " ").replace("\r", " ")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    paths = [Path(path) for path in build_parser().parse_args(argv).paths]
    sound: list[bool] = []
    failed = exit_status(lambda: sound.extend(map(verify, paths)), output="output", interrupted="interrupted")
    return failed or int(not all(sound))


if __name__ == "__main__":
    sys.exit(main())
