"""Writes a corpus from text that every Python installation carries: real prose and code, nothing to download.

One JSON object a line, `{"text": ...}`: the topics of Python's language reference (`pydoc_data.topics`) and the
docstrings and sources of the standard library, in a shuffled order that depends on nothing but the text.

    python examples/write_corpus.py --output corpus.jsonl
"""

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

from megatron.core.file_utils import publish_bytes

MIN_CHARACTERS = 200  # shorter documents are mostly headings


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in source order."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # the standard library's tests carry broken sources on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def documents() -> Iterator[str]:
    """Texts of the corpus: reference topics, then one document of all docstrings a module."""
    yield from topics.topics.values()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(parts):
            continue
        yield "\n\n".join(docstrings(path.read_text(encoding="utf-8", errors="replace")))


def main() -> None:
    """Write the corpus and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FILE", help="jsonl file to write")
    output = Path(parser.parse_args().output)
    texts = {text for text in documents() if len(text) >= MIN_CHARACTERS}
    # Order by digest: a fixed shuffle, so that the held-out documents are like the others.
    ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ordered]
    try:
        publish_bytes(output, "".join(lines).encode())
    except OSError as error:
        sys.exit(f"error: --output {output} cannot be written: {error.strerror}")
    print(f"wrote {len(ordered):,} documents, {output.stat().st_size / 1e6:.1f} MB, to {output}")


if __name__ == "__main__":
    main()
