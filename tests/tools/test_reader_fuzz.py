"""Whatever bytes a file holds, reading gives records or reasons, never an exception; cutting it changes nothing."""

from __future__ import annotations

import gzip
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from megatron.core.datasets.corpus_reader import find_sources, parse_records, read_chunks

KEYS = ["text", "title"]
FUZZ_S = float(os.environ.get("FUZZ_SECONDS", "60"))  # of the slow test
DEADLINE = timedelta(seconds=20)  # of one file

PIECES = st.sampled_from(
    [
        b"\n",
        b"\r\n",
        b"\r",
        b"\n\n",
        b" \t\n",
        b"\0",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\\ud800",
        b'{"text": "a", "title": "b"}\n',
        b'{"text": "',
        b'"}',
        b'{"text": null, "title": 1}',
        b"[" * 2000,
        b"9" * 5000,
        b'{"text": ' + b"[" * 1500,
        b"NaN",
        b"Infinity",
        b"-",
        b"1e999",
        b'"\\u0000"',
        b"{}",
        b"true",
        b"PAR1",
        b"ARROW1\0\0",
        b"\x1f\x8b",
        b"\x28\xb5\x2f\xfd",
        "\u2028\x85".encode(),
        b'{"text": "a", "text": "c", "title": ""}\n',
    ]
)
CONTENT = st.lists(st.one_of(PIECES, st.binary(max_size=40)), max_size=25).map(b"".join)
NAMES = st.sampled_from(["in.jsonl", "in.txt", "in.jsonl.gz", "in.txt.zst", "in.jsonl.zst", "in.parquet", "in.arrow"])


def damaged(content: bytes, name: str, cut: int | None, flipped: int | None, packed: bool) -> bytes:
    if packed and name.endswith(".gz"):
        content = gzip.compress(content)
    elif packed and name.endswith(".zst"):
        content = zstandard.compress(content)
    elif packed and name.endswith((".parquet", ".arrow")):
        content = table_bytes(content, name)
    if cut is not None:
        content = content[: cut % (len(content) + 1)]
    if flipped is not None and content:
        place = flipped % len(content)
        content = content[:place] + bytes([content[place] ^ (1 + flipped % 255)]) + content[place + 1 :]
    return content


def table_bytes(content: bytes, name: str) -> bytes:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    rows = content.split(b"\n")
    strings = pyarrow.array(rows, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": strings, "title": list(range(len(rows)))})
    sink = pyarrow.BufferOutputStream()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, sink, row_group_size=5)
    else:
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, 7)
    return bytes(sink.getvalue().to_pybytes())


def records_of(source: Any, chunk_bytes: int, **start: Any) -> tuple[list[Any], list[Any]]:
    chunks = list(read_chunks(source, chunk_bytes, keys=KEYS, **start))
    return chunks, [record for chunk in chunks for record in parse_records(chunk, KEYS)]


def check(folder: Path, content: bytes, name: str, sample_by: Any, chunk_bytes: int) -> None:
    path = folder / name
    path.write_bytes(content)
    (source,) = find_sources([str(path)], sample_by=sample_by)
    chunks, records = records_of(source, chunk_bytes)
    for record in records:
        assert (record.reason is None) == (len(record.texts) == len(KEYS)), record
        assert record.line >= 1 and "\n" not in record.detail
        assert all(text.encode() is not None for text in record.texts)
    assert all("\n" not in (chunk.error or "") for chunk in chunks)
    assert [record.line for record in records] == sorted(record.line for record in records)
    if source.records not in ("parquet", "arrow"):
        others, found = records_of(source, 1 << 20)  # chunks of another size
        # How much of a damaged compressed file comes out before the damage is seen depends on the reads.
        same = min(len(found), len(records)) if any(chunk.error for chunk in [*chunks, *others]) else None
        assert found[:same] == records[:same]
    if chunks and chunks[0].error is None:  # as --resume goes on
        behind = [record for chunk in chunks[1:] for record in parse_records(chunk, KEYS)]
        assert records_of(source, chunk_bytes, start=chunks[0].end)[1] == behind


ARGUMENTS: dict[str, Any] = {
    "content": CONTENT,
    "name": NAMES,
    "sample_by": st.sampled_from(["line", "paragraph", "document"]),
    "chunk_bytes": st.sampled_from([1, 3, 50, 1000]),
    "cut": st.none() | st.integers(0, 1 << 16),
    "flipped": st.none() | st.integers(0, 1 << 16),
    "packed": st.booleans(),
}


def trial(folder: Path, content: bytes, name: str, sample_by: Any, chunk_bytes: int, **damage: Any) -> None:
    check(folder, damaged(content, name, **damage), name, sample_by, chunk_bytes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(**ARGUMENTS)
def test_any_bytes(folder: Path, **arguments: Any) -> None:
    pytest.importorskip("pyarrow")
    trial(folder, **arguments)


@pytest.mark.slow
@pytest.mark.timeout(FUZZ_S + 300)
def test_any_bytes_for_long(folder: Path) -> None:
    """Runs for FUZZ_SECONDS seconds."""
    import time

    end = time.monotonic() + FUZZ_S
    number = 0
    while time.monotonic() < end:

        @seed(time.time_ns())
        @settings(
            max_examples=500, deadline=timedelta(seconds=20), suppress_health_check=list(HealthCheck), database=None
        )
        @given(**ARGUMENTS)
        def some(**arguments: Any) -> None:
            if time.monotonic() < end:
                trial(folder, **arguments)

        some()
        number += 500
    print(f"{number} files")
