"""Pretrain T5 by span corruption: flags -> configuration -> training loop.

One process:       python pretrain_t5.py --preset t5-v1_1-small --data-path my_corpus --save runs/small
Several processes: torchrun --nproc-per-node 8 pretrain_t5.py ... (the same flags)
What it would need: python pretrain_t5.py ... --dry-run
"""

import os

from megatron.training.arguments import parse_args, run_command_line
from megatron.training.console import warn


def main() -> int:
    """Read the flags, then train; torch is imported only once the flags are known to be good."""
    is_main = os.environ.get("RANK", "0") == "0"
    arguments = parse_args()
    for warning in arguments.warnings:
        warn(warning, is_main)

    vocab_size_given = arguments.sources["vocab_size"] in ("flag", "config file", "checkpoint")
    if arguments.dry_run.dry_run:
        from megatron.training.dry_run import dry_run

        dry_run(arguments.config, arguments.dry_run, vocab_size_given)
        return 0
    from megatron.training.training import pretrain

    return pretrain(arguments.config, vocab_size_given)


if __name__ == "__main__":
    # A mistake shows on every rank; each node says it once.
    run_command_line(main, is_printing_process=os.environ.get("LOCAL_RANK", "0") == "0")
