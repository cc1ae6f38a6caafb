"""Verification: one line for each dataset and checkpoint, where the damage is, never a traceback."""

from __future__ import annotations

import io
import json
import resource
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.checksum_helpers import crc32
from megatron.core.datasets.checksums import combined_crc32
from megatron.core.datasets.corpus import publish_sharded
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetWriter,
    bin_path,
    encode_manifest,
    idx_path,
    manifest_path,
    shard_prefix,
)
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.core.dist_checkpointing import read_manifest, save_checkpoint
from megatron.core.dist_checkpointing.format import encode_manifest as encode_checkpoint_manifest
from megatron.core.parallel_state import ParallelContext
from tests.programs import load_program

TOOL = Path(__file__).resolve().parents[2] / "tools" / "verify.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_program(TOOL)


class Verify:
    """Runs the tool; the lines that it printed."""

    def __init__(self, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        self.tool, self.capsys = tool, capsys

    def __call__(self, *paths: Path, status: int) -> list[str]:
        found = self.tool.main(list(map(str, paths)))
        printed = self.capsys.readouterr()
        assert (found, printed.err) == (status, ""), printed
        return printed.out.splitlines()


@pytest.fixture
def verify(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Verify:
    return Verify(tool, capsys)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A dataset of three documents, 19 tokens."""
    (tmp_path / "in.txt").write_text("first\nsecond\nthird\n")
    config = {"input": [str(tmp_path / "in.txt")], "output_prefix": str(tmp_path / "x"), "append_eod": True}
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer")
    preprocess(PreprocessConfig(**config, tokenizer=tokenizer), io.StringIO())  # type: ignore[arg-type]
    return tmp_path / "x_text_document"


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def edit_manifest(prefix: Path, **changes: Any) -> None:
    """Write a manifest whose own checksum is right."""
    manifest = json.loads(manifest_path(prefix).read_bytes()) | changes
    manifest.pop("manifest_crc32")
    manifest_path(prefix).write_bytes(encode_manifest(manifest))


# --- datasets ------------------------------------------------------------------------------------------------------


def test_sound_datasets_by_any_of_their_names(verify: Verify, prefix: Path, tmp_path: Path) -> None:
    lines = verify(prefix, bin_path(prefix), idx_path(prefix), manifest_path(prefix), tmp_path / "x", status=0)
    assert len(lines) == 5 and len({line.rpartition(";")[0] for line in lines}) == 1
    assert lines[0].startswith(f"{prefix}: sound: 19 tokens, 3 documents, ") and "not checked" not in lines[0]


def test_what_could_not_be_checked_is_said(verify: Verify, prefix: Path) -> None:
    manifest = json.loads(manifest_path(prefix).read_bytes())
    manifest_path(prefix).write_text(json.dumps(manifest | {"version": 1}))
    assert "; not checked: checksums (the manifest is of a version without);" in verify(prefix, status=0)[0]
    manifest_path(prefix).unlink()
    assert "; not checked: checksums and vocabulary (no manifest);" in verify(prefix, status=0)[0]
    with IndexedDatasetWriter(prefix, "int32", overwrite=True) as writer:
        writer.add_document([70_000])
        writer.finalize({})
    assert "; not checked: vocabulary (the manifest names no tokenizer);" in verify(prefix, status=0)[0]


def test_where_the_damage_is(verify: Verify, prefix: Path) -> None:
    def found(path: Path, offset: int, content: bytes) -> str:
        whole = path.read_bytes()
        overwrite(path, offset, content)
        (line,) = verify(prefix, status=1)
        path.write_bytes(whole)
        assert line.startswith(f"{prefix}: NOT SOUND: {path}")
        return line

    binary, index = bin_path(prefix), idx_path(prefix)
    assert "at byte 14: token 7 (sequence 1) is id 384, outside the vocabulary of 384" in found(binary, 14, b"\x80\x01")
    assert ".bin is damaged: its checksum is 0x" in found(binary, 14, b"\x50\x00")
    assert "at byte 38: sequence 1 has -1 tokens" in found(index, 38, b"\xff" * 4)
    assert "at byte 54: sequence 1 starts at byte 16, the one before ends at 12" in found(index, 54, b"\x10")
    assert "at byte 78: document 1 starts at sequence 4 of 3" in found(index, 78, b"\x04")
    assert "expected b'MMIDIDX" in found(index, 0, b"X")
    manifest = manifest_path(prefix)
    assert "is damaged or was edited" in found(manifest, manifest.read_bytes().index(b"in.txt"), b"o")
    config = prefix.parent / "x_text_document_tokenizer" / "tokenizer_config.json"
    assert "tokenizer_config.json is damaged: its checksum is 0x" in found(config, 40, b"?")


def test_files_that_are_missing_or_foreign(verify: Verify, prefix: Path, tmp_path: Path) -> None:
    directory = tmp_path / "x_text_document_tokenizer"
    for path in (bin_path(prefix), idx_path(prefix), directory / "tokenizer_config.json"):
        path.rename(tmp_path / "away")
        (line,) = verify(prefix, status=1)
        assert "NOT SOUND" in line and path.name in line
        path.mkdir()
        assert "NOT SOUND" in verify(prefix, status=1)[0]
        path.rmdir()
        (tmp_path / "away").rename(path)
    shutil.rmtree(directory)
    assert "tokenizer_config.json cannot be read" in verify(prefix, status=1)[0]
    assert "is no dataset" in verify(tmp_path / "nothing", status=1)[0]
    assert "is no dataset" in verify(tmp_path / ("long" * 1000), tmp_path / "new\nline", status=1)[1]


def test_sharded_datasets(verify: Verify, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("first\nsecond\nthird\n")
    for number in (0, 1):
        config = {"input": [str(tmp_path / "in.txt")], "output_prefix": str(tmp_path / f"x{number}")}
        tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer")
        preprocess(PreprocessConfig(**config, tokenizer=tokenizer), io.StringIO())  # type: ignore[arg-type]
        for path in (bin_path, idx_path, manifest_path):
            path(tmp_path / f"x{number}_text_document").rename(path(shard_prefix(tmp_path / "x", number)))
    manifest = json.loads(manifest_path(tmp_path / "x-00000").read_bytes())
    content = {key: manifest[key] for key in ("tokenizer", "tokenizer_directory", "tokenizer_files")}
    publish_sharded(tmp_path / "x", 2, content)
    (line,) = {found.rpartition(";")[0] for found in verify(tmp_path / "x", tmp_path / "x.json", status=0)}
    assert line.startswith(f"{tmp_path / 'x'}: sound: 32 tokens, 6 documents in 2 shards, ")
    overwrite(bin_path(tmp_path / "x-00001"), 14, b"\x80\x01")
    assert "x-00001.bin is damaged at byte 14: token 7 (sequence 1) is id 384" in verify(tmp_path / "x", status=1)[0]
    bin_path(tmp_path / "x-00001").unlink()
    assert "x-00001.bin cannot be read" in verify(tmp_path / "x", status=1)[0]


def test_damage_far_inside_is_found_by_all_threads(verify: Verify, tmp_path: Path) -> None:
    prefix = tmp_path / "x"
    lengths = np.arange(600_000) % 40
    with IndexedDatasetWriter(prefix, "int32") as writer:
        writer.add_documents(np.arange(lengths.sum()) % 1000, lengths)
        writer.finalize({})
    sequences, tokens = len(lengths), int(lengths.sum())
    assert f"{tokens:,} tokens, 600,000 documents" in verify(prefix, status=0)[0]

    def found(path: Path, offset: int, content: bytes) -> str:
        with path.open("rb") as file:
            file.seek(offset)
            before = file.read(len(content))
        overwrite(path, offset, content)
        (line,) = verify(prefix, status=1)
        overwrite(path, offset, before)
        return line

    place = 2_500_003  # two values are wrong: the first one is reported
    overwrite(bin_path(prefix), 4 * (tokens - 1), b"\xff" * 4)
    assert f"token {place} (sequence" in found(bin_path(prefix), 4 * place, b"\xff" * 4)
    assert f"token {tokens - 1} (sequence 599999) is id -1, a negative one" in verify(prefix, status=1)[0]
    overwrite(bin_path(prefix), 4 * (tokens - 1), np.int32((tokens - 1) % 1000).tobytes())
    assert ".bin is damaged: its checksum" in found(bin_path(prefix), 4 * place, b"\x01")
    for place in (1, (1 << 18) - 1, 1 << 18, 599_998):
        assert f": sequence {place} has -1 tokens" in found(idx_path(prefix), 34 + 4 * place, b"\xff" * 4)
        pointer = 34 + 4 * sequences + 8 * place
        assert f"byte {pointer}: sequence {place} starts at byte 5," in found(
            idx_path(prefix), pointer, np.int64(5).tobytes()
        )
        document = 34 + 12 * sequences + 8 * place
        assert f"byte {document + 8}: document {place + 1} starts at sequence {place + 1}" in found(
            idx_path(prefix), document, np.int64(600_000).tobytes()
        )


@pytest.mark.parametrize("sizes", [(0, 0), (3, 0), (0, 5), (1000, 1), (7, 100_003)])
def test_checksums_combine(sizes: tuple[int, int]) -> None:
    first, second = (np.random.default_rng(0).bytes(size) for size in sizes)
    assert combined_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@pytest.mark.parametrize("portable", [False, True])
def test_checksums_are_those_of_zlib(portable: bool) -> None:
    content, start = np.random.default_rng(0).bytes(70_000), 0x1234567
    for size in [*range(200), 4096, 65_537, len(content) - 5]:
        part = memoryview(content)[5 : 5 + size]
        assert crc32(part, start, portable=portable) == zlib.crc32(part, start), size
    with pytest.raises((BufferError, ValueError)):
        crc32(np.zeros((4, 4))[:, 1], portable=portable)
    with pytest.raises(TypeError):
        crc32("text", portable=portable)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": 5}, {"files": {"bin": None, "idx": {"crc32": "1"}}}, {"tokenizer_files": 3},
        {"tokenizer_files": {"../x_text_document.bin": {"crc32": 0}}}, {"tokenizer_files": {"..": {}}},
        {"tokenizer_directory": 5}, {"tokenizer_directory": ".."}, {"tokenizer_directory": "../x"}, {"tokenizer": []},
        {"num_tokens": [1]}, {"version": {}}, {"one_sequence_per_document": "yes", "dtype": None},
    ],
)  # fmt: skip
def test_forged_manifests_give_no_traceback(verify: Verify, prefix: Path, changes: dict[str, Any]) -> None:
    edit_manifest(prefix, **changes)
    (line,) = verify(prefix, status=1 if changes != {"tokenizer_files": 3} else 0)
    assert line.startswith(f"{prefix}: ")


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tool: ModuleType) -> None:
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        for _ in range(100):
            writer.add_documents(np.ones(1_000_000, np.uint16), np.full(2000, 500))
        writer.finalize({})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert tool.main([str(tmp_path / "x")]) == 0  # 204 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000


def test_command_line(prefix: Path) -> None:
    run = subprocess.run([sys.executable, TOOL, prefix, "/none"], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stderr == ""
    assert [line.split(": ")[1] for line in run.stdout.splitlines()] == ["sound", "NOT SOUND"]


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints."""
    tensors = {"weight": torch.arange(12.0).reshape(3, 4), "step": torch.tensor(7), "half": torch.ones(3).bfloat16()}
    for iteration in (1, 2):
        save_checkpoint(tmp_path / "run", iteration, tensors, {}, ParallelContext(torch.device("cpu")))
    return tmp_path / "run"


def test_checkpoints(verify: Verify, root: Path) -> None:
    one, two = root / "iter_0000001", root / "iter_0000002"
    lines = verify(root, one, status=0)
    assert [line.split(": ")[0] for line in lines] == [str(one), str(two), str(one)]
    assert ": sound: 3 tensors, 16 elements, " in lines[0]
    (shard,) = one.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    lines = verify(root, status=1)
    assert ": NOT SOUND: " in lines[0] and shard.name in lines[0] and ": sound: " in lines[1]
    (two / "manifest.json").write_bytes(b"[" * 100_000)
    assert "NOT SOUND" in verify(two, status=1)[0]
    (two / "manifest.json").unlink()
    assert "NOT SOUND" in verify(two, status=1)[0]


def test_shard_headers_are_compared_with_the_manifest(verify: Verify, root: Path) -> None:
    """A file of other tensors, with the checksum that the manifest has for it."""
    path = root / "iter_0000001"
    (shard,) = path.glob("*.safetensors")
    whole = {"weight": torch.zeros(4, 3), "step": torch.tensor(7), "half": torch.ones(3).bfloat16()}
    for tensors, expected in (
        (whole, "tensor weight is ('F32', [4, 3]), ('F32', [3, 4]) in the manifest"),
        ({"step": torch.tensor(7)}, "tensor half is missing"),
        (whole | {"weight": torch.zeros(3, 4), "zzz": torch.zeros(1)}, "tensor zzz is ('F32', [1]), not listed"),
        (None, "is no valid safetensors file"),
    ):
        if tensors is None:
            shard.write_bytes(b"\x08" + b"\x00" * 7 + b"no JSON.")
        else:
            save_file(tensors, shard)
        manifest = read_manifest(path)
        manifest["files"][shard.name] = {"bytes": shard.stat().st_size, "crc32": zlib.crc32(shard.read_bytes())}
        (path / "manifest.json").write_bytes(encode_checkpoint_manifest(manifest))
        (line,) = verify(path, status=1)
        assert "NOT SOUND" in line and shard.name in line
        assert expected in line or "malformed" in line, line


def test_directories_without_a_checkpoint(verify: Verify, tmp_path: Path) -> None:
    (line,) = verify(tmp_path, status=1)
    assert (
        line == f"{tmp_path}: NOT SOUND: is neither a checkpoint (no manifest.json) nor a directory of them (no iter_*)"
    )
