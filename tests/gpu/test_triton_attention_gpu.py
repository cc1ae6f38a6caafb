"""Attention in Triton as compiled for a GPU, at lengths that have tiles of every kind."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.getenv("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 keeps kernels on the CPU"),
]

if torch.cuda.is_available() and os.getenv("TRITON_INTERPRET") != "1":
    from tests.core.extensions.test_triton_attention import OPTIONS, PLAIN, Case, check, pairwise, run

    CASES = pairwise(60, seed=2)
else:
    CASES = []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("channels", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_long_inputs_equal_float64(channels: int, causal: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of several of the largest tiles, with far ones on both sides."""
    lengths = ((500, 500), (512, 512), (114, 512), (1000, 1000))
    choices = itertools.cycle(itertools.product(OPTIONS["segments"], (None, 90)))
    for pair, (segments, constant_beyond) in zip(lengths * 2, choices, strict=False):
        case = PLAIN._replace(
            lengths=pair, causal=causal, channels=channels, dtype=dtype, segments=segments,
            constant_beyond=constant_beyond, fused=3,
        )  # fmt: skip
        check(case, monkeypatch)


def test_same_bits_again() -> None:
    case = PLAIN._replace(lengths=(1000, 1000), constant_beyond=90, dtype="bfloat16", channels=64)
    first = run(case)
    for _ in range(3):
        for one, other in zip(first, run(case), strict=True):
            assert torch.equal(one, other)


def test_nothing_waits_for_the_device() -> None:
    case = PLAIN._replace(lengths=(256, 256), dtype="bfloat16", channels=64, dropout=0.1, segments="packed")
    run(case)
    torch.cuda.synchronize()
    from megatron.core.extensions.triton_attention import attention
    from tests.core.extensions.test_triton_attention import sample, segment_ids

    projections, diagonals = sample(case)
    ids = segment_ids("packed", 2, 256, 256)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = attention(*projections, diagonals, *ids, causal=False, dropout=0.1)
        torch.autograd.grad(output, [*projections, diagonals], output.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
