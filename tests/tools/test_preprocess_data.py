"""Preprocessing: same bytes for any number of workers, every input form, every bad record, failures leave nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import TokenizerConfig
from megatron.core.datasets import preprocessing_output, preprocessing_workers
from megatron.core.datasets.corpus_reader import Source, find_sources, parse_records, read_chunks
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron.core.datasets.preprocessing import PreprocessConfig, PreprocessStats, preprocess
from megatron.core.errors import UserError
from megatron.core.tokenizers import ByteTokenizer, load_tokenizer
from tests.reliability.malformed_text import BAD_LINES

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
BYTES = TokenizerConfig(tokenizer_type="ByteTokenizer")
EOS = ByteTokenizer().eos_id


def run(inputs: Path | list[Path], prefix: Path, **options: Any) -> tuple[PreprocessStats, str]:
    log = io.StringIO()
    paths = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
    config = PreprocessConfig(input=paths, output_prefix=str(prefix), tokenizer=BYTES, **options)
    return preprocess(config, log), log.getvalue()


def texts_of(prefix: Path, key: str = "text") -> list[str]:
    tokenizer = ByteTokenizer()
    return [tokenizer.detokenize(ids) for ids in IndexedDataset(f"{prefix}_{key}_document")]


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# --- the output ----------------------------------------------------------------------------------------------------


def test_dataset_manifest_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl("one", "", "tw\u00f6\nlines"))
    stats, log = run(tmp_path / "in.jsonl", tmp_path / "out" / "data", append_eod=True)
    prefix = tmp_path / "out" / "data_text_document"
    assert names(tmp_path / "out") == {
        "data_text_document.bin", "data_text_document.idx", "data_text_document.json", "data_text_document_tokenizer",
    }  # fmt: skip
    dataset = IndexedDataset(prefix)
    assert [list(ids)[-1] for ids in dataset] == [EOS, EOS]
    assert texts_of(tmp_path / "out" / "data") == ["one", "tw\u00f6\nlines"]
    manifest = dataset.manifest
    assert manifest is not None
    assert manifest["append_eod"] is True and manifest["json_key"] == "text"
    assert manifest["inputs"] == [{"name": "in.jsonl", "bytes": (tmp_path / "in.jsonl").stat().st_size}]
    assert manifest["tokenizer"] == ByteTokenizer().describe()
    assert load_tokenizer(prefix.parent / manifest["tokenizer_directory"]).fingerprint == ByteTokenizer().fingerprint
    assert (stats.documents, stats.tokens, stats.empty) == (2, dataset.num_tokens, 1)
    assert "2 documents" in log and "1 empty records" in log


def test_output_does_not_depend_on_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a file, several files, bad records among them; with 1 worker, 2 and 4."""
    generator = random.Random(0)
    lines = [
        jsonl(" ".join(generator.choices(["a", "bc", "d\u00e9f"], k=generator.randrange(400)))) for _ in range(3000)
    ]
    lines[500], lines[2500] = b"{broken\n", b'{"other": 1}\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:2000]))
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[2000:]))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert sum(1 for _ in read_chunks(find_sources([str(inputs[0])])[0])) > 1
    outputs = []
    for workers in (1, 2, 4):
        stats, _ = run(inputs, tmp_path / str(workers) / "x", workers=workers, on_error="skip", append_eod=True)
        assert dict(stats.skipped) == {"invalid JSON": 1, "no key 'text'": 1}
        folder = tmp_path / str(workers)
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert outputs[0] == outputs[1] == outputs[2]
    clean = b"".join(line for n, line in enumerate(lines) if n not in (500, 2500))
    (tmp_path / "clean.jsonl").write_bytes(clean)
    run(tmp_path / "clean.jsonl", tmp_path / "clean", append_eod=True)
    for suffix in ("bin", "idx"):  # skipping equals preprocessing what is good
        assert (tmp_path / f"clean_text_document.{suffix}").read_bytes() == outputs[0][f"x_text_document.{suffix}"]


def test_several_keys_stay_aligned(tmp_path: Path) -> None:
    rows = [{"a": "1", "b": "one"}, {"a": "", "b": ""}, {"a": "", "b": "two"}, {"a": "3", "b": "three"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stats, _ = run(tmp_path / "in.jsonl", tmp_path / "x", json_keys=["a", "b"])
    assert texts_of(tmp_path / "x", "a") == ["1", "", "3"]
    assert texts_of(tmp_path / "x", "b") == ["one", "two", "three"]
    assert (stats.documents, stats.empty) == (3, 1)


def test_existing_output(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    run(tmp_path / "in.txt", tmp_path / "x")
    with pytest.raises(UserError, match="--overwrite"):
        run(tmp_path / "in.txt", tmp_path / "x")
    (tmp_path / "in.txt").write_text("\n")
    with pytest.raises(UserError, match="nothing was written"):
        run(tmp_path / "in.txt", tmp_path / "x", overwrite=True)
    assert texts_of(tmp_path / "x") == ["one"]  # a run that fails leaves the old dataset
    (tmp_path / "in.txt").write_text("two\n")
    run(tmp_path / "in.txt", tmp_path / "x", overwrite=True)
    assert texts_of(tmp_path / "x") == ["two"]


# --- input forms ---------------------------------------------------------------------------------------------------

TEXT = b"\xef\xbb\xbfone\r\nline two\r\n\r\n \t\nthree \xc3\xa9\r\n\n\nfour"


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", ["one", "line two", "three \u00e9", "four"]),
        ("paragraph", ["one\nline two", "three \u00e9", "four"]),
        ("document", ["one\nline two\n\n \t\nthree \u00e9\n\n\nfour"]),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_plain_text(tmp_path: Path, sample_by: Any, expected: list[str], chunk_bytes: int) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(TEXT)
    (source,) = find_sources([str(path)], sample_by=sample_by)
    records = [r for chunk in read_chunks(source, chunk_bytes) for r in parse_records(chunk, ["text"])]
    assert [record.texts for record in records] == [[text] for text in expected]
    if sample_by == "line":
        assert [record.line for record in records] == [1, 2, 5, 8]


def frames(data: bytes) -> bytes:
    """Two frames and a skippable one, as parallel compressors write them."""
    compress = zstandard.ZstdCompressor().compress
    return compress(data[:9]) + b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + compress(data[9:])


def members(data: bytes) -> bytes:
    return gzip.compress(data[:9]) + gzip.compress(data[9:])


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("in.jsonl", bytes),
        ("in.json", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")),
        ("in.ndjson", lambda data: b"\n\n" + data.rstrip(b"\n")),
        ("in.jsonl.gz", gzip.compress),
        ("in.jsonl.gz", members),
        ("in.jsonl.zst", zstandard.compress),
        ("in.jsonl.zst", frames),
    ],
)
def test_compression_and_line_ends(tmp_path: Path, name: str, pack: Any) -> None:
    texts = ["one", "tw\u00f6 \u2028 \x85 separators that are no line ends", "nul \x00", "x" * 1_500_000]
    (tmp_path / name).write_bytes(pack(jsonl(*texts)))
    run(tmp_path / name, tmp_path / "x")
    assert texts_of(tmp_path / "x") == texts


def test_json_with_raw_unicode_line_separators(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    run(tmp_path / "in.jsonl", tmp_path / "x")
    assert texts_of(tmp_path / "x") == ["a\u2028b"]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20),
    chunk_bytes=st.integers(1, 200),
    packing=st.sampled_from(
        [("in.jsonl", bytes), ("in.jsonl.gz", gzip.compress), ("in.jsonl.zst", zstandard.compress)]
    ),
)
def test_chunks_hold_every_record_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk_bytes: int, packing: Any
) -> None:
    name, pack = packing
    path = tmp_path_factory.mktemp("chunks") / name
    path.write_bytes(pack(jsonl(*texts)))
    source = Source(path, "jsonl", path.stat().st_size)
    records = [r for chunk in read_chunks(source, chunk_bytes) for r in parse_records(chunk, ["text"])]
    assert [(r.line, r.texts) for r in records] == [(n, [text]) for n, text in enumerate(texts, start=1)]


def test_globs_and_formats(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b\n")
    (tmp_path / "a.jsonl").write_bytes(jsonl("a"))
    (tmp_path / "[x].txt").write_text("literal\n")
    (tmp_path / "c.data").write_text("c\n")
    run([tmp_path / "[ab].*", tmp_path / "[x].txt"], tmp_path / "x")
    assert texts_of(tmp_path / "x") == ["a", "b", "literal"]
    run(tmp_path / "c.data", tmp_path / "y", input_format="text")
    (tmp_path / "empty").mkdir()
    assert texts_of(tmp_path / "y") == ["c"]
    for path, expected in (
        (tmp_path / "c.data", "--input-format"),
        (tmp_path / "none.txt", "no such file"),
        (tmp_path / "*.none", "no such file"),
        (tmp_path / "empty", "no file in this directory"),
    ):
        with pytest.raises(UserError, match=expected):
            run(path, tmp_path / "z")


# --- bad records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: line[:12].decode(errors="replace"))
def test_bad_records(tmp_path: Path, bad: bytes) -> None:
    reason, detail = BAD_LINES[bad]
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl("one") + b"\r\n" + bad + b"\n" + jsonl("two") + bad + b"\n")
    before = names(tmp_path)
    with pytest.raises(UserError) as caught:
        run(path, tmp_path / "x")
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and detail in message and "\n" not in message and len(message) < 500
    assert names(tmp_path) == before
    stats, log = run(path, tmp_path / "x", on_error="skip")
    assert dict(stats.skipped) == {reason: 2}
    assert f"skipped {path}:3: " in log and f"skipped {path}:5: " in log and f"2 records with {reason}" in log
    assert texts_of(tmp_path / "x") == ["one", "two"]


def test_only_the_first_messages_of_a_reason_are_shown(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl("one") + b"{\n" * 50)
    stats, log = run(tmp_path / "in.jsonl", tmp_path / "x", on_error="skip")
    assert stats.skipped["invalid JSON"] == 50 and log.count("skipped") == 3


def test_bad_utf8_in_plain_text(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"one\n\xfftwo\nthree\n")
    with pytest.raises(UserError, match=r"in\.txt:2: invalid UTF-8: byte 0xff at column 1"):
        run(tmp_path / "in.txt", tmp_path / "x")
    run(tmp_path / "in.txt", tmp_path / "x", on_error="skip")
    assert texts_of(tmp_path / "x") == ["one", "three"]


def flip(data: bytes) -> bytes:
    """Damage in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 50]) + data[middle + 50 :]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-3], flip])
@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_damaged_compression(tmp_path: Path, suffix: str, pack: Any, damage: Any) -> None:
    generator = random.Random(1)
    texts = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=400)) for _ in range(2000)]
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(damage(pack(jsonl(*texts[:1000])) + pack(jsonl(*texts[1000:]))))
    before = names(tmp_path)
    with pytest.raises(UserError, match=r"in\.jsonl\.\w+:\d+: "):
        run(path, tmp_path / "x")
    assert names(tmp_path) == before
    stats, log = run(path, tmp_path / "x", on_error="skip")
    assert stats.skipped["unreadable rest of a file"] == 1 and ": cannot be read from here on: " in log
    kept = texts_of(tmp_path / "x")
    assert 500 < len(kept) <= 2000
    if damage is not flip:  # gzip finds changed bytes only at its checksum, after the records they are in
        assert kept == texts[: len(kept)]


def test_empty_corpora_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"\n\n", jsonl("", " ".strip())):
        (tmp_path / "in.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=r"no text under key 'text'.*nothing was written"):
            run(tmp_path / "in.jsonl", tmp_path / "x", append_eod=True)
        assert names(tmp_path) == {"in.jsonl"}


# --- failures ------------------------------------------------------------------------------------------------------


def full_disk(self: Any, *arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    monkeypatch.setattr(IndexedDatasetWriter, "_write_index", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path / "in.txt", tmp_path / "x")
    assert names(tmp_path) == {"in.txt"}


def test_a_failure_while_publishing_can_be_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing_output, "publish_prepared", full_disk)
        with pytest.raises(OSError, match="No space"):
            run(tmp_path / "in.txt", tmp_path / "x")
    run(tmp_path / "in.txt", tmp_path / "x", resume=True)
    assert texts_of(tmp_path / "x") == ["one"] and not [name for name in names(tmp_path) if "partial" in name]


@pytest.mark.parametrize("owner", [IndexedDatasetWriter, ByteTokenizer])
def test_old_data_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type) -> None:
    """With several keys, none of the old datasets goes before all of the new ones are on the disk."""
    (tmp_path / "in.jsonl").write_text('{"a": "one", "b": "two"}\n')
    run(tmp_path / "in.jsonl", tmp_path / "x", json_keys=["a", "b"])
    before = names(tmp_path)
    step = "_write_index" if owner is IndexedDatasetWriter else "save"
    work, calls = getattr(owner, step), []

    def second_time_full(self: Any, *arguments: Any) -> None:
        calls.append(work(self, *arguments) if not calls else full_disk(self))

    monkeypatch.setattr(owner, step, second_time_full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path / "in.jsonl", tmp_path / "x", json_keys=["b", "a"], overwrite=True)
    assert names(tmp_path) == before
    assert texts_of(tmp_path / "x", "a") == ["one"] and texts_of(tmp_path / "x", "b") == ["two"]
    load_tokenizer(tmp_path / "x_a_document_tokenizer")


def test_inputs_are_neither_read_twice_nor_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one\n")
    Path("link.txt").symlink_to("a.txt")
    for twice in (["a.txt", "link.txt"], ["a.txt", "*.txt"], ["a.txt", str(tmp_path / "a.txt")]):
        with pytest.raises(UserError, match="twice"):
            run([Path(name) for name in twice], Path("x"))
    Path("x_text_document.json").write_bytes(jsonl("precious"))
    for prefix in (Path("x"), tmp_path / "x"):
        with pytest.raises(UserError, match="would be replaced by the output"):
            run(Path("x_text_document.json"), prefix, overwrite=True)
    assert Path("x_text_document.json").read_bytes() == jsonl("precious")


@pytest.mark.parametrize(("taken", "options"), [("", {}), ("-00003", {"shard_tokens": 5})])
def test_a_json_that_is_no_manifest_stays(tmp_path: Path, taken: str, options: dict[str, Any]) -> None:
    """It may be the text of another corpus."""
    path = tmp_path / f"x_text_document{taken}.json"
    path.write_bytes(jsonl("precious"))
    (tmp_path / "in.txt").write_text("one\n")
    with pytest.raises(UserError, match=f"{taken}.json is not the manifest of a dataset, and would be replaced"):
        run(tmp_path / "in.txt", tmp_path / "x", overwrite=True, **options)
    assert names(tmp_path) == {path.name, "in.txt"} and path.read_bytes() == jsonl("precious")


def test_what_is_ours_beside_text_is_no_text(tmp_path: Path) -> None:
    """Finished or not, in directories and patterns; directories of others count, whatever their names."""
    text = tmp_path / "in"
    (text / "my_tokenizer").mkdir(parents=True)
    (text / "own.cache").mkdir()
    texts = [text / "a.txt", text / "my_tokenizer" / "b.txt", text / "notes.json", text / "own.cache" / "c.txt"]
    for path in texts:
        path.write_bytes(jsonl("text"))
    (text / "notes.idx").touch()  # of data without a manifest: notes.json is none
    tokenizer = TokenizerConfig(tokenizer_type="BertWordPieceCase", vocab_file=str(tmp_path / "vocab.txt"))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    config = PreprocessConfig(input=[str(text)], output_prefix=str(text / "out"), tokenizer=tokenizer, shard_tokens=3)
    preprocess(config, io.StringIO())
    whole = text / "out_text_document_tokenizer"
    assert (whole / "vocab.txt").exists()
    shutil.copytree(whole, text / "x_tokenizer.partial")
    shutil.copytree(whole, text / "x_tokenizer.partial.partial")
    (text / "x_tokenizer.partial.partial" / "tokenizer_config.json").unlink()
    for cache in ("a.txt.0123456789abcdef.cache", "a.txt.0123456789abcdef.cache.partial-host"):
        shutil.copytree(text / "my_tokenizer", text / cache / "deep")
        shutil.copytree(whole, text / cache / "corpus_text_document_tokenizer")
    shutil.move(text / "out_text_document-00000.json", text / "moved.json")  # away from its data
    for pattern, suffixes in (("in", (".txt", ".json")), ("in/**/*.txt", ".txt"), ("i*/**/*.json", ".json")):
        found = [source.path for source in find_sources([f"{tmp_path}/{pattern}"])]
        assert found == [path for path in texts if path.suffix in suffixes], pattern
    assert len(find_sources([f"{whole}/*.txt"])) == 1  # named itself


def test_links_to_directories_are_followed(tmp_path: Path) -> None:
    for name in ("in/sub", "real"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a\n")
    (tmp_path / "real" / "b.txt").write_text("b\n")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "same").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "sub" / "loop").symlink_to(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "x")
    assert texts_of(tmp_path / "x") == ["a", "b"]


def test_only_a_tokenizer_directory_of_ours_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    run(tmp_path / "in.txt", tmp_path / "y")
    (tmp_path / "x_text_document_tokenizer").mkdir()
    notes = tmp_path / "x_text_document_tokenizer" / "notes.txt"
    notes.write_text("precious")
    (tmp_path / "z_text_document_tokenizer").symlink_to("y_text_document_tokenizer")
    for name in ("x", "z"):
        with pytest.raises(UserError, match=f"{name}_text_document_tokenizer is not a directory of a saved tokenizer"):
            run(tmp_path / "in.txt", tmp_path / name, overwrite=True)
    assert notes.read_text() == "precious"
    (tmp_path / "y_text_document.idx").unlink()  # as a crash leaves it: the same command again works
    run(tmp_path / "in.txt", tmp_path / "y")
    assert texts_of(tmp_path / "y") == ["one"]


def test_a_tokenizer_may_replace_itself(tmp_path: Path) -> None:
    """The corpus is preprocessed again with the tokenizer that lies beside it."""
    (tmp_path / "in.txt").write_text("one\n")
    run(tmp_path / "in.txt", tmp_path / "x")
    beside = TokenizerConfig(tokenizer_model=str(tmp_path / "x_text_document_tokenizer"))
    paths = {"input": [str(tmp_path / "in.txt")], "output_prefix": str(tmp_path / "x")}
    preprocess(PreprocessConfig(**paths, tokenizer=beside, overwrite=True), io.StringIO())  # type: ignore[arg-type]
    assert texts_of(tmp_path / "x") == ["one"]
    assert load_tokenizer(tmp_path / "x_text_document_tokenizer").fingerprint == ByteTokenizer().fingerprint


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_reading_one_long_record_takes_linear_time(tmp_path: Path, sample_by: Any) -> None:
    """16,000 blocks that end no record: copying or searching what was read before for each would take minutes."""
    path = tmp_path / "in.txt"
    path.write_bytes(b"words and more \n"[: 15 if sample_by == "line" else 16] * 2_000_000)
    (source,) = find_sources([str(path)], sample_by=sample_by)
    began = time.process_time()
    (chunk,) = read_chunks(source, 2000)
    assert len(chunk.data) == path.stat().st_size
    assert time.process_time() - began < 5


def test_a_worker_that_dies_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("one\n" * 1000)
    monkeypatch.setattr(preprocessing_workers, "work", _die)
    with pytest.raises(UserError, match=r"worker process died \(status 9;"):
        run(tmp_path / "in.txt", tmp_path / "x", workers=2)
    assert names(tmp_path) == {"in.txt"}


def _die(connection: Any, config: Any) -> None:
    os._exit(9)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through Linux's /proc")
def test_workers_end_with_a_killed_parent_and_the_next_run_is_whole(tmp_path: Path) -> None:
    pipe = tmp_path / "in.txt"
    os.mkfifo(pipe)  # an input that never ends
    flags = ["--input", pipe, "--output-prefix", tmp_path / "x", "--tokenizer-type", "ByteTokenizer", "--workers", "2"]
    process = subprocess.Popen([sys.executable, TOOL, *map(str, flags)], stderr=subprocess.DEVNULL)
    with pipe.open("wb") as writer:
        writer.write(b"text\n" * 1_000_000)  # more than the pipe holds: some of it was read when this returns
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        process.kill()
        process.wait()
    wait_for_the_end_of(children)
    assert all(name.endswith(".partial") for name in names(tmp_path) - {"in.txt"})
    pipe.unlink()
    pipe.write_text("one\n")
    run(pipe, tmp_path / "x")
    assert texts_of(tmp_path / "x") == ["one"] and not [name for name in names(tmp_path) if "partial" in name]


def wait_for_the_end_of(processes: list[str]) -> None:
    deadline = time.monotonic() + 20
    while any(map(_running, processes)):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


def _running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl("one", "two"))
    flags = ["--input", tmp_path / "in.jsonl", "--tokenizer-type", "ByteTokenizer", "--output-prefix", tmp_path / "x"]
    done = command(*flags, "--append-eod", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "done | 2 documents | 8 tokens" in done.stderr and "MB/s" in done.stderr
    assert texts_of(tmp_path / "x") == ["one", "two"]
    again = command(*flags, "--workers", "1")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    typo = command(*flags, "--worker", "2")
    assert typo.returncode == 2 and "did you mean --workers?" in typo.stderr and typo.stderr.count("\n") == 1
    refused = command(*flags, "--tokenizer-type", "GPT2BPETokenizer")  # Megatron-LM's name
    assert refused.returncode == 1 and "HuggingFaceTokenizer" in refused.stderr and refused.stderr.count("\n") == 1
    help_text = command("--help").stdout
    assert all(flag in help_text for flag in ("--json-keys", "--on-error", "--vocab-extra-ids", "--text-sample-by"))


@pytest.mark.parametrize(
    ("number", "kill"),
    [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.killpg), (signal.SIGUSR1, os.kill)],
    ids=["ctrl-c", "term-all", "usr1-one"],
)
def test_stopped_by_a_signal(tmp_path: Path, number: int, kill: Callable[[int, int], None]) -> None:
    """To all processes, as a terminal or a scheduler sends it, or to the program alone: it says so, nothing is left."""
    pipe = tmp_path / "in.txt"
    os.mkfifo(pipe)
    flags = ["--input", pipe, "--output-prefix", tmp_path / "x", "--tokenizer-type", "ByteTokenizer", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, TOOL, *map(str, flags)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with pipe.open("wb") as writer:
        writer.write((b"text " * 2000 + b"\n") * 750)  # 7 chunks: the first result was waited for, so a worker runs
        time.sleep(0.5)  # until the program waits for more
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        kill(process.pid, number)
        time.sleep(0.1)
        kill(process.pid, number)  # a second one does not disturb the clean-up
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-2:] == [
        "nothing unfinished is left",
        "interrupted",
    ]
    assert names(tmp_path) == {"in.txt"}
    wait_for_the_end_of(children)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_signal_while_publishing_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    (tmp_path / "in.txt").write_text("old\n")
    if overwrite:
        run(tmp_path / "in.txt", tmp_path / "x")
    publish = preprocessing_output.publish_prepared

    def signalled(prefix: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        publish(prefix)

    monkeypatch.setattr(preprocessing_output, "publish_prepared", signalled)
    (tmp_path / "in.txt").write_text("new\n")
    config = PreprocessConfig(
        input=[str(tmp_path / "in.txt")], output_prefix=str(tmp_path / "x"), tokenizer=BYTES, overwrite=overwrite
    )
    log = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        preprocess(config, log)
    assert "wrote " in log.getvalue() and "unfinished" not in log.getvalue()
    assert texts_of(tmp_path / "x") == ["new"]
    assert not [name for name in names(tmp_path) if "partial" in name]


def test_workers_import_no_torch(tmp_path: Path) -> None:
    """Every worker process imports this module; torch would cost each of them seconds and 200 MB."""
    script = "import sys, preprocess_data; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], cwd=TOOL.parent, capture_output=True, text=True)
    assert process.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"workers": 0}, "--workers"),
        ({"log_interval": 0}, "--log-interval"),
        ({"json_keys": ["a", "a"]}, "--json-keys"),
    ],
)
def test_bad_flags(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        PreprocessConfig(input=["x"], output_prefix="y", tokenizer=BYTES, **options)
