"""Join datasets of one tokenizer into one, in the order in which they are named.

The result is what preprocessing all texts at once gives, `.bin` and `.idx` byte for byte. Their ids are copied by the
file system, which shares the blocks where it can, and not read. With --as-shards nothing is copied at all: the result
is a sharded corpus whose files are hard links (on another file system: shared blocks, else copies) of the datasets';
the trainer takes its prefix like that of any dataset. Exit status: 0 done, 1 an input or flag value is wrong, 2 unknown
flag, 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron.core.datasets.corpus import Corpus, open_corpus
from megatron.core.datasets.merging import find_datasets, merge, merge_as_shards, open_alike
from megatron.training.arguments import Parser, exit_status


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program, in Megatron-LM's spelling."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [flags]")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="prefixes of datasets, sharded ones too, or directories, of which all are taken, sorted by name",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the result without .bin")
    parser.add_argument("--as-shards", action="store_true", help="keep the datasets apart, as shards of one corpus")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of this prefix")
    return parser


def describe(corpus: Corpus) -> str:
    """Size of a corpus."""
    return f"{corpus.num_documents:,} documents | {corpus.num_tokens:,} tokens | {corpus.dtype.name}"


def run(flags: argparse.Namespace) -> None:
    """Join what the flags name, and say what was done."""
    start = time.monotonic()
    datasets = open_alike(find_datasets(flags.input))
    if flags.as_shards:
        ways = merge_as_shards(datasets, flags.output_prefix, flags.overwrite)
        how = ", ".join(f"{count} files {way}" for way, count in sorted(ways.items()))
    else:
        merge(datasets, flags.output_prefix, flags.overwrite)
        how = "one dataset"
    corpus = open_corpus(Path(flags.output_prefix))
    seconds = time.monotonic() - start
    print(f"wrote {flags.output_prefix}: {len(datasets)} datasets | {describe(corpus)} | {how} | {seconds:.1f} s")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    flags = build_parser().parse_args(argv)
    return exit_status(
        lambda: run(flags), output=flags.output_prefix, interrupted="interrupted; nothing unfinished is left"
    )


if __name__ == "__main__":
    sys.exit(main())
