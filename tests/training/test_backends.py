"""Backends that a run asks for are checked before it starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron.core.errors import UserError
from megatron.core.extensions import packages
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain
from tests import transformer_engine_double as double

MODEL = ["--encoder-num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2"]


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No optional package is installed."""
    double.forget()
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    yield
    double.forget()


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ("--transformer-impl transformer_engine", "transformer_engine"),
        ("--attention-backend triton", "triton"),
        ("--norm-backend triton", "triton"),
        ("--activation-backend triton", "triton"),
        ("--cross-entropy-backend triton", "triton"),
        ("--fp8-format hybrid", "torchao"),
    ],
)
def test_absent_packages_are_named_before_the_data_is_read(no_packages: None, flags: str, package: str) -> None:
    config = parse_args([*MODEL, "--bf16", "--data-path", "/nonexistent", *flags.split()]).config
    with pytest.raises(UserError) as raised:
        pretrain(config)
    message = str(raised.value)
    assert message.startswith(f"{flags} needs the package {package}, which is not installed") and "\n" not in message


@pytest.mark.usefixtures("no_packages")
def test_a_run_can_be_described_without_its_packages() -> None:
    compute = parse_args([*MODEL, "--transformer-impl", "transformer_engine", "--data-path", "d"]).config.compute
    assert compute.norm_backend == "transformer_engine"
