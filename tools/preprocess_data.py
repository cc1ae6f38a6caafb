"""Tokenize text into the indexed datasets that pretrain_t5.py reads.

Writes `<output-prefix>_<key>_document.bin`, `.idx` and `.json` for each JSON key, and a copy of the tokenizer in
`<output-prefix>_<key>_document_tokenizer/`. Exit status: 0 done, 1 an input or flag value is wrong, 2 unknown flag,
128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.training.arguments import Parser, add_group_flags, add_input_flags, exit_status, group_config


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program, in Megatron-LM's spelling."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [flags]")
    group = add_input_flags(parser)
    group.add_argument(
        "--text-sample-by", choices=["line", "paragraph", "document"], default="line",
        help="a document of a .txt file is a line (default), what blank lines separate, or the whole file",
    )  # fmt: skip
    add_group_flags(parser, "tokenizer")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="start of the names of all output")
    group.add_argument("--append-eod", action="store_true", help="end each document with the end-of-sequence id")
    group.add_argument("--overwrite", action="store_true", help="replace datasets of this prefix")
    group.add_argument(
        "--shard-tokens", type=int, metavar="N",
        help="cut each dataset into shards that end with the document that reaches N tokens; they are used as one",
    )  # fmt: skip
    group = parser.add_argument_group("run")
    group.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes that tokenize; the output does not depend on it (default: the processors of this machine)",
    )  # fmt: skip
    group.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="stop at a bad record, or leave it out and count it",
    )
    group.add_argument(
        "--resume", action="store_true",
        help="go on where an earlier run with the same flags was stopped; start at the beginning if there was none",
    )  # fmt: skip
    group.add_argument(
        "--journal-interval", type=float, default=10.0, metavar="S", dest="journal_interval_s",
        help="seconds between the points that --resume can go on from (10)",
    )  # fmt: skip
    group.add_argument(
        "--log-interval", type=int, default=1000, metavar="N", help="documents between progress lines (1000)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    flags = vars(build_parser().parse_args(argv))

    def program() -> None:
        tokenizer = group_config(flags, "tokenizer")  # takes its flags out; the others are the preprocessing's
        preprocess(PreprocessConfig(**flags, tokenizer=tokenizer))

    return exit_status(program, output=flags["output_prefix"], interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
