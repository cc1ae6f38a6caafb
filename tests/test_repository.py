"""Rules of the repository that a test can keep: sizes, and nothing pickled."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 80


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / line for line in listed.stdout.splitlines()]
    if not files:
        pytest.skip("not a git checkout")
    return [path for path in files if path.exists()]


def test_files_and_functions_stay_small() -> None:
    too_long = []
    for path in tracked("*.py", "*.cpp", "*.sh"):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        if path.suffix == ".py":
            functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
            long = [node.name for node in functions if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES]
            too_long.extend(f"{path.relative_to(ROOT)}: {name}" for name in long)
    assert not too_long


def test_the_package_never_unpickles() -> None:
    """But for files of transformers before safetensors, by torch's reader of tensors alone."""
    forbidden = re.compile(r"\bpickle\b(?!\.UnpicklingError[:)])|torch\.load\(|torch\.save\(|allow_pickle=True")
    allowed = {
        "megatron/core/huggingface/weights.py: import pickle",  # for the name of an error, as in the next
        "megatron/core/datasets/preprocessing_workers.py: import pickle",
        'megatron/core/huggingface/weights.py: found = torch.load(path, map_location="cpu", weights_only=True, '
        "mmap=mapped)",
    }
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in tracked("megatron/*.py", "tools/*.py", "pretrain_t5.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if forbidden.search(line) and not line.lstrip().startswith(("#", '"""'))
    ]
    assert set(found) == allowed and len(found) == len(allowed)


def test_readme_names_what_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / target).exists(), target
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme))
    listed = "".join(
        path.read_text(encoding="utf-8")
        for path in tracked("megatron/*.py", "tools/*.py", "benchmarks/*.py", "examples/*")
    )
    for flag in flags - {"--nproc-per-node"}:
        assert flag in listed or flag[2:].replace("-", "_") in listed, flag
