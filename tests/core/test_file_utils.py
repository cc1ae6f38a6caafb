"""Publishing files: whole or not at all, and nothing temporary left."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.core.file_utils import publish_bytes, replace_directory


def test_publish_replaces_and_leaves_nothing_temporary(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        publish_bytes(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_publish_that_fails_leaves_nothing_temporary(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        publish_bytes(tmp_path / "a", b"one")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_replace_directory(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / name).touch()
        replace_directory(tmp_path / "source", tmp_path / "target")
        assert [path.name for path in (tmp_path / "target").iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
