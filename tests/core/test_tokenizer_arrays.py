"""Ids as arrays are those of the lists, also where texts contain reserved pieces."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron.core.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from tests.corpora import write_prose

TEXTS = ["", "some words", "</s> and <extra_id_0>, <extra_id_1>\u00e9", "", "<pad>", "a\0b \U0001f600 " * 50, ""]


@pytest.fixture(scope="module")
def with_own_sentinels(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("arrays")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(write_prose(folder / "prose.jsonl").read_text().splitlines()[:200]),
        model_writer=model, vocab_size=300, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        user_defined_symbols=["<extra_id_0>", "<extra_id_1>"], minloglevel=2,
    )  # fmt: skip
    path: Path = folder / "own.model"
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def check(tokenizer: Tokenizer, texts: list[str]) -> None:
    rows = tokenizer.tokenize_batch(texts)
    ids, lengths = tokenizer.tokenize_to_arrays(texts)
    assert lengths.tolist() == [len(row) for row in rows]
    assert ids.tolist() == [i for row in rows for i in row] and ids.dtype == np.int32


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:2], [""], []], ids=len)
def test_arrays_equal_lists(with_own_sentinels: SentencePieceTokenizer, texts: list[str]) -> None:
    check(ByteTokenizer(), texts)
    check(with_own_sentinels, texts)
    if texts == TEXTS:
        ids, _ = with_own_sentinels.tokenize_to_arrays(texts)
        assert not np.isin(ids, [*with_own_sentinels.sentinel_ids, 0, 1]).any()
