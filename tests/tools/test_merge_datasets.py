"""Merging: the bytes of preprocessing everything at once, shards without copies, nothing lost or half written."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron.core.config import TokenizerConfig
from megatron.core.datasets import file_copies, merging
from megatron.core.datasets.corpus import open_corpus
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.indexed_format import bin_path, idx_path, manifest_path
from megatron.core.datasets.indexed_writer import IndexedDatasetWriter
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.core.datasets.verification import verify_dataset
from megatron.core.errors import UserError
from tests.programs import load_program

TOOL = Path(__file__).resolve().parents[2] / "tools" / "merge_datasets.py"
TEXTS = {"a": ["first", "", "second text"], "b": ["third"], "c": ["a fourth", "fifth"]}


class Merge:
    """Runs the tool; what it printed."""

    def __init__(self, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        self.tool, self.capsys = tool, capsys

    def __call__(self, *flags: str | Path, status: int = 0) -> str:
        found = self.tool.main(list(map(str, flags)))
        printed = self.capsys.readouterr()
        assert found == status, printed
        assert (printed.err if found else printed.out).count("\n") == 1
        return (printed.err or printed.out).strip()


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]) -> Merge:
    return Merge(load_program(TOOL), capsys)


def make(prefix: Path, *inputs: Path, **flags: Any) -> Path:
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer", vocab_extra_ids=flags.pop("extra_ids", 100))
    config = {"input": list(map(str, inputs)), "output_prefix": str(prefix), "append_eod": True} | flags
    preprocess(PreprocessConfig(**config, tokenizer=tokenizer), io.StringIO())  # type: ignore[arg-type]
    return Path(f"{prefix}_text_document")


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.jsonl" for name in TEXTS]
    for path, lines in zip(paths, TEXTS.values(), strict=True):
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return paths


@pytest.fixture
def parts(texts: list[Path], tmp_path: Path) -> list[Path]:
    return [make(tmp_path / "parts" / path.stem, path) for path in texts]


def content(prefix: Path) -> list[bytes]:
    tokenizer = prefix.with_name(prefix.name + "_tokenizer")
    manifest = json.loads(manifest_path(prefix).read_bytes())
    own = {name: value for name, value in manifest.items() if name not in ("run", "manifest_crc32")}
    files = [bin_path(prefix), idx_path(prefix), *sorted(tokenizer.iterdir())]
    return [*(path.read_bytes() for path in files), json.dumps(own).encode()]


def test_merged_is_preprocessed_at_once(merge: Merge, parts: list[Path], texts: list[Path], tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", *texts)
    merged = tmp_path / "merged" / "whole_text_document"
    out = merge("--input", tmp_path / "parts", "--output-prefix", merged)
    assert out.startswith(f"wrote {merged}: 3 datasets | 5 documents | 39 tokens | uint16 | one dataset | ")
    assert content(merged) == content(whole)
    assert not list(merged.parent.glob("*.partial"))
    before = [path.read_bytes() for path in sorted((tmp_path / "parts").glob("*.*"))]
    assert "exists; give another" in merge("--input", *parts, "--output-prefix", merged, status=1)
    merge("--input", *parts[1:], "--output-prefix", merged, "--overwrite")
    assert open_corpus(merged).num_documents == 3
    merge("--input", *parts, "--output-prefix", merged, "--overwrite")
    assert content(merged) == content(whole)
    assert before == [path.read_bytes() for path in sorted((tmp_path / "parts").glob("*.*"))]


def test_shards_are_hard_links(merge: Merge, parts: list[Path], texts: list[Path], tmp_path: Path) -> None:
    prefix, whole = tmp_path / "shards" / "corpus", open_corpus(make(tmp_path / "whole", *texts))
    out = merge("--input", *parts, "--output-prefix", prefix, "--as-shards")
    assert "3 datasets | 5 documents | 39 tokens | uint16 | 6 files linked | " in out
    assert bin_path(f"{prefix}-00001").samefile(bin_path(parts[1]))
    assert open_corpus(prefix).describe() == whole.describe()
    assert verify_dataset(prefix).unchecked == []
    assert not list(prefix.parent.glob("*.partial"))
    # Sharded ones merge, too; fewer shards leave none of the old ones.
    merge("--input", prefix, parts[0], "--output-prefix", tmp_path / "again", "--as-shards")
    assert len(open_corpus(tmp_path / "again").shards) == 4
    merge("--input", prefix, "--output-prefix", tmp_path / "one")
    assert content(tmp_path / "one")[:2] == content(Path(tmp_path / "whole_text_document"))[:2]
    merge("--input", parts[0], "--output-prefix", prefix, "--as-shards", "--overwrite")
    assert verify_dataset(prefix).num_documents == 2 and not idx_path(f"{prefix}-00001").exists()
    merge("--input", parts[0], "--output-prefix", prefix, "--overwrite")
    assert verify_dataset(prefix).num_shards == 0 and not idx_path(f"{prefix}-00000").exists()


@pytest.mark.parametrize("in_kernel", [True, False])
def test_copies_where_links_cannot_be(
    merge: Merge, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(file_copies.os, "link", refuse)
    if not in_kernel:
        monkeypatch.setattr(file_copies.os, "copy_file_range", refuse)
    assert "6 files copied" in merge("--input", *parts, "--output-prefix", tmp_path / "x", "--as-shards")
    merge("--input", *parts, "--output-prefix", tmp_path / "y")
    assert open_corpus(tmp_path / "x").describe() == open_corpus(tmp_path / "y").describe()
    assert verify_dataset(tmp_path / "y").num_documents == verify_dataset(tmp_path / "x").num_documents == 5


def test_data_of_megatron_has_no_manifest(merge: Merge, parts: list[Path], tmp_path: Path) -> None:
    for number, documents in enumerate(([[1, 2], [3]], [[4], [5, 6, 7]])):
        with IndexedDatasetWriter(tmp_path / f"m{number}", "uint16") as writer:
            for document in documents:
                writer.add_document(document * 2, [len(document), len(document)])
            writer.finalize()
    both = ["--input", tmp_path / "m0", tmp_path / "m1"]
    merge(*both, "--output-prefix", tmp_path / "m")
    merged = IndexedDataset(tmp_path / "m")
    assert merged.manifest is None and merged.num_sequences == 8
    assert [merged.document_start(n) for n in range(5)] == [0, 4, 6, 8, 14]
    np.testing.assert_array_equal(merged.tokens, [1, 2, 1, 2, 3, 3, 4, 4, 5, 6, 7, 5, 6, 7])
    assert "m0 has no manifest" in merge(*both, "--output-prefix", tmp_path / "s", "--as-shards", status=1)
    refused = merge("--input", tmp_path / "m0", parts[0], "--output-prefix", tmp_path / "s", status=1)
    assert "m0 and " in refused and "(not recorded, ByteTokenizer with fingerprint" in refused


def test_refusals(merge: Merge, parts: list[Path], texts: list[Path], tmp_path: Path) -> None:
    def refusal(*flags: str | Path) -> str:
        files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        message = merge(*flags, status=1)
        assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        return message

    for taken in ("out.json", "out-00002.json"):
        (tmp_path / taken).write_text('{"text": "precious"}\n')
        flags = ["--as-shards"] if "-" in taken else []
        expected = f"{taken} is not the manifest of a dataset, and would be replaced by one"
        everything = ["--input", *parts, "--output-prefix", tmp_path / "out", "--overwrite", *flags]
        assert expected in refusal(*everything)
        assert (tmp_path / taken).read_text() == '{"text": "precious"}\n'
        (tmp_path / taken).unlink()
    other = make(tmp_path / "other", texts[0], extra_ids=20)
    out = ("--output-prefix", tmp_path / "out")
    assert f"{parts[0]} and {other} have different tokenizers" in refusal("--input", *parts, other, *out)
    for name in ("w", "n"):
        with IndexedDatasetWriter(tmp_path / name, "int32" if name == "w" else "uint16") as writer:
            writer.add_document([1])
            writer.finalize()
    assert "w holds int32 ids, " in refusal("--input", tmp_path / "w", tmp_path / "n", *out)
    assert "names" in refusal("--input", parts[0], tmp_path / "parts", *out)
    assert "neither a directory nor a dataset" in refusal("--input", tmp_path / "nothing", *out)
    (tmp_path / "empty").mkdir()
    assert "no .idx in this directory" in refusal("--input", tmp_path / "empty", *out)
    replaced = "would be replaced by the output"
    assert replaced in refusal("--input", *parts, "--output-prefix", parts[2], "--overwrite")
    merge("--input", *parts, "--output-prefix", tmp_path / "s", "--as-shards")
    assert replaced in refusal("--input", tmp_path / "s-00001", "--output-prefix", tmp_path / "s", "--overwrite")
    assert replaced in refusal("--input", tmp_path / "s", "--output-prefix", tmp_path / "s", "--overwrite")
    assert "s-00001 2 times" in refusal("--input", tmp_path / "s", tmp_path / "s-00001", *out)
    config = parts[0].with_name(parts[0].name + "_tokenizer") / "tokenizer_config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"vocab_extra_ids": 100', '"vocab_extra_ids": 99'))
    assert "_tokenizer" in refusal("--input", *parts, *out)
    config.write_text(whole)
    with idx_path(parts[1]).open("r+b") as file:
        file.seek(34)
        file.write(np.int32(0).tobytes())  # of the only sequence: found when opened
    assert "b_text_document.bin has 12 bytes, expected 0" in refusal("--input", *parts, *out)


def test_damage_in_the_middle_of_an_index_is_found(merge: Merge, parts: list[Path], tmp_path: Path) -> None:
    with idx_path(parts[0]).open("r+b") as file:
        file.seek(34)
        file.write(np.int32(1_000_000).tobytes())
    message = merge("--input", *parts, "--output-prefix", tmp_path / "out", status=1)
    assert "a_text_document.idx is damaged: its sequences have not the 18 tokens" in message
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_leaves_nothing(
    merge: Merge, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.json")

    merge("--input", parts[0], "--output-prefix", tmp_path / "x", "--as-shards")
    before = {path: path.read_bytes() for path in tmp_path.glob("x*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_durably", refuse)  # while it is being prepared: the old one stays
        flags = ["--input", *parts, "--as-shards", "--overwrite", "--output-prefix"]
        assert "No space left" in merge(*flags, tmp_path / "x", status=1)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("x*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(merging, "publish_sharded", refuse)
        assert "No space left" in merge(*flags, tmp_path / "new", status=1)
    assert [path.name for path in tmp_path.glob("new*")] == ["new_tokenizer"]


def test_what_a_killed_merge_leaves_is_no_way_to_the_originals(
    merge: Merge, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hard links under temporary names: later writers must not write into them."""
    before = content(parts[0])
    bin_path(tmp_path / "all-00000").with_suffix(".bin.partial").hardlink_to(bin_path(parts[0]))
    idx_path(tmp_path / "all-00000").with_suffix(".idx.partial").hardlink_to(idx_path(parts[0]))
    merge("--input", parts[1], "--output-prefix", tmp_path / "all-00000")
    merge("--input", *parts, "--output-prefix", tmp_path / "all", "--as-shards", "--overwrite")
    assert content(parts[0]) == before
    assert verify_dataset(tmp_path / "all").num_documents == 5
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("flags", [[], ["--as-shards"]])
def test_one_program_at_a_time_writes_a_prefix(
    merge: Merge,
    parts: list[Path],
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
) -> None:
    refused = []

    def meanwhile(*args: Any) -> None:
        with pytest.raises(UserError, match="is being written by another process") as caught:
            make(tmp_path / "x", texts[1], overwrite=True)
        refused.append(caught)
        publish(*args)

    publish = merging._publish_tokenizer
    monkeypatch.setattr(merging, "_publish_tokenizer", meanwhile)
    merge("--input", *parts, "--output-prefix", tmp_path / "x_text_document", *flags)
    assert refused and verify_dataset(tmp_path / "x_text_document").num_documents == 5
    assert not list(tmp_path.glob("*.partial"))


def test_an_unfinished_run_is_not_gone_on_with_after_a_merge(
    merge: Merge, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle, a merge has other data under the temporary names than the journal tells of."""
    journal = tmp_path / "x_text_document.journal.partial"
    journal.write_bytes(b"of a run that was stopped")

    class Killed(BaseException):
        pass

    def killed(*args: Any) -> None:
        assert b"of a run" not in journal.read_bytes()
        raise Killed

    monkeypatch.setattr(IndexedDatasetWriter, "add_dataset", killed)
    with pytest.raises(Killed):
        merge("--input", *parts, "--output-prefix", tmp_path / "x_text_document")
    assert not list(tmp_path.glob("x*"))
