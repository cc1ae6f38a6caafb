"""Preprocessing of Parquet and Arrow files, of what `datasets` keeps, and of directories."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.corpus_reader import find_sources, read_chunks
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.core.errors import UserError
from megatron.core.tokenizers import ByteTokenizer

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"text {n} \u00e9" * (n % 7 + 1) for n in range(500)]


def run(inputs: Path | str, prefix: Path, **options: Any) -> str:
    log = io.StringIO()
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer")
    preprocess(PreprocessConfig(input=[str(inputs)], output_prefix=str(prefix), tokenizer=tokenizer, **options), log)
    return log.getvalue()


def texts_of(prefix: Path) -> list[str]:
    return [ByteTokenizer().detokenize(ids) for ids in IndexedDataset(f"{prefix}_text_document")]


def table(texts: list[Any], kind: Any = None) -> Any:
    return pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, kind)})


def write_stream(path: Path, content: Any, rows: int = 100) -> Path:
    """As `datasets` writes it."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, content.schema) as writer:
        for batch in content.to_batches(rows):
            writer.write_batch(batch)
    return path


KINDS = {
    "string": lambda: pyarrow.string(),
    "large": lambda: pyarrow.large_string(),
    "view": lambda: pyarrow.string_view(),
    "dictionary": lambda: pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parquet(tmp_path: Path, kind: str) -> None:
    content = table(TEXTS).cast(pyarrow.schema([("id", pyarrow.int64()), ("text", KINDS[kind]())]))
    parquet.write_table(content, tmp_path / "in.parquet", row_group_size=130)
    run(tmp_path / "in.parquet", tmp_path / "x")
    assert texts_of(tmp_path / "x") == TEXTS


def test_arrow_files_and_streams(tmp_path: Path) -> None:
    write_stream(tmp_path / "a.arrow", table(TEXTS))
    path, content = str(tmp_path / "b.arrow"), table(TEXTS)
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_file(file, content.schema) as writer:
        writer.write_table(content, 77)
    for name in "ab":
        run(tmp_path / f"{name}.arrow", tmp_path / name)
        assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_chunks_of_tables_can_be_gone_on_from(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table(TEXTS), path, row_group_size=130)
    else:
        write_stream(path, table(TEXTS))
    (source,) = find_sources([str(path)])
    chunks = list(read_chunks(source, 500, keys=["text"]))
    assert len(chunks) > 5
    for n, chunk in enumerate(chunks):
        rest = list(read_chunks(source, 500, start=chunk.end, keys=["text"]))
        rows = sum(pyarrow.ipc.open_stream(c.data).read_all().num_rows for c in rest)
        assert rows == len(TEXTS) - chunk.end.offset
        assert n == len(chunks) - 1 or rest[0].first_line == chunks[n + 1].first_line


def test_bad_rows(tmp_path: Path) -> None:
    parquet.write_table(table(["one", None, "three", ""]), tmp_path / "null.parquet")
    with pytest.raises(UserError, match=r"null\.parquet:row 2: 'text' is of type null"):
        run(tmp_path / "null.parquet", tmp_path / "x")
    log = run(tmp_path / "null.parquet", tmp_path / "x", on_error="skip")
    assert "1 records with 'text' is not a string" in log and texts_of(tmp_path / "x") == ["one", "three"]
    parquet.write_table(table([1, 2]), tmp_path / "int.parquet")
    with pytest.raises(UserError, match=r"int\.parquet:row 1: 'text' is of type int64"):
        run(tmp_path / "int.parquet", tmp_path / "y")
    with pytest.raises(UserError, match=r"int\.parquet:row 1: no column 'body'; see --json-keys"):
        run(tmp_path / "int.parquet", tmp_path / "y", json_keys=["body"])
    broken = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    write_stream(tmp_path / "utf8.arrow", pyarrow.table({"text": broken}))
    with pytest.raises(UserError, match=r"utf8\.arrow:row 2: 'text' has invalid UTF-8: byte 0xff at column 1"):
        run(tmp_path / "utf8.arrow", tmp_path / "y")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("damage", [0, 3, 50, 0.3, 0.7, "flip", "text"])
def test_damaged_tables(tmp_path: Path, suffix: str, damage: Any) -> None:
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table(TEXTS), path, row_group_size=130)
    else:
        write_stream(path, table(TEXTS))
    content = path.read_bytes()
    if damage == "flip":
        content = content[:300] + bytes(255 - byte for byte in content[300:3000]) + content[3000:]
    elif damage == "text":
        content = b'{"text": "no table"}\n'
    else:
        content = content[: int(damage * len(content)) if isinstance(damage, float) else damage]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"in\.(parquet|arrow)(:row \d+)?: |no text under") as caught:
        run(path, tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_directories(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    (inputs / "sub").mkdir(parents=True)
    (inputs / ".hidden").mkdir()
    parquet.write_table(table(["c"]), inputs / "sub" / "c.parquet")
    (inputs / "b.txt").write_text("b\n")
    (inputs / "a.jsonl").write_text('{"text": "a"}\n')
    (inputs / "z.json").write_text('{"text": "z"}\n')
    for other in (inputs / "notes.md", inputs / ".x.txt", inputs / ".hidden" / "x.txt"):
        other.write_text("not text\n")
    run(inputs, inputs / "out")
    assert texts_of(inputs / "out") == ["a", "b", "c", "z"]
    run(inputs, inputs / "out2")  # the datasets that lie there now are no text
    assert texts_of(inputs / "out2") == ["a", "b", "c", "z"]


def test_saved_dataset(tmp_path: Path) -> None:
    """The files of `Dataset.save_to_disk`: `_data_files` of state.json, in order."""
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    write_stream(folder / "data-00001-of-00002.arrow", table(TEXTS[300:]))
    write_stream(folder / "data-00000-of-00002.arrow", table(TEXTS[:300]))
    (folder / "dataset_info.json").write_text("{}")
    files = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    run(folder, tmp_path / "x")
    assert texts_of(tmp_path / "x") == TEXTS
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"several datasets; .*saved/train .*saved/test"):
        run(tmp_path / "saved", tmp_path / "y")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    with pytest.raises(UserError, match="lists no Arrow files"):
        run(folder, tmp_path / "y")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package `datasets` downloads is Arrow files in its cache; a stand-in for it names them."""
    path = write_stream(tmp_path / "cached.arrow", table(TEXTS))
    calls: list[Any] = []

    def load_dataset(name: str, configuration: str | None, split: str) -> Any:
        calls.append((name, configuration, split))
        if name == "none":
            raise FileNotFoundError("no such\ndataset")
        return types.SimpleNamespace(cache_files=[{"filename": str(path)}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    run("hf://owner/name:en@validation", tmp_path / "x")
    assert texts_of(tmp_path / "x") == TEXTS and calls == [("owner/name", "en", "validation")]
    find_sources(["hf://name"])
    assert calls[1] == ("name", None, "train")
    for address, expected in (
        ("hf://none", "cannot be loaded: no such dataset"),
        ("hf://x@train[:1%]", "whole splits"),
    ):
        with pytest.raises(UserError, match=expected):
            find_sources([address])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets"):
        find_sources(["hf://name"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="need the package pyarrow"):
        run(path, tmp_path / "y")


def test_several_workers_and_resume(tmp_path: Path) -> None:
    parquet.write_table(table(TEXTS), tmp_path / "in.parquet", row_group_size=130)
    run(tmp_path / "in.parquet", tmp_path / "a" / "x")
    run(tmp_path / "in.parquet", tmp_path / "b" / "x", workers=2, resume=True)
    names = [f"x_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [(tmp_path / "b" / n).read_bytes() for n in names]
