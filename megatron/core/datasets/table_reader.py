"""Reads the texts of tables: Parquet, Arrow files, and what the package `datasets` keeps, which is Arrow files.

Rows travel to the workers as Arrow's own bytes, with the columns of the texts only. One batch of rows is in memory at
a time, and the pages of Parquet that it lies in. Needs the package pyarrow, which is imported when a table is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.core.datasets.corpus_sources import (
    HUB_PREFIX,
    Chunk,
    Position,
    Record,
    Source,
    UnreadableError,
)
from megatron.core.errors import UserError, one_line

_MAX_ROWS = 65536
_FILE_MAGIC = b"ARROW1"  # of Arrow files that list their batches; those without are streams


def import_pyarrow() -> Any:
    """The package pyarrow, with the modules that read files.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "--input: Parquet and Arrow files need the package pyarrow, which is not installed; "
            "install it (pip install 'megatron-t5[parquet]'), or convert the files to JSON lines"
        ) from None
    return pyarrow


def hub_files(address: str) -> list[Path]:
    """Arrow files of `hf://NAME[:CONFIGURATION][@SPLIT]` (split: train), downloaded or from its cache.

    Raises:
        UserError: `datasets` is not installed or cannot load this, or a part of a split is asked for.
    """
    name, _, split = address.removeprefix(HUB_PREFIX).partition("@")
    name, _, configuration = name.partition(":")
    if not name or "[" in split:
        raise UserError(f"--input {address}: write hf://NAME, hf://NAME:CONFIGURATION or hf://NAME@SPLIT, whole splits")
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--input {address} needs the package datasets, which is not installed; install it, or give files"
        ) from None
    try:
        loaded: Any = datasets.load_dataset(name, configuration or None, split=split or "train")
        files = [Path(file["filename"]) for file in loaded.cache_files]
    except Exception as error:  # of the package, of the network, of what runs there
        raise UserError(f"--input {address} cannot be loaded: {one_line(error)[:300]}") from error
    if not files:
        raise UserError(f"--input {address}: no files, the dataset is empty")
    return files


def read_table_chunks(source: Source, chunk_bytes: int, start: Position, keys: Sequence[str]) -> Iterator[Chunk]:
    """Chunks of the rows of a table; see `corpus_reader.read_chunks`. Positions count rows."""
    pyarrow = import_pyarrow()
    row, error = start.offset, None
    try:
        for batch, share in _batches(pyarrow, source, chunk_bytes, row, keys):
            for part in _cut(batch, chunk_bytes):
                first, row = row, row + part.num_rows
                sink = pyarrow.BufferOutputStream()
                with pyarrow.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
                data = sink.getvalue().to_pybytes()
                end = Position(row, row + 1)
                yield Chunk(str(source.path), source.records, first + 1, data, int(share * source.size), None, end)
    except UnreadableError as reason:
        error = str(reason)
    if error is not None:
        end = Position(row, row + 1)
        yield Chunk(str(source.path), source.records, row + 1, b"", source.size, error, end)


def _batches(
    pyarrow: Any, source: Source, chunk_bytes: int, skip: int, keys: Sequence[str]
) -> Iterator[tuple[Any, float]]:
    """Record batches from row `skip` on, and how much of the file has been read after each."""
    read = _parquet_batches if source.records == "parquet" else _arrow_batches
    batches = read(pyarrow, source.path, chunk_bytes, skip, keys)
    while True:
        try:
            found = next(batches, None)
            if found is not None:
                found = _checked(pyarrow, found[0]), found[1]
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreadableError(one_line(reason)[:300]) from error
        if found is None:
            return
        yield found


def _checked(pyarrow: Any, batch: Any) -> Any:
    """The batch, whose offsets are known to lie in its buffers: Arrow trusts them, and damage would be a crash.

    Strings become bytes, since one that is no UTF-8 is the fault of its row and not of the batch.
    """
    columns = []
    for column in batch.columns:
        if pyarrow.types.is_string(column.type):
            column = column.view(pyarrow.binary())
        elif pyarrow.types.is_large_string(column.type):
            column = column.view(pyarrow.large_binary())
        column.validate(full=True)
        columns.append(column)
    return pyarrow.RecordBatch.from_arrays(columns, batch.schema.names) if columns else batch


def _parquet_batches(
    pyarrow: Any, path: Path, chunk_bytes: int, skip: int, keys: Sequence[str]
) -> Iterator[tuple[Any, float]]:
    # Without pre-buffering and with a small buffer, pages are read as they are needed, not whole row groups.
    options = {"buffer_size": 1 << 20, "pre_buffer": False, "page_checksum_verification": True}
    with pyarrow.parquet.ParquetFile(path, **options) as file:
        metadata, done = file.metadata, 0
        columns = [name for name in file.schema_arrow.names if name in keys]
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if skip >= rows:
                skip, done = skip - rows, done + rows
                continue
            size = max(metadata.row_group(group).total_byte_size, 1)
            batch_rows = min(max(chunk_bytes * rows // size, 1), _MAX_ROWS)
            if not columns:  # then every row is told to lack its key
                batches: Any = [_without_columns(pyarrow, rows)]
            else:
                batches = file.iter_batches(batch_rows, row_groups=[group], columns=columns, use_threads=False)
            for batch in batches:
                done += batch.num_rows
                if skip < batch.num_rows:
                    yield batch.slice(skip), done / max(metadata.num_rows, 1)
                skip = max(skip - batch.num_rows, 0)


def _without_columns(pyarrow: Any, rows: int) -> Any:
    return pyarrow.RecordBatch.from_struct_array(pyarrow.array([{}] * rows, pyarrow.struct([])))


def _arrow_batches(
    pyarrow: Any, path: Path, chunk_bytes: int, skip: int, keys: Sequence[str]
) -> Iterator[tuple[Any, float]]:
    with pyarrow.OSFile(str(path)) as file:  # not mapped: a file that shrinks meanwhile would be a crash
        if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            opened = pyarrow.ipc.open_file(file)
            batches = (opened.get_batch(n) for n in range(opened.num_record_batches))
        else:
            file.seek(0)
            batches = iter(pyarrow.ipc.open_stream(file))
        for batch in batches:
            batch = batch.select([name for name in batch.schema.names if name in keys])
            if skip < batch.num_rows:
                yield batch.slice(skip), min(file.tell() / max(file.size(), 1), 1.0)
            skip = max(skip - batch.num_rows, 0)


def _cut(batch: Any, chunk_bytes: int) -> Iterator[Any]:
    """Parts of a batch of about `chunk_bytes`, on average."""
    rows = min(max(batch.num_rows * chunk_bytes // max(batch.nbytes, 1), 1), _MAX_ROWS)
    return (batch.slice(first, rows) for first in range(0, batch.num_rows, rows))


def parse_table(chunk: Chunk, keys: Sequence[str]) -> Iterator[Record]:
    """The records of a chunk of a table, as `corpus_reader.parse_records` gives them."""
    if not chunk.data:
        return
    pyarrow = import_pyarrow()
    batch = pyarrow.ipc.open_stream(chunk.data).read_next_batch()
    names = batch.schema.names
    missing = next((key for key in keys if key not in names), None)
    if missing is not None:
        detail = f"no column {missing!r}; see --json-keys"
        for row in range(batch.num_rows):
            yield Record(chunk.first_line + row, [], f"no column {missing!r}", detail)
        return
    columns = [_texts(pyarrow, batch.column(names.index(key))) for key in keys]
    for row, values in zip(itertools.count(chunk.first_line), zip(*columns, strict=True)):
        yield _record(row, values, keys)


def _texts(pyarrow: Any, column: Any) -> list[Any]:
    """Values of a column; texts as bytes."""
    kinds = pyarrow.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kinds.is_string_view(column.type):
        column = column.cast(pyarrow.large_string())
    if kinds.is_string(column.type) or kinds.is_large_string(column.type):  # of a dictionary or a view
        column = column.cast(pyarrow.large_binary())
    if not (kinds.is_binary(column.type) or kinds.is_large_binary(column.type) or kinds.is_null(column.type)):
        return [_NotText(str(column.type))] * len(column)
    values: list[Any] = column.to_pylist()
    return values


class _NotText:
    """Stands for a value of another type than text."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


def _record(row: int, values: Sequence[Any], keys: Sequence[str]) -> Record:
    texts = []
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, bytes):
            kind = value.kind if isinstance(value, _NotText) else "null"
            return Record(row, [], f"{key!r} is not a string", f"{key!r} is of type {kind}, not a string")
        try:
            texts.append(value.decode())
        except UnicodeDecodeError as error:
            wrong = f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
            return Record(row, [], "invalid UTF-8", f"{key!r} has {wrong}")
    return Record(row, texts)
