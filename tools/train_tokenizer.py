"""Train a SentencePiece tokenizer on the text that tools/preprocess_data.py will read.

The model has T5's special pieces (pad 0, eos 1, unk 2, no bos) and normalization. Sentinels are not part of it: they
are added behind its pieces when it is used, so that no text can contain one. The same input, flags and version of
SentencePiece give the same model. Exit status: 0 done, 1 an input or flag value is wrong, 2 unknown flag, 128 + n
stopped by signal n.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron.core.datasets.corpus_reader import find_sources, parse_records, read_chunks
from megatron.core.errors import UserError
from megatron.core.file_utils import publish_bytes
from megatron.core.tokenizers import DEFAULT_EXTRA_IDS, SentencePieceTokenizer
from megatron.training.arguments import Parser, add_input_flags, exit_status

# SentencePiece leaves out longer sentences without a word (its default limit, in bytes).
MAX_SENTENCE_BYTES = 4192


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [flags]")
    group = add_input_flags(parser)
    group.add_argument(
        "--input-sentence-size", "--max-sentences", type=int, default=2_000_000, metavar="N",
        help="train on a random sample of this many lines, which are held in memory; 0 takes all (2000000)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=1234, help="seed of that sample (1234)")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--vocab-size", type=int, default=32000, metavar="N",
        help="pieces, special ones included and sentinels not: 32000 and 100 sentinels are T5's 32100 ids (32000)",
    )  # fmt: skip
    group.add_argument("--model-type", choices=["unigram", "bpe"], default="unigram", help="unigram, as T5, or bpe")
    group.add_argument(
        "--character-coverage", type=float, default=0.9995, metavar="X",
        help="share of the characters that get a piece of their own, at least; the rest is unknown (0.9995)",
    )  # fmt: skip
    group.add_argument("--byte-fallback", action="store_true", help="spell unknown characters with 256 byte pieces")
    group = parser.add_argument_group("output")
    output = group.add_mutually_exclusive_group(required=True)
    output.add_argument("--output", metavar="FILE", help="the model file to write, named *.model")
    output.add_argument("--output-prefix", metavar="PREFIX", help="write <PREFIX>.model")
    group.add_argument("--overwrite", action="store_true", help="replace a model that exists")
    return parser


def iterate_lines(flags: argparse.Namespace) -> Iterator[str]:
    """Lines of all texts, long ones cut to what SentencePiece takes.

    Raises:
        UserError: a record or file cannot be read.
    """
    for source in find_sources(flags.input, flags.input_format):
        for chunk in read_chunks(source, keys=flags.json_keys):
            for record in parse_records(chunk, flags.json_keys):
                if record.reason is not None:
                    raise UserError(f"{chunk.place(record.line)}: {record.detail}; mend the record or remove it")
                # Plain text has the same text for every key.
                for text in dict.fromkeys(record.texts):
                    yield from cut_lines(text)
            if chunk.error is not None:
                raise UserError(f"{chunk.place(chunk.first_line)}: cannot be read from here on: {chunk.error}")


def cut_lines(text: str, max_bytes: int = MAX_SENTENCE_BYTES) -> Iterator[str]:
    """Lines of a text that are not blank, in pieces of at most `max_bytes` of UTF-8, cut at spaces if possible."""
    for line in text.split("\n"):
        rest = line.strip()
        while len(rest.encode()) > max_bytes:
            head = rest.encode()[:max_bytes].decode(errors="ignore")
            cut = head.rfind(" ")
            cut = cut if cut > 0 else len(head)
            yield rest[:cut].rstrip()
            rest = rest[cut:].strip()
        if rest:
            yield rest


def sample(lines: Iterator[str], size: int, seed: int) -> list[str]:
    """A uniform sample of `size` lines (reservoir sampling), all of them when `size` is 0.

    SentencePiece can sample too, but its generator is not seeded alike in two processes.
    """
    if size == 0:
        return list(lines)
    generator = random.Random(seed)
    reservoir: list[str] = []
    for seen, line in enumerate(lines):
        if seen < size:
            reservoir.append(line)
        elif (slot := generator.randrange(seen + 1)) < size:
            reservoir[slot] = line
    return reservoir


def train(flags: argparse.Namespace) -> bytes:
    """Train and return the serialized model.

    Raises:
        UserError: the input is unusable, or the vocabulary size does not suit it.
    """
    import sentencepiece

    lines = sample(iterate_lines(flags), flags.input_sentence_size, flags.seed)
    model = io.BytesIO()
    try:
        in_thread(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=flags.model_type,
            vocab_size=flags.vocab_size,
            character_coverage=flags.character_coverage,
            byte_fallback=flags.byte_fallback,
            max_sentence_length=MAX_SENTENCE_BYTES,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            num_threads=16,  # sums of floats, and so the model, depend on it: not the machine's number
            minloglevel=1,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(explain(str(error), flags)) from error
    return model.getvalue()


def in_thread(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function that runs for long outside of Python, in a thread, so that signals are handled meanwhile.

    After a signal it still runs: the program has to end by `os._exit`.
    """
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(**arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result()


def explain(message: str, flags: argparse.Namespace) -> str:
    """One line for the user from an error message of SentencePiece's trainer."""
    if match := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        return (
            f"--vocab-size is {flags.vocab_size}; this text is enough for {match[1]} pieces at most: "
            "give a smaller size or more text"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size is {flags.vocab_size}; the characters of this text alone need {match[1]} pieces: "
            "give a larger size or lower --character-coverage"
        )
    if "sentences_.empty()" in message:
        return f"--input {' '.join(flags.input)}: no text under {' '.join(map(repr, flags.json_keys))}"
    return f"SentencePiece could not train on --input {' '.join(flags.input)}: {' '.join(message.split())}"


def run(flags: argparse.Namespace) -> None:
    """Check the flags, train, publish the model, and say what to do next."""
    path = Path(flags.output or f"{flags.output_prefix}.model")
    if path.suffix != ".model":
        raise UserError(f"--output {path}: name it *.model, by which the other programs know a SentencePiece model")
    if path.is_dir():
        raise UserError(f"--output {path} is a directory; give the name of a file")
    if path.exists() and not flags.overwrite:
        raise UserError(f"{path} exists; give another name, or --overwrite to replace it")
    if not 4 <= flags.vocab_size < 2**31:
        raise UserError(f"--vocab-size is {flags.vocab_size}; it must be at least 4 and less than 2**31")
    if not 0.98 <= flags.character_coverage <= 1.0:
        raise UserError(f"--character-coverage is {flags.character_coverage}; it must lie between 0.98 and 1")
    if flags.input_sentence_size < 0:
        raise UserError(f"--input-sentence-size is {flags.input_sentence_size}; it must not be negative")
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(path, train(flags))
    tokenizer = SentencePieceTokenizer(path)
    print(f"wrote {path}: {flags.vocab_size} pieces + {DEFAULT_EXTRA_IDS} sentinels = {tokenizer.vocab_size} ids")
    command = ["python", "tools/preprocess_data.py", "--input", *flags.input, "--json-keys", *flags.json_keys]
    command += ["--input-format", flags.input_format, "--tokenizer-model", str(path)]
    print(f"next: {shlex.join(command)} --output-prefix my_data")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    flags = build_parser().parse_args(argv)
    output = flags.output or f"{flags.output_prefix}.model"
    return exit_status(lambda: run(flags), output, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: see in_thread
