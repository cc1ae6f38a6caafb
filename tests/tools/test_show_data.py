"""What the model sees, printed: decoded rows, statistics that are those of the rows, a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron.core.datasets.corpus import CorpusRange, open_corpus
from megatron.core.datasets.indexed_dataset import IndexedDatasetWriter
from megatron.core.datasets.statistics import document_lengths
from tests.corpora import make_byte_dataset, write_prose
from tests.programs import load_program

TOOL = Path(__file__).resolve().parents[2] / "tools" / "show_data.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_program(TOOL)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two corpora in bytes."""
    directory = tmp_path_factory.mktemp("corpora")
    prose = write_prose(directory / "prose.jsonl")
    (directory / "second").mkdir()
    first_lines = "".join(prose.read_text().splitlines(keepends=True)[:7])
    (directory / "second" / "part.jsonl").write_text(first_lines)
    return [make_byte_dataset(path) for path in (prose, directory / "second" / "part.jsonl")]


class Show:
    """Runs the tool; the lines that it printed."""

    def __init__(self, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        self.tool, self.capsys = tool, capsys

    def __call__(self, *flags: str | Path, status: int = 0) -> list[str]:
        found = self.tool.main([*map(str, flags), "--statistics-rows", "200"])
        printed = self.capsys.readouterr()
        assert found == status, printed
        return (printed.err or printed.out).splitlines()


@pytest.fixture
def show(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Show:
    return Show(tool, capsys)


def texts(lines: list[str], side: str) -> list[tuple[int, str]]:
    """Length and text of the inputs or targets that were printed."""
    found = [re.fullmatch(rf" *{side} +\((\d+)\): (.*)", line) for line in lines]
    return [(int(match[1]), match[2]) for match in found if match]


def test_span_corruption(show: Show, corpora: list[Path]) -> None:
    lines = show("--data-path", corpora[0], "--encoder-seq-length", "128", "--show-rows", "2", "--first-row", "5")
    assert lines[1].startswith("train split | objective span-corruption | packing none | rows of 128 + 29 tokens | ")
    assert "200 rows: 157.0 tokens a row | fill rate 100.0% of the encoder's slots, 100.0%" in "\n".join(lines)
    assert any(re.match("all documents, tokens: mean .* least .* median .* most", line) for line in lines)
    assert [line for line in lines if line.startswith("row ")] == [
        f"row {n} | examples 1 | padding 0 + 0" for n in (5, 6)
    ]
    inputs, targets = texts(lines, "inputs"), texts(lines, "targets")
    assert [length for length, _ in inputs] == [128, 128] and [length for length, _ in targets] == [29, 29]
    for _, text in inputs:  # seven sentinels, in order, and the end
        assert re.findall("<extra_id_([0-9]+)>", text) == list("0123456"), text
        assert text.endswith("</s>")
    # Put back together, they are the text: the spans of the targets stand where the sentinels are.
    spans = dict(re.findall("(<extra_id_[0-9]+>)((?:(?!<extra_id|</s>).)*)", targets[0][1]))
    whole = re.sub("<extra_id_[0-9]+>", lambda match: spans[match[0]], inputs[0][1].removesuffix("</s>"))
    prose = [json.loads(line)["text"] for line in corpora[0].with_name("prose.jsonl").read_text().splitlines()]
    assert whole in "".join(prose).replace("\n", "\\n")


def test_mixtures_segments_and_blends(show: Show, corpora: list[Path]) -> None:
    blend = ["--data-path", "3", corpora[0], "1", corpora[1], "--objective", "ul2", "--split", "100,0,0"]
    lines = show(*blend, "--encoder-seq-length", "128", "--packing", "segments", "--show-rows", "4")
    whole = "\n".join(lines)
    assert re.search(rf"{corpora[0]} \| 60 documents \| [\d,]+ tokens \| rows 150 \(75.00%\) \| [\d.]+ epochs", whole)
    assert re.search(rf"{corpora[1]} \| 7 documents \| [\d,]+ tokens \| rows 50 \(25.00%\)", whole)
    shares = re.findall(r"^  (?:span|prefix)-[-\d.]+: ([\d,]+) examples", whole, re.MULTILINE)
    assert len(shares) == 7
    rows = [line for line in lines if line.startswith("row ")]
    assert len(rows) == 4 and all(f"| {corpora[0]} |" in row or f"| {corpora[1]} |" in row for row in rows)
    assert all(text.startswith(("[NLU]", "[NLG]", "[S2S]")) for _, text in texts(lines, "inputs"))
    numbers = [int(match[1]) for line in lines if (match := re.match(r"  \[(\d+)\] ", line))]
    assert numbers.count(1) == 4 and sum(int(row.split("examples ")[1].split(" ")[0]) for row in rows) == len(numbers)


def test_text_to_text(show: Show, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"inputs": f"in {n}", "targets": f"out {n}"}) + "\n" for n in range(9)))
    lines = show("--data-path", path, "--objective", "text-to-text", "--tokenizer-type", "ByteTokenizer")
    assert "task task" in lines
    assert any(line.startswith("1 rows: ") for line in lines)  # of an epoch
    assert (5, "in 0</s>") in texts(lines, "inputs") and (6, "out 0</s>") in texts(lines, "targets")


def test_the_picture(show: Show, corpora: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flags = ["--data-path", corpora[0], "--encoder-seq-length", "64", "--histogram"]
    picture = tmp_path / "data.png"
    assert show(*flags, picture)[-1] == f"wrote {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert "give a file such as data.png" in show(*flags, tmp_path / "data.xyz", status=1)[-1]


def test_refusals(show: Show, corpora: list[Path], tool: ModuleType) -> None:
    assert "--show-rows is -1" in show("--data-path", corpora[0], "--show-rows", "-1", status=1)[-1]
    flags = ["--data-path", corpora[0], "--show-split", "test", "--split", "1,0,0"]
    assert "there is no test data" in show(*flags, status=1)[-1]
    with pytest.raises(SystemExit) as exit_:
        tool.main(["--data-pth", "x"])
    assert exit_.value.code == 2


def test_documents_of_large_corpora_are_sampled(tmp_path: Path) -> None:
    lengths = np.arange(300_000) % 50
    with IndexedDatasetWriter(tmp_path / "large", "uint8") as writer:
        writer.add_documents(np.zeros(lengths.sum(), np.uint8), lengths)
        writer.finalize()
    corpus = open_corpus(tmp_path / "large")
    whole = CorpusRange(corpus, "", (0, corpus.num_documents), (0, corpus.num_tokens))
    found, complete = document_lengths([whole, whole])
    assert not complete and 90_000 < found.size <= 100_000
    np.testing.assert_allclose(np.bincount(found) / found.size, 0.02, atol=0.001)
    half = CorpusRange(corpus, "", (100_000, 200_000), (0, 0))
    found, complete = document_lengths([half])
    assert complete and found.tolist() == lengths[100_000:200_000].tolist()
