"""Reads text corpora: JSON lines and plain text, plain or compressed with gzip or Zstandard, and tables of Arrow.

Files are cut into chunks of whole records by their bytes alone, so that the chunks, and all that is computed from
them, are the same for any number of workers. Reading needs the memory of one chunk or of the longest record. A file
can be read from the end of any chunk on. Tables (Parquet, Arrow) are read in `table_reader.py`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from megatron.core.datasets.corpus_sources import (
    START,
    Chunk,
    InputFormat,
    Position,
    Record,
    SampleBy,
    Source,
    UnreadableError,
    find_sources,
)
from megatron.core.errors import one_line

__all__ = [
    "START",
    "Chunk",
    "InputFormat",
    "Position",
    "Record",
    "RecordError",
    "SampleBy",
    "Source",
    "find_sources",
    "parse_object",
    "parse_records",
    "read_chunks",
    "text_of",
    "value_under",
]

CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


def read_chunks(
    source: Source, chunk_bytes: int = CHUNK_BYTES, start: Position = START, keys: Sequence[str] = ()
) -> Iterator[Chunk]:
    """Chunks of a file in order, of about `chunk_bytes` decompressed bytes each, more where one record is longer.

    A file that ends early or is damaged yields its whole records as far as they can be read, then a chunk without
    data that carries the error.

    Args:
        source: The file.
        chunk_bytes: Least size of a chunk.
        start: `Chunk.end` of the chunk to go on after; compressed files are decompressed up to there again.
        keys: Columns to read; for tables only.
    """
    if source.records in ("parquet", "arrow"):
        from megatron.core.datasets.table_reader import read_table_chunks

        yield from read_table_chunks(source, chunk_bytes, start, keys)
        return
    (offset, line), bytes_read, error = start, 0, None
    rest = bytearray()  # which grows in place: a record of many blocks is not copied again for each of them

    def take(end: int, error: str | None = None) -> Chunk:
        nonlocal offset, line
        data, first_line = bytes(rest[:end]), line
        del rest[:end]
        data = data if offset else data.removeprefix(_BOM)
        offset, line = offset + end, line + data.count(b"\n")
        return Chunk(str(source.path), source.records, first_line, data, bytes_read, error, Position(offset, line))

    try:
        for block, bytes_read in _blocks(source, chunk_bytes, start.offset):  # noqa: B007 - `take` reads it
            searched = len(rest)
            rest += block
            if end := _end_of_records(rest, searched, source.records):
                yield take(end)
    except UnreadableError as reason:
        error = str(reason)
        rest.clear()  # A record cut in two is worse than none.
    if rest or error:
        yield take(len(rest), error)


def _blocks(source: Source, block_bytes: int, skip: int) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks of at least `block_bytes` but for the last one, and the file position after each.

    The first `skip` decompressed bytes are left out.
    """
    import zstandard

    parts: list[bytes] = []
    size, position, failure = 0, 0, None
    try:
        with source.path.open("rb") as file:
            for part in _decompressed(file, source.path.suffix, block_bytes, skip):
                parts.append(part)
                size += len(part)
                position = file.tell() if file.seekable() else 0  # pipes do not say
                if size >= block_bytes:
                    yield b"".join(parts), position
                    parts, size = [], 0
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, MemoryError) as error:
        failure = error
    if parts:
        yield b"".join(parts), position
    if failure is not None:
        reason = getattr(failure, "strerror", None) or str(failure) or type(failure).__name__
        raise UnreadableError(one_line(reason)) from failure


def _decompressed(file: BinaryIO, suffix: str, part_bytes: int, skip: int) -> Iterator[bytes]:
    """Content of a file in parts, without its first `skip` bytes; raises when compressed data end early."""
    if suffix == ".zst":
        parts = _zstandard_parts(file)
    elif suffix == ".gz":
        parts = _gzip_parts(file, part_bytes)
    else:
        if skip:
            file.seek(skip)
        while part := file.read(part_bytes):
            yield part
        return
    for part in parts:
        if skip < len(part):
            yield part[skip:]
        skip = max(skip - len(part), 0)


def _gzip_parts(file: BinaryIO, part_bytes: int) -> Iterator[bytes]:
    # read1: a larger read would lose what came before the damage.
    with gzip.GzipFile(fileobj=file) as stream:
        while part := stream.read1(part_bytes):
            yield part


def _zstandard_parts(file: BinaryIO) -> Iterator[bytes]:
    """Content of a Zstandard file of any number of frames; the package's reader takes a truncated file for whole."""
    import zstandard

    frame = None
    pending = b""
    while pending or (pending := file.read(1 << 17)):
        if frame is None:
            frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        if part := frame.decompress(pending):
            yield part
        pending = b""
        if frame.eof:
            pending, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("Compressed file ended before the end of its last frame")


def _end_of_records(data: bytearray, searched: int, records: str) -> int:
    """Where the last whole record of `data` ends, 0 when there is none; none ends before `searched`."""
    if records == "document":
        return 0
    if records == "paragraph":
        # A blank line that ends in the new bytes begins at the last line end of the old ones or later.
        start = max(data.rfind(b"\n", 0, searched), 0)
        return max((match.end() for match in _BLANK_LINE.finditer(data, start)), default=0)
    return data.rfind(b"\n", searched) + 1


def parse_records(chunk: Chunk, keys: Sequence[str]) -> Iterator[Record]:
    """The records of a chunk. Blank lines are no records.

    Args:
        chunk: Whole records.
        keys: Keys of the texts in JSON lines, or columns of tables; plain text gives the same text for each.
    """
    if chunk.records in ("parquet", "arrow"):
        from megatron.core.datasets.table_reader import parse_table

        yield from parse_table(chunk, keys)
        return
    if chunk.records == "jsonl":
        for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
            if line and not line.isspace():
                yield _parse_json(number, line, keys)
        return
    if chunk.records == "line":
        pieces: Iterator[tuple[int, bytes]] = iter(enumerate(chunk.data.split(b"\n"), start=chunk.first_line))
    elif chunk.records == "paragraph":
        pieces = _paragraphs(chunk)
    else:
        pieces = iter([(chunk.first_line, chunk.data)])
    for number, piece in pieces:
        if piece and not piece.isspace():
            try:
                yield Record(number, [piece.decode().replace("\r\n", "\n").strip("\r\n")] * len(keys))
            except UnicodeDecodeError as error:
                yield Record(number, [], "invalid UTF-8", _bad_byte(error))


def _paragraphs(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """Runs of lines that are not blank, with the number of their first line."""
    lines: list[bytes] = []
    start = chunk.first_line
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
        if line and not line.isspace():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, b"\n".join(lines)
            lines = []
    if lines:
        yield start, b"\n".join(lines)


def _parse_json(number: int, line: bytes, keys: Sequence[str]) -> Record:
    try:
        value = parse_object(line, keys[0])
        return Record(number, [text_of(value_under(value, key, "--json-keys"), key) for key in keys])
    except RecordError as error:
        return Record(number, [], error.reason, error.detail)


class RecordError(Exception):
    """A line cannot be used.

    Attributes:
        reason: Kind of the error.
        detail: What is wrong with this line.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def parse_object(line: bytes, key: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        RecordError: there is none; the message names `key` as what such an object would have.
    """
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RecordError("invalid UTF-8", _bad_byte(error)) from None
    except json.JSONDecodeError as error:
        raise RecordError("invalid JSON", f"invalid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting of thousands of levels
        raise RecordError("invalid JSON", f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RecordError("not a JSON object", f"a JSON {_json_type(value)}, expected an object with {key!r}")
    return value


def value_under(value: dict[str, Any], key: str, flag: str) -> Any:
    """What stands under `key`, which `flag` names.

    Raises:
        RecordError: there is nothing.
    """
    if key not in value:
        found = ", ".join(map(repr, list(value)[:5])) or "none"
        raise RecordError(f"no key {key!r}", f"no key {key!r} (keys: {found}); see {flag}")
    return value[key]


def text_of(value: Any, key: str) -> str:
    """The value as text.

    Raises:
        RecordError: it is none; the message names `key` as its place.
    """
    if not isinstance(value, str):
        raise RecordError(f"{key!r} is not a string", f"{key!r} is a JSON {_json_type(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        detail = f"{key!r} has an unpaired surrogate escape (\\ud800-\\udfff)"
        raise RecordError("unpaired surrogate", detail) from None
    return value


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at column {error.start + 1}"


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
