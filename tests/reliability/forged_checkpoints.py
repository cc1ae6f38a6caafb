"""R9: checkpoints made to do harm are refused in one line, with little memory, and the one before is loaded.

Checksums and sizes are forged too, as somebody who wants to do harm would, so that each attack reaches the code that it
is meant for. Every attack is loaded by a process of its own with a limit on its memory.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import CheckpointError, checkpoint_path, latest_checkpoint
from megatron.core.dist_checkpointing.format import MANIFEST, encode_manifest
from tests.distributed import PRELOAD
from tests.reliability.bit_flips import save_two
from tests.reliability.small_checkpoints import count_trials, load_example, scratch

MEMORY_MIB = 512  # that loading may take, of address space, on top of what the process has
WITHIN_S = 30.0
LONGEST_MESSAGE = 2000
TABLE = "model/table"  # a tensor of which each of the two ranks wrote a half

Manifest = dict[str, Any]


def shards(path: Path) -> list[Path]:
    """The shards of a checkpoint."""
    return sorted(path.glob("*.safetensors"))


def seal(path: Path, change: Callable[[Manifest], object] = lambda manifest: None) -> None:
    """Make the manifest agree with the shards that are there; change it; give it its checksum."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    del manifest["manifest_checksum"]
    for name, entry in manifest["files"].items():
        file = path / name
        if file.is_file() and file.stat().st_size < 2**30:
            content = file.read_bytes()
            entry.update(bytes=len(content), crc32=zlib.crc32(content))
    change(manifest)
    (path / MANIFEST).write_bytes(encode_manifest(manifest))


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replace the header of the first shard by what `change` makes of it (or its text), and seal the checkpoint."""
    shard = shards(path)[0]
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    seal(path)


def header_length(path: Path, length: int) -> None:
    """Let the first shard claim a header of so many bytes."""
    shard = shards(path)[0]
    shard.write_bytes(length.to_bytes(8, "little") + shard.read_bytes()[8:])
    seal(path)


def entry(header: dict[str, Any], **values: Any) -> dict[str, Any]:
    """`header` with other values for the half of the table."""
    header[f"{TABLE}@0,0"].update(values)
    return header


def shape(path: Path, lengths: list[Any]) -> None:
    """Let a tensor have that shape, and its only piece too."""

    def change(manifest: Manifest) -> None:
        tensor = manifest["tensors"]["ids"]
        tensor["shape"] = lengths
        tensor["chunks"][0].update(sizes=lengths, offsets=[0] * len(lengths))

    seal(path, change)


def rename_shard(path: Path, name: str) -> None:
    """Let the manifest call the first shard `name`."""

    def change(manifest: Manifest) -> None:
        old = min(manifest["files"])
        manifest["files"][name] = manifest["files"].pop(old)
        for tensor in manifest["tensors"].values():
            for chunk in tensor["chunks"]:
                if chunk["file"] == old:
                    chunk["file"] = name

    seal(path, change)


def change_chunk(path: Path, **values: Any) -> None:
    """Let the manifest say something else about the second half of the table."""
    seal(path, lambda manifest: manifest["tensors"][TABLE]["chunks"][1].update(values))


def repeat_first_half(path: Path) -> None:
    """A table that is its first half twice, with a hole where the second half belongs."""

    def change(manifest: Manifest) -> None:
        chunks = manifest["tensors"][TABLE]["chunks"]
        chunks[1] = dict(chunks[0])

    with shards(path)[0].open("ab") as shard:
        shard.write(bytes(2**16))  # so that it is large enough for both
    seal(path, change)


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of the first shard."""
    shard = shards(path)[0]
    shard.rename(path.parent / "moved.safetensors")
    make(shard)


def link_directory(path: Path) -> None:
    """The checkpoint is a link to a directory elsewhere."""
    elsewhere = path.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def link_manifest(path: Path) -> None:
    """The manifest is a link to a file elsewhere."""
    (path / MANIFEST).rename(path.parent / "elsewhere.json")
    (path / MANIFEST).symlink_to(path.parent / "elsewhere.json")


def sparse_manifest(path: Path) -> None:
    """A manifest of a TiB."""
    os.truncate(path / MANIFEST, 2**40)


def sparse_shard(path: Path) -> None:
    """A shard of a TiB, and a tensor to go with it."""
    os.truncate(shards(path)[0], 2**40)
    lengths = [2**37]

    def change(manifest: Manifest) -> None:
        tensor = manifest["tensors"]["ids"]
        manifest["files"][shards(path)[0].name]["bytes"] = 2**40
        tensor.update(shape=lengths, dtype="U8")
        tensor["chunks"][0].update(sizes=lengths, offsets=[0], file=shards(path)[0].name)

    seal(path, change)


def text_of_manifest(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the text of the manifest itself."""
    (path / MANIFEST).write_bytes(change((path / MANIFEST).read_bytes()))


def set_key(path: Path, key: str, value: Any) -> None:
    """Let a key of the manifest have that value."""
    seal(path, lambda manifest: manifest.update({key: value}))


DEEP = 200_000
ZERO = "\N{ARABIC-INDIC DIGIT ZERO}"  # a digit for regular expressions
NAMES = [
    "../iter_0000001/shard_00000_of_00002.safetensors", "/etc/passwd", "..", "", ".", "manifest.json",
    "shard_00000_of_00002.safetensors/../../../etc/passwd", "shard_00000_of_00002.safetensors\0", "C:\\x",
    "shard_00000_of_00002.safetensors\n", f"shard_{ZERO * 5}_of_{ZERO * 5}.safetensors",
]  # fmt: skip
SHAPES: list[list[Any]] = [
    [2**60], [2**31, 2**31], [2**62, 4], [2**63], [2**64 + 9], [10**4000], [-9], [9.0], ["9"], [True] * 9, [None],
    [[9]], [1] * 1000, [9, 2**62, 0],
]  # fmt: skip
LENGTHS = [0, 1, 2**20, 2**32, 2**40, 2**63, 2**64 - 1]
OFFSETS: list[Any] = [
    [0, 2**60], [2**60, 2**60 + 12288], [-12288, 0], [12288, 0], [0.0, 12288.0], [0], None, "0",
    [10**400, 10**400 + 12288],
]  # fmt: skip

Attack = Callable[[Path], object]
ATTACKS: dict[str, Attack] = {
    **{f"file named {name!r}": partial(rename_shard, name=name) for name in NAMES},
    **{f"shape {str(lengths)[:40]}": partial(shape, lengths=lengths) for lengths in SHAPES},
    **{f"header of {length} bytes": partial(header_length, length=length) for length in LENGTHS},
    **{
        f"offsets {str(offsets)[:40]} in a header": partial(rewrite_header, change=partial(entry, data_offsets=offsets))
        for offsets in OFFSETS
    },
    "other dtype in a header": partial(rewrite_header, change=partial(entry, dtype="F64")),
    "other shape in a header": partial(rewrite_header, change=partial(entry, shape=[2**60, 1])),
    "header that is a list": partial(rewrite_header, change=lambda header: b"[]"),
    "header nested deeply": partial(rewrite_header, change=lambda header: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "header with a huge integer": partial(rewrite_header, change=lambda header: b'{"a":' + b"1" * 100_000 + b"}"),
    "header that is not UTF-8": partial(rewrite_header, change=lambda header: b"\xff\xfe{}"),
    "tensor missing in a header": partial(rewrite_header, change=lambda header: header.pop(f"{TABLE}@0,0") and header),
    "half of a tensor twice": repeat_first_half,
    "piece in an unlisted file": partial(change_chunk, file="shard_00009_of_00010.safetensors"),
    "piece outside its tensor": partial(change_chunk, offsets=[25, 0]),
    "piece before its tensor": partial(change_chunk, offsets=[-1, 0]),
    "piece of a huge size": partial(change_chunk, sizes=[2**60, 2**60]),
    "piece with too few offsets": partial(change_chunk, offsets=[24]),
    "piece whose offsets are text": partial(change_chunk, offsets="24"),
    "piece under the key of another": partial(change_chunk, key="ids"),
    "piece whose key is a list": partial(change_chunk, key=[]),
    "link for a shard": partial(
        replace_by, make=lambda shard: shard.symlink_to(shard.parents[1] / "moved.safetensors")
    ),
    "link to /dev/zero for a shard": partial(replace_by, make=lambda shard: shard.symlink_to("/dev/zero")),
    "pipe for a shard": partial(replace_by, make=os.mkfifo),
    "directory for a shard": partial(replace_by, make=Path.mkdir),
    "link for a directory": link_directory,
    "link for a manifest": link_manifest,
    "pipe for a manifest": lambda path: ((path / MANIFEST).unlink(), os.mkfifo(path / MANIFEST)),
    "manifest of a TiB": sparse_manifest,
    "shard of a TiB": sparse_shard,
    "manifest nested deeply": partial(text_of_manifest, change=lambda text: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "list nested deeply in a manifest": partial(
        text_of_manifest, change=lambda text: text.replace(b"{", b'{"a":' + b"[" * DEEP + b"]" * DEEP + b",", 1)
    ),
    "huge integer in a manifest": partial(
        text_of_manifest, change=lambda text: text.replace(b"{", b'{"a":' + b"1" * 100_000 + b",", 1)
    ),
    "key twice in a manifest": partial(
        text_of_manifest, change=lambda text: text.replace(b"{", b'{"format_version": 1,', 1)
    ),
    "manifest with a byte that is not UTF-8": partial(text_of_manifest, change=lambda text: b"\xff" + text),
    "manifest that is a list": partial(text_of_manifest, change=lambda text: b"[]"),
    "manifest that is a number": partial(text_of_manifest, change=lambda text: b"NaN"),
    "format version NaN": partial(set_key, key="format_version", value=float("nan")),
    "format version that is a list": partial(set_key, key="format_version", value=[1]),
    "iteration that is text": partial(set_key, key="iteration", value="2"),
    "files that are a list": partial(set_key, key="files", value=[]),
    "tensors that are a list": partial(set_key, key="tensors", value=[]),
    "tensors that are null": partial(set_key, key="tensors", value=None),
    "size that is a bool": lambda path: seal(path, lambda m: m["files"][min(m["files"])].update(bytes=True)),
    "size that is negative": lambda path: seal(path, lambda m: m["files"][min(m["files"])].update(bytes=-1)),
    "checksum that is text": lambda path: seal(path, lambda m: m["files"][min(m["files"])].update(crc32="0")),
    "unknown dtype": lambda path: seal(path, lambda m: m["tensors"][TABLE].update(dtype="PICKLE")),
    "dtype that is a list": lambda path: seal(path, lambda m: m["tensors"][TABLE].update(dtype=["F32"])),
}


def _load(root: Path, pipe: Connection) -> None:
    """The process that loads the forged checkpoint: by its name, and as a run does that looks for the newest."""
    logging.disable()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send((_refusal(checkpoint_path(root, 2)), _newest(root)))


def _refusal(path: Path) -> str | None:
    """With what message `path` is refused."""
    try:
        load_example(path)
    except CheckpointError as error:
        return str(error)
    return None


def _newest(root: Path) -> str | int | None:
    """Seed of the newest checkpoint, or the message that ends a run which loads it."""
    path = latest_checkpoint(root, checksums=False)  # they are forged, or those of a TiB
    return None if path is None else _refusal(path) or load_example(path)


def _try(root: Path, attack: Attack, copy: Path) -> None:
    """Load a forged copy of `root`."""
    shutil.copytree(root, copy)
    attack(checkpoint_path(copy, 2))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "tests.reliability.forged_checkpoints"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_load, args=(copy, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(WITHIN_S), f"still loading after {WITHIN_S:.0f} s"
        message, newest = ours.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process that loads ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        shutil.rmtree(copy)
    assert message is not None, "the forged checkpoint was loaded"
    assert message.isprintable() and len(message) < LONGEST_MESSAGE, f"not a line: {message[:100]!r}"
    assert newest in (1, message), f"a run would begin with {newest!r}"


def trials(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trial for each attack."""
    path = save_two(folder / "root")
    for number, (name, attack) in enumerate(ATTACKS.items()):
        yield name, partial(_try, path.parent, attack, folder / f"forged-{number}")


def count_forged() -> list[dict[str, Any]]:
    """One row."""
    with scratch() as folder:
        return [count_trials("R9", "forged checkpoints refused in one line with bounded memory", trials(Path(folder)))]
