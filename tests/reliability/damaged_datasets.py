"""R4: a damaged dataset is refused when it is opened or when the damage is met, and `tools/verify.py` finds all of it.

Each trial damages a copy of a small dataset and reads it as training does, in a process of its own: start-up, splits,
and all samples of three epochs of each split. Silence counts as a failure where a sample would have changed, and so
does anything but one line that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.core.datasets.t5_dataset import DenoisingDataset
from megatron.training.arguments import parse_args
from megatron.training.corpora import open_corpora
from tests.corpora import write_prose
from tests.programs import load_program
from tests.reliability.forked import outcome_in_child

VERIFY = Path(__file__).resolve().parents[2] / "tools" / "verify.py"
EPOCHS = 3
FLAGS = ["--preset", "t5-v1_1-small", "--split", "80,10,10", "--encoder-seq-length", "64", "--seed", "1"]
HEADER_FIELDS = {"magic": 0, "version": 9, "dtype": 17, "sequences": 18, "documents": 26, "lengths": 34}

Damage = Callable[[Path], None]
"""Damages the dataset of a prefix."""


def make_datasets(folder: Path) -> dict[str, Path]:
    """Two datasets of 60 documents in word pieces, `uint16` and `int32`, by dtype."""
    corpus = write_prose(folder / "corpus.jsonl")
    words = sorted({word for word in corpus.read_text().replace("\\n", " ").split() if word.isalpha()})[:300]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127)), *words]
    pieces += [f"##{chr(c)}" for c in range(33, 127)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    tokenizer = TokenizerConfig(tokenizer_type="BertWordPieceCase", vocab_file=str(folder / "vocab.txt"))
    options: dict[str, Any] = {"input": [str(corpus)], "output_prefix": str(folder / "narrow"), "tokenizer": tokenizer}
    preprocess(PreprocessConfig(**options), io.StringIO())
    narrow, wide = folder / "narrow_text_document", folder / "wide_text_document"
    dataset = IndexedDataset(narrow)
    assert dataset.manifest is not None
    kept = ("tokenizer", "tokenizer_directory", "tokenizer_files")
    with IndexedDatasetWriter(wide, "int32") as writer:
        writer.add_documents(dataset.tokens.astype("<i4"), dataset.sequence_lengths)
        writer.finalize({key: dataset.manifest[key] for key in kept})
    return {"uint16": narrow, "int32": wide}


def read_as_training_does(prefix: Path) -> str:
    """A digest of all samples of three epochs of the three splits."""
    datasets = open_corpora(parse_args([*FLAGS, "--data-path", str(prefix)]).config).datasets
    digest = hashlib.sha256()
    for split in datasets.values():
        assert isinstance(split, DenoisingDataset)
        digest.update(str(split.parts[0].tokens).encode())
        for rows in split.batch(np.arange(EPOCHS * split.windows_per_epoch))[:3]:
            digest.update(rows.tobytes())
    return f"read: {digest.hexdigest()}"


def trial(prefix: Path, damage: Damage, read: Callable[[Path], str]) -> str:
    """What reading a damaged copy of the dataset comes to."""
    with tempfile.TemporaryDirectory(dir=prefix.parent) as folder:
        for path in prefix.parent.glob(f"{prefix.name}.*"):
            shutil.copy(path, folder)
        tokenizer = IndexedDataset(prefix).manifest["tokenizer_directory"]  # type: ignore[index]
        shutil.copytree(prefix.parent / tokenizer, Path(folder) / tokenizer)
        copy = Path(folder) / prefix.name
        damage(copy)
        return outcome_in_child(lambda: read(copy))


# --- kinds of damage -----------------------------------------------------------------------------------------------


def truncated(path_of: Callable[[Path], Path], size: int) -> Damage:
    def damage(prefix: Path) -> None:
        with path_of(prefix).open("r+b") as file:
            file.truncate(size)

    return damage


def overwritten(path_of: Callable[[Path], Path], offset: int, content: bytes) -> Damage:
    def damage(prefix: Path) -> None:
        with path_of(prefix).open("r+b") as file:
            file.seek(offset)
            file.write(content)

    return damage


def bit_flipped(path_of: Callable[[Path], Path], bit: int) -> Damage:
    def damage(prefix: Path) -> None:
        content = bytearray(path_of(prefix).read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path_of(prefix).write_bytes(content)

    return damage


def truncations(prefix: Path, generator: random.Random, number: int) -> Iterator[tuple[str, Damage]]:
    sequences, index = IndexedDataset(prefix).num_sequences, idx_path(prefix).stat().st_size
    fields = HEADER_FIELDS | {"pointers": 34 + 4 * sequences, "document indices": 34 + 12 * sequences}
    for name, offset in fields.items():
        yield f".idx ends before its {name}", truncated(idx_path, offset)
    for path_of, size in ((idx_path, index), (bin_path, bin_path(prefix).stat().st_size)):
        for offset in generator.sample(range(size), number):
            yield f"{path_of(prefix).suffix} ends at byte {offset}", truncated(path_of, offset)


def forgeries(prefix: Path, other: Path) -> Iterator[tuple[str, Damage]]:
    """Wrong values in each field of the header, and files of another dataset."""
    for byte in range(9):
        yield f"byte {byte} of the magic", overwritten(idx_path, byte, b"~")
    for version in (0, 2, 1 << 32, (1 << 64) - 1):
        yield f"version {version}", overwritten(idx_path, 9, struct.pack("<Q", version))
    own = idx_path(prefix).read_bytes()[17]
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255):
        if code != own:
            yield f"dtype code {code}", overwritten(idx_path, 17, bytes([code]))
    dataset = IndexedDataset(prefix)
    for name, offset, right in (("sequences", 18, len(dataset)), ("documents", 26, dataset.num_documents + 1)):
        for wrong in (0, right - 1, right + 1, 1 << 31, 1 << 60, (1 << 64) - 1):
            yield f"{wrong} {name}", overwritten(idx_path, offset, struct.pack("<Q", wrong))
    for path_of in (bin_path, idx_path):
        foreign = path_of(other).read_bytes()
        yield (
            f"{path_of(prefix).suffix} of another dataset",
            lambda p, f=path_of, c=foreign: f(p).write_bytes(c) and None,
        )


def outside_ids(prefix: Path, vocab_size: int, generator: random.Random, number: int) -> Iterator[tuple[str, Damage]]:
    dataset = IndexedDataset(prefix)
    limits = np.iinfo(dataset.dtype)
    wrong = [n for n in (vocab_size, limits.max, -1, limits.min) if n < 0 or n >= vocab_size]
    for token in generator.sample(range(dataset.num_tokens), number):
        value = generator.choice([n for n in wrong if limits.min <= n])
        content = np.array([value], dataset.dtype).tobytes()
        yield f"id {value} at token {token}", overwritten(bin_path, token * dataset.dtype.itemsize, content)


def index_flips(prefix: Path, generator: random.Random, number: int) -> Iterator[tuple[str, Damage]]:
    """All bits of the header, or `number` of them; and as many of the arrays as of the header."""
    header = generator.sample(range(8 * 34), min(number, 8 * 34))
    arrays = generator.sample(range(8 * 34, 8 * idx_path(prefix).stat().st_size), len(header))
    for bit in header + arrays:
        yield f"bit {bit} of the .idx", bit_flipped(idx_path, bit)


def all_flips(prefix: Path, generator: random.Random, number: int) -> Iterator[tuple[str, Damage]]:
    """Bits anywhere in the files of the dataset, each file as often."""
    tokenizer = IndexedDataset(prefix).manifest["tokenizer_directory"]  # type: ignore[index]
    names = [f"{prefix.name}{suffix}" for suffix in (".bin", ".idx", ".json")]
    names += [f"{tokenizer}/{path.name}" for path in sorted((prefix.parent / tokenizer).iterdir())]
    for n in range(number):
        name = names[n % len(names)]
        bit = generator.randrange(8 * (prefix.parent / name).stat().st_size)
        yield f"bit {bit} of {name}", bit_flipped(lambda p, name=name: p.parent / name, bit)  # type: ignore[misc]


# --- counting ------------------------------------------------------------------------------------------------------


def row(what: str, trials: Iterable[tuple[str, str]], accepted: Callable[[str], bool]) -> dict[str, Any]:
    """Run trials, (name, outcome), and count those whose outcome is accepted."""
    start = time.monotonic()
    outcomes = list(trials)
    failures = [f"{name}: {outcome}" for name, outcome in outcomes if not accepted(outcome)]
    counts = {"trials": len(outcomes), "passed": len(outcomes) - len(failures)}
    seconds = round(time.monotonic() - start, 1)
    return {"test": "R4", "what": what, **counts, "seconds": seconds} | ({"failures": failures} if failures else {})


def refused(outcome: str) -> bool:
    """One line of ours that names a file of the dataset."""
    return outcome.startswith("refused: ") and "\n" not in outcome and "_text_document" in outcome


def count(trials: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of R4.

    Args:
        trials: Bit flips for `tools/verify.py`; fewer than 50 make fewer of the others too.
        seed: Which.
    """
    generator, verify = random.Random(seed), load_program(VERIFY)

    def read_by_tool(prefix: Path) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = verify.main([str(prefix)])
        return f"status {status}: {out.getvalue()}{err.getvalue()}"

    def found(outcome: str) -> bool:
        return outcome.startswith("status 1: ") and "NOT SOUND" in outcome and outcome.count("\n") == 1

    with tempfile.TemporaryDirectory() as folder:
        datasets = make_datasets(Path(folder))
        narrow, wide = datasets["uint16"], datasets["int32"]
        clean = {prefix: trial(prefix, lambda _: None, read_as_training_does) for prefix in datasets.values()}
        sound = [trial(prefix, lambda _: None, read_by_tool) for prefix in datasets.values()]
        assert all(outcome.startswith("status 0: ") for outcome in sound), sound
        assert all(outcome.startswith("read: ") for outcome in clean.values()), clean
        vocab_size = IndexedDataset(narrow).manifest["tokenizer"]["vocab_size"]  # type: ignore[index]
        some = min(20, trials)

        def run(damages: Iterable[tuple[str, Damage]], prefix: Path, read: Any = read_as_training_does) -> Any:
            return ((name, trial(prefix, damage, read)) for name, damage in damages)

        cut, forged = list(truncations(narrow, generator, some)), list(forgeries(narrow, wide))
        ids = [list(outside_ids(prefix, vocab_size, generator, some)) for prefix in (narrow, wide)]
        flips = list(index_flips(narrow, generator, 8 * 34 if trials >= 50 else trials))
        return [
            row("truncated .idx or .bin refused when opened", run(cut, narrow), refused),
            row("wrong header fields and foreign files refused when opened", run(forged, narrow), refused),
            row(
                "ids outside the vocabulary refused when met",
                chain(run(ids[0], narrow), run(ids[1], wide)),
                refused,
            ),
            row(
                "bit flips in the .idx refused, or without effect on any sample",
                run(flips, narrow),
                lambda outcome: refused(outcome) or outcome == clean[narrow],
            ),
            row(
                "the same truncations, fields and ids found by tools/verify.py",
                run([*cut, *forged, *ids[0]], narrow, read_by_tool),
                found,
            ),
            row(
                "bit flips in any file found by tools/verify.py",
                run(all_flips(narrow, generator, trials), narrow, read_by_tool),
                found,
            ),
        ]
