"""Samples a second on one core: all objectives here, span corruption in three peers.

The peers are a numpy collator, Megatron-LM's T5 dataset, and seqio where an interpreter that has it is named. All but
the packed rows read the same indexed dataset of random ids, whose documents have 600 tokens each: what suits
Megatron-LM best, which makes one sample of the first 510 tokens of a document. Rows are packed from documents of 20 to
400 tokens. The contenders take turns, round after round; a row is a median over the rounds. Times are CPU time of the
(single-threaded) process that does the work, so that neighbours on the machine disturb little. Prints one JSON object a
row; what a peer could not be measured for is a row too.

    python benchmarks/span_corruption.py [--output benchmarks/results/span_corruption.jsonl] [--seqio-python P]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import publish

from megatron.core.config import DataConfig
from megatron.core.datasets.corpus import Corpus, CorpusRange, open_corpus, split_corpus
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.indexed_dataset import IndexedDatasetWriter
from megatron.core.datasets.loader import Dataset
from megatron.core.datasets.packed_documents import PackedDocumentsDataset
from megatron.core.datasets.t5_dataset import DenoisingDataset, SpecialTokens

TEXT_IDS = 32_000  # below them the ids of the corpora, above them sentinels
VOCAB_SIZE = TEXT_IDS + 100
SPECIAL = SpecialTokens(
    VOCAB_SIZE, pad_id=0, eos_id=1, decoder_start_id=0, sentinel_ids=tuple(range(VOCAB_SIZE - 1, TEXT_IDS - 1, -1))
)
# UL2's densest denoiser has 128 spans.
MANY_SENTINELS = SpecialTokens(
    TEXT_IDS + 200, pad_id=0, eos_id=1, decoder_start_id=0, sentinel_ids=tuple(range(TEXT_IDS + 199, TEXT_IDS - 1, -1))
)
DOCUMENT_TOKENS = 600
SHORT_DOCUMENTS = (20, 400)
MEGATRON_DECODER_LENGTH = 128  # Megatron-LM's published setting; its targets vary in length, 114 would not hold them


class Contender:
    """One row of the result: makes samples when asked, and remembers how fast it was."""

    def __init__(self, name: str, samples_per_round: int, run: Callable[[int], float], facts: dict[str, Any]) -> None:
        """`run(n)` makes n samples and returns the seconds that took; `facts` describe a sample."""
        self.name = name
        self.samples_per_round = samples_per_round
        self.run = run
        self.facts = facts
        self.rates: list[float] = []

    def round(self) -> None:
        """Measure once."""
        self.rates.append(self.samples_per_round / self.run(self.samples_per_round))

    def row(self) -> dict[str, Any]:
        """Medians over the rounds."""
        rate = statistics.median(self.rates)
        raw_tokens, row_bytes = self.facts["raw_tokens_per_sample"], self.facts["row_bytes_per_sample"]
        return {
            "name": self.name,
            "samples_per_s": round(rate, 1),
            "samples_per_s_range": [round(min(self.rates), 1), round(max(self.rates), 1)],
            "raw_tokens_per_s": round(rate * raw_tokens),
            "gb_per_s": round(rate * (2 * raw_tokens + row_bytes) / 1e9, 4),  # uint16 ids read + rows written
            **{name: round(value, 4) if isinstance(value, float) else value for name, value in self.facts.items()},
        }


def write_corpus(prefix: Path, num_tokens: int, shortest: int, longest: int) -> Corpus:
    """An indexed dataset of random ids below the sentinels, in documents of these lengths."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(num_tokens // 600_000):
            lengths = rng.integers(shortest, longest, 1_200_000 // (shortest + longest), endpoint=True)
            writer.add_documents(rng.integers(5, TEXT_IDS, lengths.sum(), dtype=np.uint16), lengths)
        writer.finalize()
    return open_corpus(prefix)


def whole(corpus: Corpus) -> CorpusRange:
    """All documents."""
    return split_corpus(corpus, (1.0, 0.0, 0.0), str(corpus.prefix))["train"]


def ours(name: str, dataset: Dataset, batch_size: int, samples_per_round: int) -> Contender:
    """The public interface, arrays allocated anew for each batch."""
    consumed = 0

    def run(count: int) -> float:
        nonlocal consumed
        began = time.process_time()
        for first in range(consumed, consumed + count, batch_size):
            dataset.batch(np.arange(first, first + batch_size))
        consumed += count
        return time.process_time() - began

    rows = dataset.batch(np.arange(4096))
    text = sum(np.count_nonzero((ids >= 5) & (ids < TEXT_IDS)) for ids in (rows.encoder_input_ids, rows.labels))
    facts = {
        "batch_size": batch_size,
        "encoder_length": dataset.encoder_length,
        "decoder_length": dataset.decoder_length,
        "encoder_padding": float((rows.encoder_input_ids == SPECIAL.pad_id).mean()),
        "decoder_padding": float((rows.labels < 0).mean()),
        "raw_tokens_per_sample": text / 4096,
        "row_bytes_per_sample": sum(ids.nbytes for ids in rows if ids is not None) // 4096,
    }
    return Contender(f"megatron-t5, {name}", samples_per_round, run, facts)


def our_objectives(corpus: Corpus, short: Corpus) -> list[Contender]:
    """A row for each objective."""

    def dataset(**flags: Any) -> Dataset:
        config = DataConfig(encoder_seq_length=512, **flags)
        special = MANY_SENTINELS if config.objective == "ul2" else SPECIAL
        plan = DenoisingPlan.build(config, len(special.sentinel_ids), lambda mode: (2 + len(mode) % 3,))
        if config.packing == "segments":
            return PackedDocumentsDataset([whole(short)], plan, special, 0, "train")
        return DenoisingDataset([whole(corpus)], plan, special, 0, "train")

    spans = dataset()
    return [
        ours("span corruption", spans, batch_size=128, samples_per_round=128 * 1000),
        ours("span corruption", spans, batch_size=8, samples_per_round=8 * 4000),
        ours("UL2", dataset(objective="ul2"), batch_size=128, samples_per_round=128 * 500),
        ours("prefix LM, pairs", dataset(objective="prefix-lm"), batch_size=128, samples_per_round=128 * 500),
        ours("span corruption, packed", dataset(packing="segments"), batch_size=128, samples_per_round=128 * 200),
        ours("UL2, packed", dataset(objective="ul2", packing="segments"), batch_size=128, samples_per_round=128 * 200),
    ]


# The collator of Hugging Face's run_t5_mlm_flax.py as an algorithm: per example, two shuffled boolean vectors give
# the span lengths; per batch, sentinels and a filter make the rows. Written anew here, a little faster than there
# (bincount in place of a sort).


def random_segments(items: int, segments: int, rng: np.random.RandomState) -> NDArray[np.int64]:
    """Lengths of `segments` non-empty parts of `items`, [segments]."""
    starts = np.arange(items - 1) < segments - 1
    rng.shuffle(starts)
    return np.bincount(np.cumsum(np.concatenate([[False], starts])), minlength=segments)


def noise_mask(raw: int, noise: int, spans: int, rng: np.random.RandomState) -> NDArray[np.bool_]:
    """True where a token is noise, [raw]."""
    noise_lengths = random_segments(noise, spans, rng)
    kept_lengths = random_segments(raw - noise, spans, rng)
    lengths = np.stack([kept_lengths, noise_lengths], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def replace_spans(tokens: NDArray[np.int64], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Each masked span as one sentinel, then EOS; [b, raw] -> [b, unmasked + spans + 1]."""
    starts = mask & ~np.pad(mask[:, :-1], ((0, 0), (1, 0)))
    sentinels = VOCAB_SIZE - np.cumsum(starts, axis=1)
    rows = np.where(starts, sentinels, tokens)[~mask | starts].reshape(len(tokens), -1)
    return np.concatenate([rows, np.full((len(rows), 1), SPECIAL.eos_id)], axis=1)


def numpy_collator(plan: DenoisingPlan, tokens: NDArray[Any], batch_size: int, count: int) -> Contender:
    """A batch at a time, from windows at random places of the corpus."""
    raw, _, _, noise, spans = plan.windows[0]
    rng = np.random.RandomState(0)  # the generator that the script uses

    def batch() -> None:
        starts = rng.randint(0, len(tokens) - raw, batch_size)
        windows = np.stack([tokens[start : start + raw] for start in starts]).astype(np.int64)
        mask = np.stack([noise_mask(raw, noise, spans, rng) for _ in range(batch_size)])
        encoder = replace_spans(windows, mask)
        labels = replace_spans(windows, ~mask)
        decoder = np.empty_like(labels)
        decoder[:, 0], decoder[:, 1:] = SPECIAL.decoder_start_id, labels[:, :-1]
        assert encoder.shape[1] == plan.encoder_length
        assert labels.shape[1] == plan.decoder_length

    def run(count: int) -> float:
        began = time.process_time()
        for _ in range(count // batch_size):
            batch()
        return time.process_time() - began

    facts = {
        "batch_size": batch_size, "encoder_length": plan.encoder_length, "decoder_length": plan.decoder_length,
        "encoder_padding": 0.0, "decoder_padding": 0.0,
        "raw_tokens_per_sample": raw, "row_bytes_per_sample": 8 * (plan.encoder_length + 2 * plan.decoder_length),
    }  # fmt: skip
    return Contender("numpy collator (algorithm of run_t5_mlm_flax.py)", count, run, facts)


class PeerUnavailableError(Exception):
    """A peer could not be brought up; says where it stopped."""


@contextmanager
def worker(
    name: str,
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    samples_per_round: int,
    facts: dict[str, Any],
) -> Iterator[Contender]:
    """A peer in a process of its own, which speaks the protocol of the span_corruption_*.py beside this file."""
    with subprocess.Popen(
        command, cwd=folder, env=os.environ | environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        answers, questions = process.stdout, process.stdin
        ready = answers.readline()
        if not ready:
            errors = [line for line in process.stderr.read().splitlines() if "Error" in line]
            raise PeerUnavailableError(errors[-1] if errors else f"the worker ended with status {process.wait()}")

        def run(count: int) -> float:
            print(count, file=questions, flush=True)
            return float(answers.readline())

        yield Contender(name, samples_per_round, run, facts | json.loads(ready))


def megatron(prefix: Path, encoder_length: int) -> AbstractContextManager[Contender]:
    """Megatron-LM's T5 dataset from its wheel, `dataset[i]` in a loop."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import megatron_oracle
    import pytest

    try:
        folder = megatron_oracle.megatron_core_directory()
    except pytest.skip.Exception as skipped:
        raise PeerUnavailableError(str(skipped)) from None
    facts = {"batch_size": 1, "encoder_length": encoder_length, "decoder_length": MEGATRON_DECODER_LENGTH}
    arguments = map(str, (prefix, VOCAB_SIZE, encoder_length, MEGATRON_DECODER_LENGTH))
    script = str(Path(__file__).with_name("span_corruption_megatron.py"))
    name = f"Megatron-LM T5MaskedWordPieceDataset (megatron-core {megatron_oracle.VERSION})"
    command = [sys.executable, "-W", "ignore", script, *arguments]
    return worker(name, command, prefix.parent, {"PYTHONPATH": str(folder)}, 80, facts)


def seqio(prefix: Path, plan: DenoisingPlan, python: str | None) -> AbstractContextManager[Contender]:
    """The input pipeline of Google's T5."""
    if python is None:
        raise PeerUnavailableError("it needs TensorFlow; name an interpreter that has seqio and t5 with --seqio-python")
    facts = {"batch_size": 128, "encoder_length": plan.encoder_length, "decoder_length": plan.decoder_length}
    arguments = map(str, (prefix, VOCAB_SIZE, plan.encoder_length, plan.decoder_length, DOCUMENT_TOKENS))
    script = str(Path(__file__).with_name("span_corruption_seqio.py"))
    environment = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return worker(
        "seqio, t5.data span_corruption", [python, script, *arguments], prefix.parent, environment, 1280, facts
    )


def bring_up(
    stack: ExitStack, name: str, start: Callable[[], AbstractContextManager[Contender]]
) -> Contender | dict[str, Any]:
    """The peer, or the row that says why there is none."""
    try:
        return stack.enter_context(start())
    except PeerUnavailableError as error:
        return {"name": name, "stopped_at": str(error)}


def measure(folder: Path, num_tokens: int, rounds: int, seqio_python: str | None) -> list[dict[str, Any]]:
    """All rows, ours first."""
    prefix = folder / "corpus"
    corpus = write_corpus(prefix, num_tokens, DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    short = write_corpus(folder / "short", num_tokens // 4, *SHORT_DOCUMENTS)
    config = DataConfig(encoder_seq_length=512)
    plan = DenoisingPlan.build(config, len(SPECIAL.sentinel_ids))
    contenders = our_objectives(corpus, short)
    peers = [numpy_collator(plan, corpus.pieces[0], batch_size=128, count=128 * 16)]
    with ExitStack() as stack:
        found = [
            bring_up(stack, "Megatron-LM", lambda: megatron(prefix, config.encoder_seq_length)),
            bring_up(stack, "seqio", lambda: seqio(prefix, plan, seqio_python)),
        ]
        peers += [peer for peer in found if isinstance(peer, Contender)]
        for _ in range(rounds + 1):
            for contender in contenders + peers:
                contender.round()
    for contender in contenders + peers:
        del contender.rates[0]  # the warm-up
    rows = [contender.row() for contender in contenders]
    best = rows[0]["samples_per_s"]
    rows += [row | {"ours_is_faster_by": round(best / row["samples_per_s"], 2)} for row in (p.row() for p in peers)]
    return rows + [peer for peer in found if isinstance(peer, dict)]


def main() -> None:
    """Measure, print, and save when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows to this file too")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds; one more warms up")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens of the corpus, 2 bytes each")
    parser.add_argument("--seqio-python", help="Python interpreter of an environment with seqio, t5 and TensorFlow")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.tokens, options.rounds, options.seqio_python)
    publish(rows, options.output, "span_corruption", cores_used=1, corpus_tokens=options.tokens, rounds=options.rounds)


if __name__ == "__main__":
    main()
