"""Small corpora for tests, made on the spot."""

import json
from pathlib import Path
from pydoc_data import topics

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess


def write_prose(path: Path) -> Path:
    """A jsonl corpus of about 150 KB of prose: the first topics of Python's language reference."""
    texts = [topics.topics[name] for name in sorted(topics.topics)][:60]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make_byte_dataset(corpus: Path) -> Path:
    """`--data-path` of a jsonl corpus in bytes (ByT5's ids), beside it."""
    prefix = corpus.with_name("bytes")
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer")
    preprocess(PreprocessConfig(input=[str(corpus)], output_prefix=str(prefix), tokenizer=tokenizer))
    return prefix
