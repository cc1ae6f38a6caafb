"""Fixtures that several test folders share."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from tests.corpora import make_byte_dataset, write_prose

# Without a GPU, kernels of Triton run in its interpreter; what is set when they are defined decides.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that runs the tests in the background, or nohup, has these ignored, which tests of signals would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl corpus of prose."""
    return write_prose(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="session")
def byte_dataset(text_corpus: Path) -> Path:
    """`--data-path` of the corpus in bytes (ByT5's ids)."""
    return make_byte_dataset(text_corpus)


@pytest.fixture(scope="session")
def wordpiece_vocab(text_corpus: Path) -> Path:
    """A small BERT vocabulary file that covers the corpus."""
    text = "".join(json.loads(line)["text"] for line in text_corpus.read_text(encoding="utf-8").splitlines())
    words = sorted({word for word in text.split() if word.isalpha()}, key=lambda word: (-text.count(word), word))[:500]
    characters = sorted({character for character in text if not character.isspace()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters), *words]
    path = text_corpus.with_name("vocab.txt")
    path.write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def wordpiece_dataset(text_corpus: Path, wordpiece_vocab: Path) -> Path:
    """`--data-path` of the corpus in word pieces."""
    prefix = text_corpus.with_name("my_data_collection")
    tokenizer = TokenizerConfig(tokenizer_type="BertWordPieceCase", vocab_file=str(wordpiece_vocab))
    preprocess(PreprocessConfig(input=[str(text_corpus)], output_prefix=str(prefix), tokenizer=tokenizer))
    return prefix
