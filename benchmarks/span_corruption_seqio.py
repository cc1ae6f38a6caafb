"""Worker of span_corruption.py: makes samples with Google's seqio and t5, whose input pipeline T5 was trained with.

Runs in a process of its own with an interpreter that has them, since they need TensorFlow. Documents come from memory,
already tokenized; what is measured is span corruption, EOS and the conversion to batches, on one thread.
Protocol: prints a JSON object of facts once it is ready; then, for every number read from stdin, makes as many
samples and prints the seconds of CPU time that took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 128
MOST_DOCUMENTS = 50_000


def batches(prefix: str, vocab_size: int, lengths: dict[str, int], document_tokens: int) -> Iterator[dict[str, Any]]:
    """Batches of T5's pretraining task, epoch after epoch."""
    import seqio
    import tensorflow as tf
    from t5.data import preprocessors

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tokens = np.fromfile(Path(prefix + ".bin"), np.uint16, MOST_DOCUMENTS * document_tokens)
    documents = tf.constant(tokens.reshape(-1, document_tokens), tf.int32)
    features = {
        side: seqio.Feature(seqio.PassThroughVocabulary(vocab_size, eos_id=1), add_eos=True, dtype=tf.int32)
        for side in ("inputs", "targets")
    }
    dataset = tf.data.Dataset.from_tensor_slices({"targets": documents}).repeat()
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    dataset = preprocessors.span_corruption(dataset.with_options(options), lengths, features)
    dataset = seqio.preprocessors.append_eos_after_trim(dataset, features, lengths)
    dataset = seqio.EncDecFeatureConverter(pack=False)(dataset, lengths)
    return iter(dataset.batch(BATCH_SIZE).as_numpy_iterator())


def main() -> None:
    """Arguments: prefix of the dataset, vocabulary size, encoder length, decoder length, tokens of a document."""
    prefix, *numbers = sys.argv[1:]
    vocab_size, encoder_length, decoder_length, document_tokens = map(int, numbers)
    source = batches(prefix, vocab_size, {"inputs": encoder_length, "targets": decoder_length}, document_tokens)
    rows = [next(source) for _ in range(4)]
    encoder = np.concatenate([batch["encoder_input_tokens"] for batch in rows])
    labels = np.concatenate([batch["decoder_target_tokens"] for batch in rows])
    sentinels = vocab_size - 100
    text = sum(np.count_nonzero((ids > 1) & (ids < sentinels)) for ids in (encoder, labels))
    facts = {
        "encoder_padding": float((encoder == 0).mean()),
        "decoder_padding": float((labels == 0).mean()),
        "raw_tokens_per_sample": text / len(encoder),
        "row_bytes_per_sample": sum(array.nbytes for array in rows[0].values()) // BATCH_SIZE,
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        began = time.process_time()
        for _ in range(int(line) // BATCH_SIZE):
            next(source)
        print(time.process_time() - began, flush=True)


if __name__ == "__main__":
    main()
