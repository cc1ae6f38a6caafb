"""Finds the files of a text corpus, and says what reading them gives."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron.core.datasets.indexed_format import manifest_format
from megatron.core.errors import UserError, one_line
from megatron.core.tokenizers.base import saved_config

InputFormat = Literal["auto", "jsonl", "text", "parquet", "arrow"]
SampleBy = Literal["line", "paragraph", "document"]
Records = Literal["jsonl", "line", "paragraph", "document", "parquet", "arrow"]

HUB_PREFIX = "hf://"
_FORMATS: dict[str, InputFormat] = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".text": "text", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
_COMPRESSIONS = (".gz", ".zst")

# Names of directories of our own: prepared text (corpus_cache.py), finished or not, and tokenizers that are not whole.
_OWN_DIRECTORY = re.compile(r".*\.[0-9a-f]{16}\.cache(\.partial-.*)?|.*_tokenizer(\.partial)+")


@dataclass(frozen=True)
class Source:
    """One input file: its path, how its records are told apart, and its size on disk in bytes."""

    path: Path
    records: Records
    size: int


class Position(NamedTuple):
    """A place between two records of a file."""

    offset: int  # decompressed bytes before it; of tables: rows
    line: int  # number of the line behind it, from 1; of tables: of the row


START = Position(0, 1)


class Chunk(NamedTuple):
    """Whole records of one file."""

    path: str
    records: str  # Source.records
    first_line: int  # number of the first line of `data` in its file, from 1; of tables: of the first row
    data: bytes
    bytes_read: int  # of the file on disk, up to the end of this chunk
    error: str | None  # why the file cannot be read beyond `data`
    end: Position  # where the next chunk starts

    def place(self, line: int) -> str:
        """Where a record is, for messages."""
        return f"{self.path}:row {line}" if self.records in ("parquet", "arrow") else f"{self.path}:{line}"


class Record(NamedTuple):
    """One record: a text for each key, or the reason why there is none."""

    line: int
    texts: list[str]
    reason: str | None = None  # kind of the error, the same for all records that have it
    detail: str = ""


class UnreadableError(Exception):
    """A file cannot be read any further."""


def find_sources(
    patterns: Sequence[str], input_format: InputFormat = "auto", sample_by: SampleBy = "line"
) -> list[Source]:
    """The files that paths, directories and glob patterns name; what a pattern or a directory holds is sorted.

    Of a directory, all files with a known suffix are taken, at any depth; a directory that `datasets` saved gives the
    Arrow files of its dataset, and `hf://NAME` those that `datasets` downloads. What this project writes beside text
    (manifests, tokenizers, prepared text) is taken only where it is named itself.

    Raises:
        UserError: nothing matches, or a file's format is not told by its name.
    """
    sources = []
    for pattern in patterns:
        if pattern.startswith(HUB_PREFIX):
            from megatron.core.datasets.table_reader import hub_files

            sources += [Source(path, "arrow", path.stat().st_size) for path in hub_files(pattern)]
            continue
        paths = [pattern] if Path(pattern).exists() else _matches(pattern)
        if not paths:
            raise UserError(f"--input {pattern}: no such file")
        for path in map(Path, paths):
            if not path.is_dir():
                sources.append(_source(path, input_format, sample_by))
            elif (saved := _saved_by_datasets(path)) is not None:
                sources += [_source(file, "arrow", sample_by) for file in saved]
            else:
                sources += [_source(file, input_format, sample_by) for file in _files_under(path)]
    return sources


def _source(path: Path, input_format: InputFormat, sample_by: SampleBy) -> Source:
    kind = input_format if input_format != "auto" else _format_of(path)
    if kind is None:
        raise UserError(
            f"--input {path}: its name ends in none of {' '.join(_FORMATS)} (text with .gz or .zst or without); "
            "give --input-format jsonl, text, parquet or arrow"
        )
    assert kind != "auto"
    try:
        return Source(path, sample_by if kind == "text" else kind, path.stat().st_size)
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror}") from None


def _format_of(path: Path) -> InputFormat | None:
    if path.suffix in _COMPRESSIONS:
        found = _FORMATS.get(Path(path.stem).suffix)
        return found if found in ("jsonl", "text") else None
    return _FORMATS.get(path.suffix)


def _matches(pattern: str) -> list[str]:
    """What a pattern matches, sorted, without what is our own below its first star."""
    given = Path(pattern).parts
    fixed = next(n for n, part in enumerate((*given, "*")) if glob.has_magic(part))
    owned: dict[Path, bool] = {}  # by directory, of which files share many

    def is_ours(path: Path) -> bool:
        if len(path.parts) <= fixed:
            return False
        if path not in owned:
            owned[path] = is_ours(path.parent) or _is_own_directory(path)
        return owned[path]

    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too
    return [name for name in found if not is_ours(Path(name)) and not _is_manifest(Path(name))]


def _files_under(directory: Path) -> list[Path]:
    """Files of a known format, at any depth, sorted; hidden ones and those of our own datasets are none."""
    files = [path for path in _walk(directory, set()) if _format_of(path) is not None and not _is_manifest(path)]
    if not files:
        raise UserError(f"--input {directory}: no file in this directory ends in one of {' '.join(_FORMATS)}")
    return files


def _walk(directory: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Files, through symbolic links too; each directory once, however many links lead to it or back to it."""
    status = directory.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not _is_own_directory(path):
                yield from _walk(path, seen)
        elif path.is_file():
            yield path


def _is_own_directory(path: Path) -> bool:
    """Whether a directory is a tokenizer or a cache that was written beside data."""
    if not path.is_dir():
        return False
    if _OWN_DIRECTORY.fullmatch(path.name):
        return True
    try:
        return path.name.endswith("_tokenizer") and saved_config(path) is not None
    except UserError:  # a damaged file, of whomever
        return False


def _is_manifest(path: Path) -> bool:
    return path.suffix == ".json" and manifest_format(path) is not None


def _saved_by_datasets(directory: Path) -> list[Path] | None:
    """Files of a directory that `Dataset.save_to_disk` wrote, in order; None: it is none.

    Raises:
        UserError: it is a `DatasetDict`, of which one has to be chosen, or damaged.
    """
    if (directory / "dataset_dict.json").is_file():
        splits = _json_of(directory / "dataset_dict.json").get("splits")
        choices = " ".join(str(directory / str(split)) for split in splits) if isinstance(splits, list) else ""
        raise UserError(f"--input {directory} holds several datasets; name those to take: {choices}")
    if not (directory / "state.json").is_file() or not (directory / "dataset_info.json").is_file():
        return None
    listed = _json_of(directory / "state.json").get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"--input {directory}: its state.json lists no Arrow files; save the dataset again")
    return [directory / str(name) for name in names]


def _json_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return found if isinstance(found, dict) else {}
