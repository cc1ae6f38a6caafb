"""Writes a corpus of tens of megabytes that needs no download: the Python sources of the library and of all packages.

One JSON object a line, `{"text": ...}`, in an order that depends on nothing but the text. Which packages are installed
decides what is in it, so runs on it are compared with each other and with nothing else.

    python benchmarks/source_corpus.py --output corpus.jsonl --megabytes 64
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
from pathlib import Path

CHARACTERS = range(500, 200_000)  # shorter sources are mostly imports, longer ones tables


def sources(folders: list[Path]) -> dict[bytes, str]:
    """Texts of the Python sources under the folders by their digests."""
    texts = {}
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) in CHARACTERS:
            texts[hashlib.sha256(text.encode()).digest()] = text
    return texts


def main() -> None:
    """Write the corpus and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=64.0, help="about so much of it")
    options = parser.parse_args()
    folders = [*map(Path, filter(None, sys.path)), Path(sysconfig.get_path("stdlib"))]
    texts = sources([folder for folder in folders if folder.is_dir() and folder.name != "benchmarks"])
    written = documents = 0
    with options.output.open("w", encoding="utf-8") as file:
        for _, text in sorted(texts.items()):
            if written >= 1e6 * options.megabytes:
                break
            documents += 1
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    print(f"wrote {documents:,} documents, {written / 1e6:.1f} million characters, to {options.output}")


if __name__ == "__main__":
    main()
