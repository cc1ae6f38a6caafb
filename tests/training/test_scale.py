"""Runs on corpora without end: what is opened and read does not grow with the corpus, nor with the training."""

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from benchmarks.sparse_corpus import DOCUMENT_TOKENS, samples_of_both_ends, write_sparse_dataset, wrong_samples
from megatron.core.datasets.t5_dataset import DenoisingDataset
from megatron.training.arguments import parse_args
from megatron.training.data import TrainingData, open_data
from tests.corpora import make_byte_dataset, write_prose

BYTES = 259  # ids of bytes and special tokens; the sentinels come after them
MIB = 1 << 20


def opened(*flags: str) -> tuple[TrainingData, int]:
    """The data of a run, and the bytes of memory that it takes with the first batch."""
    config = parse_args(["--preset", "t5-v1_1-small", *flags]).config
    tracemalloc.start()
    data = open_data(config)
    batch = data.train.batch(np.arange(8))
    assert batch.encoder_input_ids.shape[0] == 8
    del batch
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return data, memory


def test_a_trillion_tokens(tmp_path: Path) -> None:
    """10^9 documents; the files have holes where nothing is read."""
    prefix = tmp_path / "sparse"
    try:
        write_sparse_dataset(prefix, 10**9)
    except OSError as error:
        pytest.skip(f"no files of this size here: {error}")
    flags = ["--tokenizer-type", "ByteTokenizer", "--split", "969,30,1", "--data-path", str(prefix)]
    data, memory = opened(*flags)
    assert memory < 4 * MIB
    train, valid = data.train, data.valid
    assert isinstance(train, DenoisingDataset) and isinstance(valid, DenoisingDataset)
    num_tokens = 969 * 10**6 * DOCUMENT_TOKENS
    assert train.parts[0].tokens == (0, num_tokens) and valid.parts[0].tokens[1] == 999 * 10**6 * DOCUMENT_TOKENS
    assert train.parts[0].corpus.num_documents == 10**9
    last = train.windows_per_epoch
    ids = np.concatenate([samples_of_both_ends(train, 16), np.arange(16), np.arange(last - 16, last + 16)])
    assert wrong_samples(train, prefix, ids, BYTES) == 0


def test_a_thousand_corpora_and_any_length_of_the_training(tmp_path: Path) -> None:
    dataset = make_byte_dataset(write_prose(tmp_path / "corpus.jsonl"))
    entries = []
    for n in range(1000):
        for ending in ("bin", "idx", "json"):
            shutil.copy(f"{dataset}_text_document.{ending}", tmp_path / f"corpus{n}.{ending}")
        entries.append(f"  - {{path: corpus{n}, weight: {1 + n % 7}}}\n")
    (tmp_path / "blend.yaml").write_text("corpora:\n" + "".join(entries))
    memories = []
    for iterations in (10**4, 10**9):
        flags = ["--data-config", str(tmp_path / "blend.yaml"), "--split", "9,1", "--train-iters", str(iterations)]
        data, memory = opened(*flags)
        memories.append(memory)
        train = data.train
        assert len(data.corpora) == 1000 and isinstance(train, DenoisingDataset) and train.blend is not None
        assert train.blend.block_length < 10**4
    assert memories[1] <= memories[0] + MIB // 8
    # The batch of the last step, of other corpora than that of the first.
    ids = 8 * (10**9 - 1) + np.arange(8)
    assert train.batch(ids).encoder_input_ids.shape == (8, train.encoder_length)
    assert train.blend.draws(ids)[1].min() > 10**6
