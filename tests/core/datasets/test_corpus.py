"""Corpora of one dataset and of several: the same documents and tokens, opened in constant time."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.corpus import Corpus, open_corpus, publish_sharded, split_corpus
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetWriter,
    encode_manifest,
    is_dataset,
    manifest_path,
    remove_dataset,
    resolve_prefix,
    shard_prefix,
)
from megatron.core.errors import UserError

DOCUMENTS = [[5, 6, 7], [], [8], [9, 10], [], [], [11, 12, 13, 14], [15], [16, 17], []]
CUTS = (0, 3, 5, 10)  # documents of the shards
TOKENS = np.arange(5, 18)


def write(prefix: Path, documents: list[list[int]]) -> None:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for document in documents:
            writer.add_document(document)
        writer.finalize({"json_key": "text"})


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    write(tmp_path / "plain", DOCUMENTS)
    return tmp_path / "plain"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    prefix = tmp_path / "corpus"
    for number, (begin, end) in enumerate(pairwise(CUTS)):
        write(shard_prefix(prefix, number), DOCUMENTS[begin:end])
    publish_sharded(prefix, len(CUTS) - 1, {"json_key": "text"})
    return prefix


def test_shards_are_one_corpus(plain: Path, sharded: Path) -> None:
    one, many = open_corpus(plain), open_corpus(sharded)
    assert len(one.shards) == 1 and len(many.shards) == 3 and many.manifest is not None
    for corpus in (one, many, pickle.loads(pickle.dumps(many))):
        assert (corpus.num_tokens, corpus.num_documents, corpus.num_sequences) == (13, 10, 10)
        assert corpus.dtype == np.uint16 and corpus.describe() == one.describe()
        np.testing.assert_array_equal(np.concatenate(corpus.pieces), TOKENS)
        digest = hashlib.sha256(TOKENS.astype("<i8").tobytes() * 256)  # of 256 places, here all the same one
        assert corpus.describe()["fingerprint"] == digest.hexdigest()[:16]
        starts = [0, *np.cumsum([len(document) for document in DOCUMENTS]).tolist()]
        assert [corpus.document_start(document) for document in range(11)] == starts
        for first in range(11):
            for last in range(first, 11):
                assert corpus.document_starts(first, last).tolist() == starts[first : last + 1]
        with pytest.raises(IndexError):
            corpus.document_starts(4, 11)


def test_splits_are_runs_of_documents(plain: Path, sharded: Path) -> None:
    for prefix in (plain, sharded):
        parts = split_corpus(open_corpus(prefix), (0.5, 0.3, 0.2), "news")
        assert {name: part.documents for name, part in parts.items()} == {
            "train": (0, 5), "valid": (5, 8), "test": (8, 10)
        }  # fmt: skip
        assert [part.tokens for part in parts.values()] == [(0, 6), (6, 11), (11, 13)]
        assert parts["valid"].name == "news" and parts["valid"].num_tokens == 5 and parts["valid"].num_documents == 3


def test_a_corpus_is_found_by_its_prefix(sharded: Path, tmp_path: Path) -> None:
    assert resolve_prefix(sharded) == sharded
    for path in tmp_path.glob("corpus*"):
        shutil.copy(path, tmp_path / path.name.replace("corpus", "c_text_document"))
    assert resolve_prefix(tmp_path / "c") == tmp_path / "c_text_document"
    assert open_corpus(tmp_path / "c_text_document").describe() == open_corpus(sharded).describe()
    assert open_corpus(shard_prefix(sharded, 1)).num_tokens == 2  # a shard is a dataset
    (tmp_path / "else.json").write_text("{}")
    assert not is_dataset(tmp_path / "else")
    remove_dataset(sharded)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("corpus")]


def test_what_does_not_belong_together_is_refused(sharded: Path, tmp_path: Path) -> None:
    path = manifest_path(sharded)
    sound = json.loads(path.read_bytes())
    sound.pop("manifest_crc32")

    def refusal(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            open_corpus(sharded)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "damaged or was edited" in refusal(encode_manifest(sound | {"num_tokens": 14}))
    assert "damaged or was edited" in refusal(encode_manifest(sound).replace(b'"text"', b'"tent"'))
    assert "damaged or was edited" in refusal(encode_manifest(sound)[:-9])
    assert "damaged or was edited" in refusal(encode_manifest(sound | {"shards": []}))
    assert "damaged or was edited" in refusal(encode_manifest(sound | {"shards": {"name": "x"}}))
    assert "version 2" in refusal(encode_manifest(sound | {"version": 2}))
    changed = [sound["shards"][0] | {"num_tokens": 3}, *sound["shards"][1:]]
    assert "is not the shard" in refusal(encode_manifest(sound | {"shards": changed}))
    fourth = {"name": "corpus-00003"}
    assert "corpus-00003.idx is missing" in refusal(encode_manifest(sound | {"shards": [*sound["shards"], fourth]}))
    for entry in ({}, "x", {"name": "../corpus-00000"}, {"name": 5}, {"name": "x\0"}):
        assert "damaged or was edited" in refusal(encode_manifest(sound | {"shards": [entry]}))
    assert "damaged or was edited" in refusal(encode_manifest(sound | {"shards": sound["shards"][:2]}))
    write(tmp_path / "wide", [[1]])
    with IndexedDatasetWriter(tmp_path / "narrow", "uint8") as writer:
        writer.add_document([1])
        writer.finalize({})
    with pytest.raises(UserError, match=r"narrow holds uint8 ids, .*wide uint16"):
        Corpus(tmp_path, [open_corpus(tmp_path / name).shards[0] for name in ("wide", "narrow")])


def test_open_corpora_keep_no_files_open(plain: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    corpora = [open_corpus(plain) for _ in range(100)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not corpora[0].pieces[0].flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        corpora[0].pieces[0].flags.writeable = True


def test_the_fingerprint_of_a_large_corpus(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, 100_000).astype(np.uint16)
    cuts = [0, 391, 40_000, 70_001, 100_000]
    write(tmp_path / "plain", [tokens.tolist()])
    for number, (begin, end) in enumerate(pairwise(cuts)):
        write(shard_prefix(tmp_path / "many", number), [tokens[begin:end].tolist()])
    publish_sharded(tmp_path / "many", 4, {})
    starts = np.linspace(0, tokens.size - 64, 256, dtype=np.int64)
    digest = hashlib.sha256(tokens[starts[:, None] + np.arange(64)].astype("<i8").tobytes())
    for name in ("plain", "many"):
        assert open_corpus(tmp_path / name).describe()["fingerprint"] == digest.hexdigest()[:16]
