"""The indexed dataset: round trips, byte compatibility with Megatron-LM, damage, and publishing."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.datasets import indexed_writer
from megatron.core.datasets.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    manifest_path,
    optimal_dtype,
    remove_dataset,
    resolve_prefix,
)
from megatron.core.datasets.indexed_writer import WriterState
from megatron.core.errors import UserError
from tests.megatron_oracle import run_megatron

DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16"]
# Documents as lists of sequences; one has an empty sequence, one has none.
DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [[7, 8, 9, 10], [], [11]], [], [[12]]]


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16", manifest: dict | None = None) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document([i for sequence in document for i in sequence], [len(s) for s in document])
        writer.finalize(manifest)
    return prefix


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# --- round trips ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 100), max_size=5), max_size=3), min_size=1, max_size=8),
    dtype=st.sampled_from(DTYPES),
)
def test_reader_returns_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: str
) -> None:
    sequences = [sequence for document in documents for sequence in document]
    prefix = tmp_path_factory.mktemp("data") / "a.b"  # a dot in the name is not a suffix
    if not any(sequences):
        with pytest.raises(UserError, match="empty corpus"):
            write(prefix, documents, dtype)
        assert names(prefix.parent) == set()
        return
    dataset = IndexedDataset(write(prefix, documents, dtype))
    assert dataset.dtype == np.dtype(dtype) and dataset.manifest is None
    assert [list(map(int, sequence)) for sequence in dataset] == sequences
    assert (len(dataset), dataset.num_documents) == (len(sequences), len(documents))
    assert dataset.num_tokens == dataset.tokens.size == sum(map(len, sequences))
    offset = 0
    for number, document in enumerate(documents):
        assert dataset.document_start(number) == offset
        offset += sum(map(len, document))
    assert dataset.document_start(len(documents)) == offset == dataset.num_tokens


def test_reader_arrays_are_read_only_and_it_can_be_pickled(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", DOCUMENTS))
    for array in (dataset.tokens, dataset.sequence_lengths, dataset.sequence_pointers, dataset.document_indices):
        assert not array.flags.writeable and not array.flags.owndata
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again.tokens, dataset.tokens)
    assert list(dataset[-1]) == [12]
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    with pytest.raises(IndexError):
        dataset.document_start(dataset.num_documents + 1)


def test_add_documents_and_add_dataset_equal_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_writer, "_BLOCK", 2)  # several blocks even for these few sequences
    first = write(tmp_path / "first", DOCUMENTS)
    second = write(tmp_path / "second", [[[5]], [[6, 7]], [[]]])
    with IndexedDatasetWriter(tmp_path / "joined", "uint16") as writer:
        writer.add_dataset(IndexedDataset(first))
        writer.add_documents([5, 6, 7], [1, 2, 0])
        writer.finalize()
    write(tmp_path / "plain", [*DOCUMENTS, [[5]], [[6, 7]], [[]]])
    with IndexedDatasetWriter(tmp_path / "merged", "uint16") as writer:
        writer.add_dataset(IndexedDataset(first))
        writer.add_dataset(IndexedDataset(second))
        writer.finalize()
    for suffix in (".bin", ".idx"):
        plain = (tmp_path / f"plain{suffix}").read_bytes()
        assert (tmp_path / f"joined{suffix}").read_bytes() == plain
        assert (tmp_path / f"merged{suffix}").read_bytes() == plain
    with (
        IndexedDatasetWriter(tmp_path / "x", "int32") as writer,
        pytest.raises(UserError, match="uint16 ids, expected"),
    ):
        writer.add_dataset(IndexedDataset(first))


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2]], [[3], [4]]], "int32")
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 3, 3) + struct.pack("<3i3q3q", 2, 1, 1, 0, 8, 12, 0, 1, 3)
    assert idx_path(tmp_path / "a").read_bytes() == index
    assert bin_path(tmp_path / "a").read_bytes() == struct.pack("<4i", 1, 2, 3, 4)


def test_multimodal_modes_are_accepted(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    plain = IndexedDataset(prefix)
    with idx_path(prefix).open("ab") as file:
        file.write(bytes(plain.num_sequences))
    assert [list(s) for s in IndexedDataset(prefix)] == [list(s) for s in plain]


def test_optimal_dtype_is_megatrons_rule() -> None:
    assert [optimal_dtype(n).name for n in (384, 65499, 65500, 250100)] == ["uint16", "uint16", "int32", "int32"]


# --- Megatron-LM as oracle -----------------------------------------------------------------------------------------

ORACLE = """
import sys, json, numpy, torch
from pathlib import Path
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
folder, documents = Path(sys.argv[1]), json.loads(sys.argv[2])
read = {}
for name in json.loads(sys.argv[3]):
    builder = IndexedDatasetBuilder(str(folder / f"theirs_{name}.bin"), dtype=getattr(numpy, name))
    for document in documents:
        builder.add_document(torch.tensor(sum(document, [])), [len(s) for s in document])
    builder.finalize(str(folder / f"theirs_{name}.idx"))
    ours = IndexedDataset(str(folder / f"ours_{name}"))
    read[name] = [[s.tolist() for s in ours[0:len(ours)]], ours.document_indices.tolist(), str(ours.index.dtype)]
builder = IndexedDatasetBuilder(str(folder / "joined.bin"), dtype=numpy.int32)
builder.add_index(str(folder / "theirs_int32")); builder.add_index(str(folder / "ours_int32"))
builder.finalize(str(folder / "joined.idx"))
print(json.dumps(read))
"""


def test_files_equal_megatrons_in_both_directions(tmp_path: Path) -> None:
    for dtype in DTYPES:
        write(tmp_path / f"ours_{dtype}", DOCUMENTS, dtype)
    read = json.loads(run_megatron(ORACLE, tmp_path, json.dumps(DOCUMENTS), json.dumps(DTYPES)))
    sequences = [sequence for document in DOCUMENTS for sequence in document]
    for dtype in DTYPES:
        found, document_indices, found_dtype = read[dtype]
        assert found == sequences and document_indices == [0, 1, 3, 6, 6, 7] and dtype in found_dtype
        for suffix in (".bin", ".idx"):
            theirs = (tmp_path / f"theirs_{dtype}{suffix}").read_bytes()
            assert (tmp_path / f"ours_{dtype}{suffix}").read_bytes() == theirs
        assert [list(s) for s in IndexedDataset(tmp_path / f"theirs_{dtype}")] == sequences
    with IndexedDatasetWriter(tmp_path / "together", "int32") as writer:
        writer.add_dataset(IndexedDataset(tmp_path / "theirs_int32"))
        writer.add_dataset(IndexedDataset(tmp_path / "ours_int32"))
        writer.finalize()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"together{suffix}").read_bytes() == (tmp_path / f"joined{suffix}").read_bytes()


# --- damage --------------------------------------------------------------------------------------------------------


def refused(prefix: Path, *expected: str) -> None:
    """Opening, or reading any document, gives one line that holds all of `expected`."""
    with pytest.raises(UserError) as caught:
        dataset = IndexedDataset(prefix)
        for document in range(dataset.num_documents + 1):
            dataset.document_start(document)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(prefix), *expected):
        assert part in message, message


def test_names_that_are_not_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    folder.mkdir()
    assert [list(ids) for ids in IndexedDataset(write(folder / "data", [[[1, 2]]]))] == [[1, 2]]
    with pytest.raises(UserError, match="missing; check the prefix"):
        IndexedDataset(folder / "none")


def test_missing_files(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none.idx is missing", "preprocess")
    prefix = write(tmp_path / "a", DOCUMENTS)
    bin_path(prefix).rename(tmp_path / "away")
    refused(prefix, "a.bin cannot be read", "a.idx exists")
    (tmp_path / "away").rename(bin_path(prefix))
    idx_path(prefix).unlink()
    refused(prefix, "a.idx is missing beside", "did not finish")


def test_truncated_or_grown_files(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    generator = random.Random(0)
    for path in (idx_path(prefix), bin_path(prefix)):
        whole = path.read_bytes()
        sizes = {0, 1, 8, 9, 16, 17, 18, 25, 26, 33, 34, len(whole) - 1, *generator.choices(range(len(whole)), k=20)}
        for size in sorted(size for size in sizes if size < len(whole)):
            path.write_bytes(whole[:size])
            refused(prefix, str(size), "expected")
        path.write_bytes(whole + b"\x00")
        refused(prefix, str(len(whole) + 1), str(len(whole)))
        path.write_bytes(whole)
    IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("offset", "content", "expected"),
    [
        (0, b"XMIDIDX\x00\x00", ["XMIDIDX", "MMIDIDX"]),
        (9, struct.pack("<Q", 2), ["version 2", "expected 1"]),
        (17, b"\x09", ["dtype code 9", "[1, 2, 3, 4, 5, 8]"]),
        (17, b"\x07", ["float32", "must be integers"]),
        (17, b"\x04", ["24 bytes", "expected 26"]),
        (18, struct.pack("<Q", 1 << 60), [str(1 << 60)]),
        (26, struct.pack("<Q", 0), ["no document index"]),
        (34 + 4 * 7, struct.pack("<q", 8), ["sequence 0 starts at byte 8", "expected byte 0"]),
        (34 + 12 * 7, struct.pack("<q", 1), ["documents cover sequences 1 to 7", "0 to 7"]),
        (34 + 12 * 7 + 8, struct.pack("<q", 99), ["documents around 1 start at sequences 0, 99, 3", "0 to 7"]),
        (34 + 12 * 7 + 8, struct.pack("<q", -1), ["documents around 0 start at sequences 0, -1,"]),
        (34 + 4 * 7 + 8, struct.pack("<q", 4), ["sequence 1 starts at byte 4", "byte 6"]),
        (34 + 12 * 7 + 40, struct.pack("<q", 6), ["documents cover sequences 0 to 6"]),
    ],
)
def test_damaged_index(tmp_path: Path, offset: int, content: bytes, expected: list[str]) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)  # 7 sequences, 12 ids, 24 bytes
    whole = bytearray(idx_path(prefix).read_bytes())
    whole[offset : offset + len(content)] = content
    idx_path(prefix).write_bytes(whole)
    refused(prefix, *expected)


def test_no_bit_flip_of_the_index_gives_wrong_tokens(tmp_path: Path) -> None:
    """Each flip is refused, or moves a document border to another sequence between its neighbours."""
    prefix = write(tmp_path / "a", DOCUMENTS)
    whole = idx_path(prefix).read_bytes()
    documents_at = 34 + 12 * 7
    for bit in (8 * byte + bit for byte in range(len(whole)) for bit in (0, 3, 7)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        idx_path(prefix).write_bytes(flipped)
        try:
            dataset = IndexedDataset(prefix)
            starts = [dataset.document_start(n) for n in range(dataset.num_documents + 1)]
            sequences = [list(sequence) for sequence in dataset]
        except UserError:
            continue
        assert bit // 8 >= documents_at
        assert sequences == [s for document in DOCUMENTS for s in document]
        assert all(0 <= start <= 12 for start in starts)


def test_no_bit_flip_moves_a_document_border_of_data_that_has_a_manifest(tmp_path: Path) -> None:
    """One sequence a document, as all preprocessing writes it: then the borders are known."""
    prefix = write(tmp_path / "a", [[[n]] for n in range(6)], manifest={})
    whole = idx_path(prefix).read_bytes()
    for bit in range(8 * (34 + 12 * 6), 8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        idx_path(prefix).write_bytes(flipped)
        refused(prefix, "a.idx is damaged")


def test_bin_of_another_index(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", DOCUMENTS), write(tmp_path / "other", [[[1]]])
    bin_path(other).replace(bin_path(one))
    refused(one, "2 bytes, expected 24")


def test_empty_dataset_of_megatron(tmp_path: Path) -> None:
    bin_path(tmp_path / "a").write_bytes(b"")
    idx_path(tmp_path / "a").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 0, 1) + bytes(8))
    refused(tmp_path / "a", "empty corpus")


def test_manifest_of_other_data(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS, manifest={"append_eod": True})
    manifest = IndexedDataset(prefix).manifest
    assert manifest is not None
    assert {key: manifest[key] for key in ("dtype", "num_tokens", "num_sequences", "num_documents", "bin_bytes")} == {
        "dtype": "uint16", "num_tokens": 12, "num_sequences": 7, "num_documents": 5, "bin_bytes": 24,
    }  # fmt: skip
    assert manifest["append_eod"] is True
    assert manifest["files"]["bin"] == {"bytes": 24, "crc32": zlib.crc32(bin_path(prefix).read_bytes())}
    assert manifest["files"]["idx"] == {"bytes": 166, "crc32": zlib.crc32(idx_path(prefix).read_bytes())}
    assert manifest["one_sequence_per_document"] is False
    for change, expected in (
        ({"append_eod": False}, "damaged or was edited"),
        ({"num_tokens": 13}, "num_tokens 13, the dataset has 12"),
        ({"dtype": "int32"}, "dtype int32, the dataset has uint16"),
        ({"version": 99}, "version 99"),
        ({"format": "?"}, "not the manifest"),
    ):
        manifest_path(prefix).write_text(json.dumps(manifest | change))
        refused(prefix, expected)
    for content in ("{", "\x00", "[]", "[" * 100_000):
        manifest_path(prefix).write_text(content)
        refused(prefix, "a.json")
    manifest_path(prefix).write_text(json.dumps(manifest | {"version": 1}))  # of releases without checksums
    IndexedDataset(prefix)


def test_no_bit_flip_of_the_manifest_is_accepted(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS, manifest={"name": "\u00e9"})
    whole = manifest_path(prefix).read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest_path(prefix).write_bytes(flipped)
        with pytest.raises(UserError, match=r"a\.json"):
            IndexedDataset(prefix)


# --- writing -------------------------------------------------------------------------------------------------------


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([1, 2])
        assert names(tmp_path) == {f"a.{name}.partial" for name in ("bin", "lengths", "documents", "journal")}
        raise RuntimeError
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([1, 2])  # never finalized
    assert names(tmp_path) == set()


def test_crash_between_any_two_steps_never_leaves_a_wrong_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file operation of publishing is made to be the last; what opens then is the whole old or new dataset."""

    class Crash(BaseException):
        pass

    old, new = [[[1, 2, 3]]], [[[4]], [[5, 6]]]
    replace, unlink = Path.replace, Path.unlink
    outcomes = []
    for steps in range(10):
        prefix = tmp_path / str(steps) / "a"
        write(prefix, old, manifest={"which": "old"})
        left = steps

        def count() -> None:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1

        def counted_replace(self: Path, target: Path) -> Path:
            count()
            return replace(self, target)

        def counted_unlink(self: Path, missing_ok: bool = False) -> None:
            count()
            unlink(self, missing_ok)

        writer = IndexedDatasetWriter(prefix, "uint16", overwrite=True)
        writer.add_documents([4, 5, 6], [1, 2])
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", counted_replace)
            patch.setattr(Path, "unlink", counted_unlink)
            with suppress(Crash):
                writer.finalize({"which": "new"})
        writer.close()  # as the end of the process would; nothing is cleaned up
        try:
            dataset = IndexedDataset(prefix)
        except UserError:
            outcomes.append("refused")
            continue
        assert dataset.manifest is not None
        outcomes.append(dataset.manifest["which"])
        assert [list(s) for s in dataset] == [s for d in (old if outcomes[-1] == "old" else new) for s in d]
    assert outcomes[0] == "old" and outcomes[-1] == "new" and "refused" in outcomes
    assert sorted(outcomes, key=["old", "refused", "new"].index) == outcomes


def test_an_existing_dataset_is_replaced_only_when_asked(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[[1]]], manifest={})
    with pytest.raises(UserError, match="--overwrite"):
        IndexedDatasetWriter(prefix, "uint16")
    mapped = IndexedDataset(prefix)
    with IndexedDatasetWriter(prefix, "uint16", overwrite=True) as writer:
        writer.add_document([2, 3])
        assert list(IndexedDataset(prefix)[0]) == [1]
        writer.finalize()
    assert list(mapped.tokens) == [1]  # a reader keeps what it has mapped
    dataset = IndexedDataset(prefix)
    assert list(dataset[0]) == [2, 3] and dataset.manifest is None
    remove_dataset(prefix)
    assert names(tmp_path) == set()


def test_leftovers_of_a_killed_writer_are_no_part_of_the_next(tmp_path: Path) -> None:
    data = bin_path(write(tmp_path / "other", [[[1, 2]]]))
    before = data.read_bytes()
    (tmp_path / "a.bin.partial").hardlink_to(data)
    assert list(IndexedDataset(write(tmp_path / "a", [[[7]]])).tokens) == [7]
    assert data.read_bytes() == before
    (tmp_path / "b.bin.partial").hardlink_to(data)
    with pytest.raises(UserError, match="has other names"):
        IndexedDatasetWriter(tmp_path / "b", "uint16", state=WriterState(1, 1, 1, True, 0))
    assert data.read_bytes() == before


@pytest.mark.parametrize("prefix", ["a", "a-00000"])
def test_two_writers_of_one_prefix(tmp_path: Path, prefix: str) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as first:
        first.add_document([1])
        with pytest.raises(UserError, match="another process"):
            IndexedDatasetWriter(tmp_path / prefix, "uint16")
        first.finalize()
    assert names(tmp_path) == {"a.bin", "a.idx"}


def test_what_another_writer_put_there_is_not_published(tmp_path: Path) -> None:
    """Where the file system has no locks."""
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as first:
        first.add_document([1])
        with IndexedDatasetWriter(tmp_path / "a", "uint16", is_locked=True) as second:
            second.add_document([2, 3])
            with pytest.raises(UserError, match="replaced by another process"):
                first.finalize()
            first.discard()
            second.finalize()
    assert list(IndexedDataset(tmp_path / "a").tokens) == [2, 3]


def test_a_json_that_is_no_manifest_stays(tmp_path: Path) -> None:
    text = manifest_path(tmp_path / "a")
    text.write_text('{"text": "a megatron-t5 sharded dataset"}\n')
    with pytest.raises(UserError, match=r"a\.json is not the manifest of a dataset"):
        IndexedDatasetWriter(tmp_path / "a", "uint16", overwrite=True)
    with pytest.raises(UserError, match="is not the manifest"):
        remove_dataset(tmp_path / "a")
    assert names(tmp_path) == {"a.json"} and text.read_text().startswith('{"text"')
    with IndexedDatasetWriter(tmp_path / "b", "uint16") as writer:
        writer.add_document([1])
        manifest_path(tmp_path / "b").write_text("[]")  # while it is written
        with pytest.raises(UserError, match="is not the manifest"):
            writer.finalize({})
    assert manifest_path(tmp_path / "b").read_text() == "[]"


def test_a_full_disk_does_not_keep_a_writer_from_clearing_up(tmp_path: Path) -> None:
    """What is still in its buffer cannot be written when the file is closed."""
    writer = IndexedDatasetWriter(tmp_path / "a", "uint16")
    writer.add_document([1])
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        os.dup2(full.fileno(), writer._lengths.fileno())
    writer.discard()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("tokens", [[70000], [-1], [1.5], [[1]]])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, tokens: list) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer, pytest.raises(UserError, match="token ids"):
        writer.add_document(tokens)


def test_float_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float32"):
        IndexedDatasetWriter(tmp_path / "a", "float32")
    assert names(tmp_path) == set()


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    documents = 400_000
    tracemalloc.start()
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        block = np.ones(2000, np.uint16)
        for _ in range(documents // 1000):
            writer.add_documents(block, np.full(1000, 2))
        written = tracemalloc.get_traced_memory()[1]
        writer.finalize()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    dataset = IndexedDataset(tmp_path / "a")
    opened = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert dataset.num_documents == documents
    assert written < 1e6, "lists of 400,000 Python integers would be 12 MB and more"
    assert opened < 1e5


# --- prefixes ------------------------------------------------------------------------------------------------------


def test_resolve_prefix(tmp_path: Path) -> None:
    write(tmp_path / "a_text_document", DOCUMENTS)
    assert resolve_prefix(tmp_path / "a") == tmp_path / "a_text_document"
    assert resolve_prefix(str(tmp_path / "a_text_document")) == tmp_path / "a_text_document"
    write(tmp_path / "a", DOCUMENTS)
    assert resolve_prefix(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(UserError) as caught:
        resolve_prefix(tmp_path / "b")
    assert "b.idx" in str(caught.value) and "b_text_document.idx" in str(caught.value)
