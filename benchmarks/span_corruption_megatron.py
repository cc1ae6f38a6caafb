"""Worker of span_corruption.py: makes samples with Megatron-LM's own T5 dataset.

Runs in a process of its own with Megatron-LM's `megatron` on PYTHONPATH, since the import name is ours too.
Protocol: prints a JSON object of facts once it is ready; then, for every number read from stdin, makes as many
samples and prints the seconds of CPU time that took.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

SAMPLES_FOR_FACTS = 300


def word_piece_tokenizer(vocab_size: int) -> SimpleNamespace:
    """What Megatron's T5 dataset asks of a tokenizer; a fifth of the pieces continue a word, as in English text."""
    pieces = {i: ("##" if i % 5 == 0 else "") + f"piece{i}" for i in range(vocab_size)}
    return SimpleNamespace(
        cls=2, sep=3, mask=4, pad=0, bos=2, eos=1, eod=1, vocab_size=vocab_size, inv_vocab=pieces,
        additional_special_tokens_ids=list(range(vocab_size - 100, vocab_size)), unique_identifiers={"name": "pieces"},
    )  # fmt: skip


def build_dataset(prefix: str, vocab_size: int, encoder_length: int, decoder_length: int, cache: str) -> Any:
    """Megatron's dataset as its pretrain_t5.py sets it up: one epoch over all documents."""
    from megatron.core.datasets.utils import Split

    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.t5_dataset import (  # type: ignore[attr-defined]
        T5MaskedWordPieceDataset,
        T5MaskedWordPieceDatasetConfig,
    )

    config = T5MaskedWordPieceDatasetConfig(
        random_seed=1234, sequence_length=encoder_length, sequence_length_decoder=decoder_length,
        tokenizer=word_piece_tokenizer(vocab_size), path_to_cache=cache, split="1", blend=([prefix], None),
        masking_probability=0.15, short_sequence_probability=0.1, masking_max_ngram=10, masking_do_full_word=True,
        masking_do_permutation=False, masking_use_longer_ngrams=False, masking_use_geometric_distribution=True,
    )  # fmt: skip
    indexed = IndexedDataset(prefix)
    documents = np.arange(len(indexed.document_indices) - 1)
    return T5MaskedWordPieceDataset(indexed, prefix, documents, documents.size, Split.train, config)


def main() -> None:
    """Serve rounds until stdin ends."""
    prefix, vocab_size, encoder_length, decoder_length = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=0, world_size=1)
        dataset = build_dataset(prefix, vocab_size, encoder_length, decoder_length, scratch)
        samples = [dataset[i] for i in range(SAMPLES_FOR_FACTS)]
        facts = {
            "samples_per_epoch": len(dataset),
            "encoder_padding": 1 - float(np.mean([sample["enc_mask"].mean() for sample in samples])),
            "decoder_padding": 1 - float(np.mean([sample["loss_mask"].mean() for sample in samples])),
            "raw_tokens_per_sample": float(dataset.sample_index[:, 2].mean()),
            "row_bytes_per_sample": sum(value.nbytes for value in samples[0].values() if hasattr(value, "nbytes")),
        }
        print(json.dumps(facts), flush=True)
        first = SAMPLES_FOR_FACTS
        for line in sys.stdin:
            count = int(line)
            began = time.process_time()
            for index in range(first, first + count):
                dataset[index % len(dataset)]
            print(time.process_time() - began, flush=True)
            first += count
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
