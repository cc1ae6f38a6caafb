"""Megabytes of text a second from JSON lines to an indexed dataset, beside the tokenizer alone.

The corpus is the text found on this machine (documentation and installed sources, each file once), the SentencePiece
model a unigram of 32,000 pieces trained on it, the Hugging Face tokenizer its conversion and a byte-level BPE of the
same size trained on the same lines. All of this is made once, in a cache outside the repository. Contenders take
turns, round after round; a row is a median over the rounds, of wall-clock time for texts in UTF-8:

    raw         the library alone, texts in memory: one call for each megabyte of text in each of so many threads
    raw numpy   the same, but asked for arrays in place of lists, where the library can (SentencePiece)
    ours        tools/preprocess_data.py, from the file to the published dataset
    Megatron-LM its own tools/preprocess_data.py, if `--megatron` names its sources

Programs start for each round; what they take for a corpus of one line, `start_s`, is measured in every round, too, and
does not count in `mb_per_s` (`mb_per_s_with_start` has it). `of_raw` is the ratio to the faster raw contender of as
many threads, round by round; `cpu_s` counts all processes. Prints one JSON object a row.

    python benchmarks/preprocess.py [--rounds 5] [--megabytes 100] [--output benchmarks/results/preprocess.jsonl]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from report import publish

ROOT = Path(__file__).resolve().parents[1]
ROOTS = (Path("/usr/share/doc"), Path("/usr/lib"), Path(sys.prefix) / "lib")
SUFFIXES = {".rst", ".md", ".py", ".txt", ".html"}
LEAST_BYTES, MOST_BYTES = 500, 2_000_000
VOCAB_SIZE = 32_000
TRAINING_LINES = 300_000
BATCH_BYTES = 1 << 20


class Contender:
    """One row of the result."""

    def __init__(
        self, name: str, tokenizer: str, threads: int, run: Callable[[], Any], start: Callable[[], Any] | None = None
    ) -> None:
        """`run()` does the work on the whole corpus once, `start()` on next to nothing."""
        self.name, self.tokenizer, self.threads, self.run, self.start = name, tokenizer, threads, run, start
        self.seconds: list[float] = []  # without the start
        self.start_s: list[float] = []
        self.cpu_s: list[float] = []

    def round(self) -> None:
        """Measure once."""
        start_s = timed(self.start) if self.start is not None else 0.0
        cpu = cpu_seconds()
        self.seconds.append(timed(self.run) - start_s)
        self.cpu_s.append(cpu_seconds() - cpu)
        self.start_s.append(start_s)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.monotonic()
    run()
    return time.monotonic() - began


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def found_texts() -> Iterator[str]:
    """Text files of this machine in a fixed order, each content once."""
    seen = set()
    for root in ROOTS:
        for path in sorted(root.rglob("*")):
            if path.suffix not in SUFFIXES or path.is_symlink() or not path.is_file():
                continue
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen or not LEAST_BYTES <= len(content) <= MOST_BYTES:
                continue
            seen.add(digest)
            try:
                yield content.decode()
            except UnicodeDecodeError:
                continue


def prepare(cache: Path, megabytes: int) -> dict[str, Path]:
    """Corpus and tokenizers, made where they are missing."""
    cache.mkdir(parents=True, exist_ok=True)
    corpus, model = cache / f"corpus-{megabytes}.jsonl", cache / "unigram.model"
    bpe, unigram = cache / "bpe.json", cache / "unigram.json"
    if not corpus.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            partial = Path(folder) / "corpus"
            with partial.open("w") as file:
                left = megabytes * 10**6
                for text in spread(list(found_texts()), left):
                    file.write(json.dumps({"text": text}) + "\n")
            partial.rename(corpus)
    if not model.exists():
        train_unigram(corpus, model)
    if not bpe.exists():
        train_bpe(corpus, bpe)
    if not unigram.exists():
        convert(model, unigram)
    return {"corpus": corpus, "SentencePiece unigram": model, "Hugging Face BPE": bpe, "Hugging Face unigram": unigram}


def spread(texts: list[str], size: int) -> list[str]:
    """Every n-th of the texts, so that they make about `size` bytes.

    Raises:
        SystemExit: there is less.
    """
    total = sum(len(text.encode()) for text in texts)
    if total < size:
        sys.exit(f"only {total / 1e6:.0f} MB of text on this machine; give --megabytes {total // 10**6}")
    taken, chosen = 0, []
    for n, text in enumerate(texts):
        if (n + 1) * size // len(texts) > taken or not chosen:
            chosen.append(text)
            taken += len(text.encode())
    return chosen


def training_lines(corpus: Path) -> list[str]:
    """Lines of the corpus, evenly spread."""
    with corpus.open() as file:
        lines = [line.strip()[:1000] for row in file for line in json.loads(row)["text"].split("\n") if line.strip()]
    return lines[:: max(len(lines) // TRAINING_LINES, 1)]


def train_unigram(corpus: Path, model: Path) -> None:
    """The SentencePiece model."""
    import sentencepiece

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_lines(corpus)), model_writer=content, vocab_size=VOCAB_SIZE,
        character_coverage=0.9995, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=16, minloglevel=1,
    )  # fmt: skip
    model.write_bytes(content.getvalue())


def train_bpe(corpus: Path, file: Path) -> None:
    """A byte-level BPE for the package `tokenizers`."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(training_lines(corpus), trainer)
    tokenizer.save(str(file))


def convert(model: Path, file: Path) -> None:
    """The SentencePiece model as a tokenizer.json: the same pieces and scores, and T5's treatment of spaces."""
    import sentencepiece
    import tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    scores = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=pieces.unk_id()))
    replace = tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFKC(), replace])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(file))


def batches(texts: list[str]) -> list[list[str]]:
    """Texts in batches of about a megabyte."""
    found: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size >= BATCH_BYTES:
            found.append([])
            size = 0
        found[-1].append(text)
        size += len(text)
    return found


def raw_contenders(name: str, file: Path, texts: list[str], threads: int) -> Iterator[Contender]:
    """The library alone."""
    parts = batches(texts)

    def in_threads(function: Callable[[list[str]], Any]) -> Callable[[], Any]:
        def run() -> None:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(function, parts):
                    pass

        return run

    if file.suffix == ".model":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        yield Contender("raw", name, threads, in_threads(lambda part: len(model.encode(part, num_threads=1))))
        if hasattr(model, "encode_as_numpy"):
            run = in_threads(lambda part: len(model.encode_as_numpy(part, num_threads=1)))
            yield Contender("raw numpy", name, threads, run)
        return
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def ids(part: list[str]) -> int:
        return sum(len(found.ids) for found in tokenizer.encode_batch_fast(part, add_special_tokens=False))

    yield Contender("raw", name, threads, in_threads(ids))


def program(
    name: str, tokenizer: str, command: list[str], corpus: Path, workers: int, folder: Path, path: Path
) -> Contender:
    """A program that reads `--input` and writes `--output-prefix`, with `path` to find its modules at."""
    line = folder / "line.jsonl"
    line.write_text('{"text": "one line"}\n')
    command = [sys.executable, *command, "--workers", str(workers), "--log-interval", "1000000"]
    paths = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def run(source: Path) -> None:
        for old in folder.glob("out*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        arguments = ["--input", str(source), "--output-prefix", str(folder / "out")]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
        if done.returncode or not any(path.stat().st_size for path in folder.glob("out*.idx")):
            raise RuntimeError(f"{name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")

    return Contender(name, tokenizer, workers, lambda: run(corpus), lambda: run(line))


def ours(name: str, file: Path, corpus: Path, workers: int, folder: Path) -> Contender:
    """Files to dataset."""
    command = [str(ROOT / "tools" / "preprocess_data.py"), "--tokenizer-model", str(file)]
    return program("ours", name, command, corpus, workers, folder, ROOT)


def megatron_lm(name: str, file: Path, corpus: Path, workers: int, folder: Path, sources: Path) -> Contender:
    """Megatron-LM's tool, as its documentation runs it."""
    kind = "SentencePieceTokenizer" if file.suffix == ".model" else "HuggingFaceTokenizer"
    model = file
    if file.suffix == ".json":
        model = folder / file.stem
        model.mkdir(exist_ok=True)
        (model / "tokenizer.json").write_bytes(file.read_bytes())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    command = [str(sources / "tools" / "preprocess_data.py"), "--tokenizer-type", kind, "--tokenizer-model", str(model)]
    return program("Megatron-LM", name, command, corpus, workers, folder, sources)


def rows(contenders: list[Contender], megabytes: float) -> Iterator[dict[str, Any]]:
    """Medians, and ratios to the raw tokenizer."""
    for contender in contenders:
        kind = (contender.tokenizer, contender.threads)
        same = [other for other in contenders if (other.tokenizer, other.threads) == kind]
        raws = [other.seconds for other in same if other.name.startswith("raw")]
        limits = [min(times) for times in zip(*raws, strict=True)]
        ratios = [limit / found for limit, found in zip(limits, contender.seconds, strict=True)]
        row = {
            "name": contender.name,
            "tokenizer": contender.tokenizer,
            "threads": contender.threads,
            "mb_per_s": round(megabytes / statistics.median(contender.seconds), 2),
            "mb_per_s_range": [round(megabytes / f(contender.seconds), 2) for f in (max, min)],
            "of_raw": round(statistics.median(ratios), 3),
            "cpu_s": round(statistics.median(contender.cpu_s), 2),
        }
        if contender.start is not None:
            whole = [a + b for a, b in zip(contender.seconds, contender.start_s, strict=True)]
            row["start_s"] = round(statistics.median(contender.start_s), 2)
            row["mb_per_s_with_start"] = round(megabytes / statistics.median(whole), 2)
        yield row | {"mb": round(megabytes, 1), "rounds": len(contender.seconds)}


def parse_flags() -> argparse.Namespace:
    """Flags of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=100, help="of text (100)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokenizers", nargs="+", help="words that the tokenizers' names contain (all)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "megatron-t5-benchmark-preprocess")
    parser.add_argument("--megatron", type=Path, help="directory of Megatron-LM's sources (left out without)")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run all contenders and print the rows."""
    flags = parse_flags()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many threads as are named here, not those of the library
    files = prepare(flags.cache, flags.megabytes)
    corpus = files.pop("corpus")
    with corpus.open() as file:
        texts = [json.loads(row)["text"] for row in file]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    chosen = {n: f for n, f in files.items() if not flags.tokenizers or any(w in n for w in flags.tokenizers)}
    results: list[dict[str, Any]] = []
    if flags.megatron is None:
        results.append({"name": "Megatron-LM", "skipped": "no --megatron given"})
    with tempfile.TemporaryDirectory(dir=flags.cache) as name:
        folder = Path(name)
        for tokenizer, path in chosen.items():
            contenders: list[Contender] = []
            for workers in flags.workers:
                contenders += raw_contenders(tokenizer, path, texts, workers)
                contenders.append(ours(tokenizer, path, corpus, workers, folder))
                if flags.megatron is not None:
                    peer = megatron_lm(tokenizer, path, corpus, workers, folder, flags.megatron)
                    try:
                        timed(peer.start)
                    except RuntimeError as error:
                        facts = {"tokenizer": tokenizer, "threads": workers}
                        results.append({"name": peer.name, **facts, "skipped": str(error)})
                    else:
                        contenders.append(peer)
            for _ in range(flags.rounds):
                for contender in contenders:
                    contender.round()
            results += rows(contenders, megabytes)
    publish(results, flags.output, "preprocess", rounds=flags.rounds)


if __name__ == "__main__":
    main()
