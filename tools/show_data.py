"""Show what the model sees: decoded inputs and targets, and statistics of the corpora and of the rows.

Takes the flags of pretrain_t5.py (those that say nothing about data are accepted and change nothing), so that the line
that starts a run shows its data:

    python tools/show_data.py --data-path corpus --objective ul2 --histogram data.png

Of large corpora a sample is looked at; time and memory do not grow with them. Text is prepared first, as the run would
do it, which then finds it done. Exit status: 0 done, 1 an input or flag
value is wrong, 2 unknown flag, 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets.loader import Dataset
from megatron.core.datasets.statistics import RowStatistics, document_lengths, row_statistics, segments_of
from megatron.core.errors import UserError
from megatron.core.tokenizers import Tokenizer
from megatron.training.arguments import exit_status, parse_args
from megatron.training.config import RunConfig
from megatron.training.data import TrainingData, open_data

ANY_SHAPE = "t5-v1_1-small"
MOST_CORPORA = 20  # that have a line each
MOST_IDS = 20
MOST_BARS = 64
PERCENTILES = (0, 25, 50, 75, 95, 100)


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [flags] [flags of pretrain_t5.py]",
    )  # fmt: skip
    parser.add_argument(
        "--show-split", choices=["train", "valid", "test"], default="train", help="the split that is shown (train)"
    )
    parser.add_argument("--show-rows", type=int, default=3, metavar="N", help="rows to print (3)")
    parser.add_argument("--first-row", type=int, default=0, metavar="N", help="number of the first one (0)")
    parser.add_argument(
        "--statistics-rows",
        type=int,
        default=2000,
        metavar="N",
        help="rows that the statistics look at, an epoch at most (2000)",
    )
    parser.add_argument(
        "--histogram", type=Path, metavar="FILE.png", help="also draw lengths and frequencies into this picture"
    )
    return parser


def readable(tokenizer: Tokenizer, ids: NDArray[np.int32]) -> str:
    """Text of the tokens of an example in one line: sentinels by name, and ends of sequence too."""
    runs = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)
    ends = ["</s>" if tokenizer.eos_id in run else "" for run in runs]
    texts = [tokenizer.detokenize(run.tolist()) + end for run, end in zip(runs, ends, strict=True)]
    return "".join(texts).replace("\n", "\\n").replace("\r", "\\r")


def rows_as_text(dataset: Dataset, tokenizer: Tokenizer, rows: range, names: Sequence[str]) -> Iterator[str]:
    """Lines about some rows: what each of their examples is made of."""
    ids = np.array(rows, np.int64)
    batch, kinds = dataset.batch(ids), dataset.row_kinds(ids)
    input_segments, target_segments = segments_of(batch)
    blend = getattr(dataset, "blend", None)
    parts = None if blend is None or not len(ids) else blend.draws(ids)[0]
    for place, row in enumerate(rows):
        examples = max(input_segments[place].max(), target_segments[place].max())
        padding = int((input_segments[place] == 0).sum()), int((target_segments[place] == 0).sum())
        source = "" if parts is None else f" | {names[parts[place]]}"
        yield f"row {row}{source} | examples {examples} | padding {padding[0]} + {padding[1]}"
        for segment in range(1, examples + 1):
            inputs = batch.encoder_input_ids[place][input_segments[place] == segment]
            targets = batch.labels[place][target_segments[place] == segment]
            kind = dataset.kinds[kinds[place, segment - 1]]
            yield f"  [{segment}] {kind}"
            yield f"    inputs  ({inputs.size}): {readable(tokenizer, inputs)}"
            yield f"    targets ({targets.size}): {readable(tokenizer, targets)}"


def about_dataset(config: RunConfig, dataset: Dataset, split: str) -> Iterator[str]:
    """Lines about the rows that the flags make."""
    data = config.data
    yield (
        f"{split} split | objective {data.objective} | packing {data.packing} | rows of {dataset.encoder_length} + "
        f"{dataset.decoder_length} tokens | {dataset.windows_per_epoch:,} rows an epoch"
    )
    yield f"expected: {dataset.tokens_per_sample:,.1f} tokens a row | fill rate {dataset.fill_rate:.1%}"


def about_corpora(data: TrainingData, dataset: Dataset, num_rows: int) -> Iterator[str]:
    """Lines about the corpora: sizes, and what the first `num_rows` rows take of each."""
    parts = getattr(dataset, "parts", None)
    if parts is None:
        for task in data.tasks:
            yield f"task {task.name}"
        return
    blend = getattr(dataset, "blend", None)
    counts = np.array([num_rows]) if blend is None else blend.counts(num_rows)
    epochs = dataset.epochs(num_rows)
    order = sorted(range(len(parts)), key=lambda n: -counts[n])
    yield f"of the first {num_rows:,} rows:"
    for n in order[:MOST_CORPORA]:
        part = parts[n]
        yield (
            f"  {part.name} | {part.num_documents:,} documents | {part.num_tokens:,} tokens | rows {counts[n]:,} "
            f"({counts[n] / max(num_rows, 1):.2%}) | {epochs[n]:.4f} epochs"
        )
    if len(order) > MOST_CORPORA:
        rest = sum(counts[n] for n in order[MOST_CORPORA:])
        yield f"  {len(order) - MOST_CORPORA:,} more corpora | rows {rest:,} ({rest / max(num_rows, 1):.2%})"


def about_lengths(name: str, lengths: NDArray[np.int64]) -> str:
    """A line with mean and percentiles."""
    if not lengths.size:
        return f"{name}: none"
    values = " | ".join(
        f"{label} {value:,.0f}"
        for label, value in zip(
            ("least", "25%", "median", "75%", "95%", "most"), np.percentile(lengths, PERCENTILES), strict=True
        )
    )
    return f"{name}: mean {lengths.mean():,.1f} | {values}"


def about_rows(statistics: RowStatistics, dataset: Dataset) -> Iterator[str]:
    """Lines about rows that were made."""
    encoder, decoder = statistics.fill_rates
    yield (
        f"{statistics.num_rows:,} rows: {statistics.tokens_per_row:,.1f} tokens a row | fill rate {encoder:.1%} of the "
        f"encoder's slots, {decoder:.1%} of the decoder's | {statistics.input_lengths.size / statistics.num_rows:.2f} "
        "examples a row"
    )
    yield about_lengths("  input tokens of an example", statistics.input_lengths)
    yield about_lengths("  target tokens of an example", statistics.target_lengths)
    total = max(int(statistics.kind_counts.sum()), 1)
    if len(dataset.kinds) > 1:
        for kind, count in zip(dataset.kinds, statistics.kind_counts.tolist(), strict=True):
            yield f"  {kind}: {count:,} examples ({count / total:.2%})"


def of_text(statistics: RowStatistics, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """How often each id comes, 0 for the special ones.  # [vocab_size]"""
    counts = statistics.id_counts.copy()
    counts[[tokenizer.pad_id, tokenizer.eos_id, *tokenizer.sentinel_ids]] = 0
    return counts


def about_ids(statistics: RowStatistics, tokenizer: Tokenizer) -> Iterator[str]:
    """Lines about how often ids come, special ones left out."""
    counts = of_text(statistics, tokenizer)
    total, used = max(int(counts.sum()), 1), int((counts > 0).sum())
    yield f"{counts.sum():,} tokens of text in them: {used:,} of {tokenizer.vocab_size:,} ids occur"
    if tokenizer.unk_id is not None:
        yield f"  unknown to the tokenizer: {counts[tokenizer.unk_id] / total:.4%}"
    most = np.argsort(-counts, kind="stable")[: min(MOST_IDS, used)]
    names = [readable(tokenizer, np.array([n])) for n in most]
    frequent = [f"{name!r} {counts[n] / total:.2%}" for n, name in zip(most, names, strict=True)]
    yield "  most frequent: " + " | ".join(frequent)


def draw(
    path: Path, title: str, documents: NDArray[np.int64] | None, statistics: RowStatistics, ids: NDArray[np.int64]
) -> None:
    """Draw the lengths of documents and examples, and the frequencies of `ids` by rank.

    Raises:
        UserError: matplotlib is missing, or the picture cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--histogram needs the package matplotlib; pip install 'megatron-t5[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((of_documents, of_ids), (of_inputs, of_targets)) = pyplot.subplots(2, 2, figsize=(10, 7))
    figure.suptitle(title)
    if documents is not None and documents.max(initial=0) > 0:
        lengths = np.maximum(documents, 1)
        edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 60).round())
        of_documents.hist(lengths, bins=edges, color="C0")
        of_documents.axvline(np.median(lengths), color="black", linestyle="--", linewidth=1)
        of_documents.annotate(
            f"median {np.median(lengths):,.0f}", (np.median(lengths), 0.95), xycoords=("data", "axes fraction"),
            xytext=(4, 0), textcoords="offset points",
        )  # fmt: skip
        of_documents.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    else:
        of_documents.set_axis_off()
    counts = np.sort(ids)[::-1]
    counts = counts[counts > 0]
    of_ids.loglog(np.arange(1, counts.size + 1), counts / max(counts.sum(), 1), color="C1")
    of_ids.set(xlabel="rank of an id", ylabel="share of the tokens of text")
    for axes, side, lengths, slots, color in (
        (of_inputs, "encoder", statistics.input_lengths, statistics.slots[0], "C2"),
        (of_targets, "decoder", statistics.target_lengths, statistics.slots[1], "C3"),
    ):
        step = -(-slots // MOST_BARS)  # as many lengths in each bar
        axes.hist(lengths, bins=np.arange(0.5, slots + step, step), color=color)
        axes.axvline(slots, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"row: {slots:,}", (slots, 0.95), xycoords=("data", "axes fraction"), xytext=(-4, 0),
            textcoords="offset points", ha="right",
        )  # fmt: skip
        axes.set(xlabel=f"{side} tokens of an example", ylabel="examples", xlim=(0, slots * 1.02))
    for axes in figure.axes:
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture format
        raise UserError(f"--histogram {path}: {error}; give a file such as data.png") from None
    finally:
        pyplot.close(figure)


def show(flags: argparse.Namespace, config: RunConfig) -> None:
    """Print everything, and draw where asked."""
    for name in ("show_rows", "first_row", "statistics_rows"):
        least = 1 if name == "statistics_rows" else 0
        if getattr(flags, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; it must be at least {least}")
    data = open_data(config)
    dataset: Dataset | None = getattr(data, flags.show_split)
    for warning in data.warnings:
        print(f"warning: {warning}")
    if dataset is None:
        raise UserError(f"there is no {flags.show_split} data; give --split a share for it, or other files")
    parts: Any = getattr(dataset, "parts", None)
    names = [] if parts is None else [part.name for part in parts]
    num_rows = min(flags.statistics_rows, dataset.windows_per_epoch)  # more would repeat, or be empty
    statistics = row_statistics(dataset, num_rows, data.special, flags.first_row)
    lines = [*about_dataset(config, dataset, flags.show_split), ""]
    lines += [*about_corpora(data, dataset, flags.first_row + num_rows), ""]
    documents = None
    if parts is not None:
        documents, all_of_them = document_lengths(parts)
        what = "all documents" if all_of_them else f"{documents.size:,} documents drawn at random"
        lines += [about_lengths(f"{what}, tokens", documents), ""]
    lines += [*about_rows(statistics, dataset), "", *about_ids(statistics, data.tokenizer), ""]
    rows = range(flags.first_row, flags.first_row + flags.show_rows)
    lines += rows_as_text(dataset, data.tokenizer, rows, names)
    print("\n".join(lines).rstrip(), flush=True)
    if flags.histogram is not None:
        source = (
            Path(names[0]).name
            if len(names) == 1
            else f"{len(names) or len(data.tasks)} {'corpora' if names else 'tasks'}"
        )
        title = f"{source}: {flags.show_split} split, {config.data.objective}, packing {config.data.packing}"
        draw(flags.histogram, title, documents, statistics, of_text(statistics, data.tokenizer))
        print(f"wrote {flags.histogram}")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    flags, of_trainer = build_parser().parse_known_args(argv)

    def program() -> None:
        # Any shape of the model, which flags may change: no data depends on it, but the trainer asks for one.
        parsed = parse_args(["--preset", ANY_SHAPE, *of_trainer], prog="show_data.py")
        show(flags, parsed.config)

    return exit_status(program, output=str(flags.histogram or "output"), interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
