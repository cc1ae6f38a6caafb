"""R8: processes that preprocess one corpus to one output at the same time, of which some are killed.

After each trial there is one whole dataset or none, and the same command once more gives the bytes of a build without
disturbance and leaves nothing else behind. In every second trial the processes replace an older dataset.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.indexed_dataset import idx_path
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.core.datasets.verification import verify_dataset
from megatron.core.errors import UserError
from tests.corpora import write_prose

PROCESSES, KILLED = 8, 3
DONE, REFUSED, BROKEN = 0, 1, 70


def build(corpus: Path, output: Path, overwrite: bool) -> None:
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer")
    options: dict[str, Any] = {"input": [str(corpus)], "output_prefix": str(output), "tokenizer": tokenizer}
    preprocess(PreprocessConfig(**options, overwrite=overwrite), io.StringIO())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of all files under a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(corpus: Path, output: Path, overwrite: bool, delay_s: float) -> int:
    """A process that builds after a moment; returns its number."""
    child = os.fork()
    if child == 0:
        status = BROKEN
        try:
            time.sleep(delay_s)
            build(corpus, output, overwrite)
            status = DONE
        except UserError:
            status = REFUSED
        finally:
            os._exit(status)
    return child


def trial(folder: Path, corpora: dict[str, Path], whole: dict[str, dict[str, str]], replace: bool, seed: int) -> str:
    """One trial in an empty folder; returns what went wrong, or nothing.

    Args:
        folder: For the output.
        corpora: The corpus "new", and the one of the dataset that is replaced, "old".
        whole: Digests of what undisturbed builds of the two write.
        replace: Whether "old" lies there before.
        seed: Decides when processes start and which are killed when.
    """
    generator = random.Random(seed)
    if replace:
        build(corpora["old"], folder / "x", False)
    begin = time.monotonic()
    build(corpora["new"], folder.parent / f"timing{seed}", False)
    usual_s = time.monotonic() - begin
    children = [
        start(corpora["new"], folder / "x", replace, generator.uniform(0, 2 * usual_s)) for _ in range(PROCESSES)
    ]
    begin = time.monotonic()
    for at_s, child in sorted(
        (generator.uniform(0, 4 * usual_s), child) for child in generator.sample(children, KILLED)
    ):
        time.sleep(max(0.0, begin + at_s - time.monotonic()))
        os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if set(codes) - {DONE, REFUSED, -signal.SIGKILL}:
        return f"exit statuses {codes}"
    prefix = folder / "x_text_document"
    there = idx_path(prefix).exists()
    if there:
        verify_dataset(prefix)
        found = {name: digest for name, digest in digests(folder).items() if ".partial" not in name}
        allowed = [whole["new"], *([whole["old"]] if replace else [])]
        if found not in allowed:
            return f"a dataset that no undisturbed build writes: {sorted(found)} after exit statuses {codes}"
    elif DONE in codes and not replace:
        return f"no dataset, although a process said it was done: exit statuses {codes}"
    build(corpora["new"], folder / "x", there)
    if digests(folder) != whole["new"]:
        return f"the next build left {sorted(digests(folder))} after exit statuses {codes}"
    return ""


def count(trials: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """The row of R8."""
    failures, begin = [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        corpora = {which: root / which / "corpus.jsonl" for which in ("new", "old")}
        for which, corpus in corpora.items():
            (root / "whole" / which).mkdir(parents=True)
            corpus.parent.mkdir()
            write_prose(corpus)
            if which == "old":
                corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[::2]))
            build(corpus, root / "whole" / which / "x", False)
        whole = {which: digests(root / "whole" / which) for which in corpora}
        for n in range(trials):
            folder = root / str(n)
            folder.mkdir()
            try:
                problem = trial(folder, corpora, whole, replace=n % 2 == 1, seed=seed + n)
            except UserError as error:
                problem = str(error)
            failures += [f"trial {n}: {problem}"] if problem else []
    counts = {"trials": trials, "passed": trials - len(failures), "seconds": round(time.monotonic() - begin, 1)}
    what = (
        f"{PROCESSES} processes build one dataset, {KILLED} are killed: one whole dataset or none, then a clean build"
    )
    return [{"test": "R8", "what": what, **counts} | ({"failures": failures} if failures else {})]
