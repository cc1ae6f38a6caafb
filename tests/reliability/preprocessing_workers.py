"""R11: preprocessing writes the same bytes whatever the number of workers, for each form of input."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import zstandard

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from tests.corpora import write_prose

WORKERS = (2, 4)
Files = dict[str, bytes]


def corpora(folder: Path) -> dict[str, tuple[Files, dict[str, Any]]]:
    """Files and options of preprocessing, by name; each is several chunks long."""
    prose = [json.loads(line)["text"] for line in write_prose(folder / "prose.jsonl").read_text().splitlines()]
    texts = [f"{n} {text}" for n in range(25) for text in prose]  # about 4 MB
    rows = [json.dumps({"text": text, "title": text[:20]}).encode() + b"\n" for text in texts]
    bad = list(rows)
    bad[100], bad[-5] = b"{broken\n", b'{"title": "no text"}\n'
    lines, plain = b"".join(rows), "\n\n".join(texts).encode()
    return {
        "JSON lines": ({"a.jsonl": lines}, {}),
        "two files, end-of-document ids": ({"a.jsonl": lines, "b.jsonl": b"".join(rows[:50])}, {"append_eod": True}),
        "two keys": ({"a.jsonl": lines}, {"json_keys": ["text", "title"]}),
        "bad records skipped": ({"a.jsonl": b"".join(bad)}, {"on_error": "skip"}),
        "gzip": ({"a.jsonl.gz": gzip.compress(lines)}, {}),
        "Zstandard": ({"a.jsonl.zst": zstandard.compress(lines)}, {}),
        "text by line": ({"a.txt": plain}, {}),
        "text by paragraph": ({"a.txt": plain}, {"text_sample_by": "paragraph"}),
        "text by document": ({"a.txt": plain, "b.txt": plain[:1000]}, {"text_sample_by": "document"}),
    }


def output_digests(folder: Path, inputs: list[Path], options: dict[str, Any], workers: int) -> dict[str, str]:
    """sha256 of everything that preprocessing writes."""
    output = folder / str(workers)
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer")
    paths = {"input": [str(path) for path in inputs], "output_prefix": str(output / "x")}
    preprocess(PreprocessConfig(**paths, **options, tokenizer=tokenizer, workers=workers), io.StringIO())
    files = (path for path in sorted(output.rglob("*")) if path.is_file())
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def count(trials: int | None = None) -> list[dict[str, Any]]:
    """The row of R11: `trials` forms of input (default: all), with each number of workers."""
    number, failures, begin = 0, [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        for form, (files, options) in list(corpora(Path(name)).items())[:trials]:
            folder = Path(name) / form.replace(" ", "_")
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_bytes(content)
            inputs = [folder / file for file in files]
            expected = output_digests(folder, inputs, options, workers=1)
            for workers in WORKERS:
                number += 1
                found = output_digests(folder, inputs, options, workers)
                differing = [file for file in expected | found if expected.get(file) != found.get(file)]
                failures += [f"{form}, {workers} workers: {differing} differ"] if differing else []
    counts = {"trials": number, "passed": number - len(failures), "seconds": round(time.monotonic() - begin, 1)}
    what = f"preprocessing with {' and '.join(map(str, WORKERS))} workers gives the bytes of one, every form of input"
    return [{"test": "R11", "what": what, **counts} | ({"failures": failures} if failures else {})]
