"""Arguments of all kinds for the C++ side of denoising: it raises or does its work, and never leaves the arrays.

The slow test goes on for FUZZ_SECONDS, 60 by default.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.core.datasets import helpers

VOCAB = 1000
SENTINELS = np.arange(999, 899, -1, dtype=np.int32)
NUM_TOKENS = 400
UNTOUCHED = -7
OUTPUTS = ("encoder_input_ids", "decoder_input_ids", "labels", "encoder_segment_ids", "decoder_segment_ids")


def tokens(count: int = NUM_TOKENS, dtype: Any = np.uint16) -> np.ndarray:
    return np.random.default_rng(count).integers(2, min(900, np.iinfo(dtype).max), count).astype(dtype)


def valid() -> dict[str, Any]:
    """Arguments of everything: two datasets, a denoiser of each kind, two rows with guard rows around them."""
    widths = (210, 200, 200, 210, 200)
    guarded = {name: np.full((4, width), UNTOUCHED, np.int32) for name, width in zip(OUTPUTS, widths, strict=True)}
    return {
        "corpora": [[tokens()], [tokens(150, np.int32), tokens(90, np.int32)]],
        "ranges": np.array([[0, NUM_TOKENS], [10, 230]]),
        "vocab_size": VOCAB, "names": ["a", "b"],
        "keys": np.array([1, 2], np.uint64), "window_lengths": np.array([100, 60, 70]),
        "fractions": np.array([2**63, 2**62], np.uint64), "children": np.array([[1, ~0], [~1, ~2]], np.int32),
        "block_windows": 2, "datasets": np.array([0, 1], np.int32), "draws": np.array([0, 5]),
        "table": np.array([[3.0, 0.15], [0.0, 0.25], [0.0, 0.0]]),
        "mode_ids": [np.array(ids, np.int32) for ids in ([5], [], [6, 7])],
        "sentinel_ids": SENTINELS, "eos_id": 1, "pad_id": 0, "decoder_start_id": 0, "denoiser_vocab_size": VOCAB,
        "kinds": np.array([0, 1, 2], np.int32), "raw": np.array([2, 9, 50], np.int32),
        "cuts": np.array([-1, -1, 3], np.int32), "raw_keys": np.array([1, 2, 3], np.uint64),
        "dataset": 1, "start": 200, "length": 40, "key": 5, "values": np.array([1, -1]),
        "examples": np.array([[0, 0, 350, 90, 0, -1], [1, 1, 220, 40, 1, -1], [0, 0, 0, 80, 2, 30]]),
        "example_keys": np.array([1, 2, 3], np.uint64), "sources": None, "denoisers": None,
        **{name: guards[1:3] for name, guards in guarded.items()}, "guarded": guarded,
    }  # fmt: skip


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; None if it refuses."""
    try:
        return function(*arguments)
    except (ValueError, TypeError):
        return None


def steps(call: dict[str, Any]) -> dict[str, Any]:
    """Every entry point with these arguments; where an object is refused, that of the valid arguments goes on."""

    def get(*names: str) -> list[Any]:
        return [call[name] for name in names]

    good = valid()
    layout = ("ranges", "keys", "window_lengths", "fractions", "children", "block_windows")
    denoiser = ("table", "mode_ids", "sentinel_ids", "eos_id", "pad_id", "decoder_start_id", "denoiser_vocab_size")
    source = ("corpora", "ranges", "vocab_size", "names")
    found = {
        "sources": attempt(helpers.TokenSources, *get(*source)),
        "layouts": attempt(helpers.WindowLayouts, *get(*layout)),
        "denoisers": attempt(helpers.Denoisers, *get(*denoiser)),
        "derived": attempt(helpers.derived_keys, *get("key", "values")),
    }
    sources = found["sources"] or helpers.TokenSources(*[good[name] for name in source])
    layouts = found["layouts"] or helpers.WindowLayouts(*[good[name] for name in layout])
    denoisers = found["denoisers"] or helpers.Denoisers(*[good[name] for name in denoiser])
    found["read"] = attempt(sources.read, *get("dataset", "start", "length"))
    found["examples"] = attempt(layouts.examples, *get("datasets", "draws"))
    found["lengths"] = attempt(denoisers.lengths, *get("kinds", "raw", "cuts"))
    found["cuts"] = attempt(denoisers.cuts, *get("kinds", "raw", "raw_keys"))
    found["filled"] = False
    try:
        helpers.fill_rows(
            sources if call["sources"] is None else call["sources"],
            *get("examples", "example_keys"),
            denoisers if call["denoisers"] is None else call["denoisers"],
            *get(*OUTPUTS),
        )
        found["filled"] = True
    except (ValueError, TypeError):
        pass
    return found


def check(call: dict[str, Any]) -> None:
    found = steps(call)
    for name, array in call["guarded"].items():
        assert (array[[0, 3]] == UNTOUCHED).all(), name
        if found["filled"] and call[name] is not None and call[name].base is array:
            assert (array[1:3] != UNTOUCHED).all(), name
    if found["filled"]:
        for name in OUTPUTS[:3]:
            rows = call[name]
            assert ((rows >= 0) & (rows < 2**31 - 1) | (rows == -100)).all()


def test_valid_arguments_are_taken() -> None:
    found = steps(valid())
    assert found["filled"] and not any(value is None for value in found.values())


# ------------------------------------------------------------------------------------------------------------
# One wrong argument


def misaligned(array: Any) -> np.ndarray:
    array = np.asarray(array)
    buffer = np.zeros(array.nbytes + 1, np.uint8)[1:]
    buffer[:] = np.frombuffer(array.tobytes(), np.uint8)
    return buffer.view(array.dtype).reshape(array.shape)


def distorted(array: np.ndarray) -> list[Any]:
    """The same numbers in forms that are not taken: other types, shapes, strides, alignments."""
    other = np.int32 if array.dtype != np.int32 else np.int64
    return [
        array.astype(other), array.astype(array.dtype.newbyteorder()), array.tolist(), None, misaligned(array),
        array[None], np.repeat(array, 2, axis=0)[::2], array.astype(object),
    ]  # fmt: skip


BAD: dict[str, list[Any]] = {
    **{
        name: distorted(valid()[name])
        for name in (
            "ranges", "keys", "window_lengths", "fractions", "children", "datasets", "draws", "table", "sentinel_ids",
            "kinds", "raw", "cuts", "raw_keys", "values", "examples", "example_keys", *OUTPUTS[:3],
        )
    },
    "corpora": [
        [], [[tokens()]], [[tokens()], []], [[tokens()], [tokens(0)]], [tokens(), tokens()], None, [[None], [None]],
        *([[array], [tokens()]] for array in (
            tokens(399), tokens().reshape(20, 20), tokens(800)[::2], tokens().astype(np.float32),
            tokens().astype(">u2"), tokens().astype(np.uint64), misaligned(tokens(400, np.int32)), [1] * 400,
            np.zeros(400, object),
        )),
        [[tokens()], [tokens(150, np.int32), tokens(90, np.int64)]],
    ],
    "vocab_size": [0, -1, 2**31, 2**63, 999, "1000", None, 1e3],
    "names": [["a"], [1, 2], None, ["a", "b", "c"]],
    "block_windows": [0, -1, 2**30 + 1, 2**64, None, 1.5],
    "mode_ids": [[], [np.array([5], np.int32)] * 2, [np.array([5])] * 3, [np.array([[5]], np.int32)] * 3,
                 [np.array([1000], np.int32)] * 3, [np.array([-1], np.int32)] * 3,
                 [np.zeros(2**16 + 1, np.int32)] * 3, None, [None] * 3],
    "eos_id": [-1, 1000, 2**63, None], "pad_id": [-1, 1000], "decoder_start_id": [-1, 1000],
    "denoiser_vocab_size": [0, -1, 2**31, 998], "dataset": [-1, 2, 2**63, None], "start": [9, 230, -1, 2**63 - 1],
    "length": [-1, 221, 2**30 + 1, 2**63 - 1], "key": [-1, 2**64, None, "1"],
    "sources": [1, "x", helpers.TokenSources.__new__(helpers.TokenSources)],
    "denoisers": [1, "x", helpers.Denoisers.__new__(helpers.Denoisers)],
}  # fmt: skip
BAD["ranges"] += [np.array(r) for r in ([[0, 401], [10, 230]], [[-1, 9], [10, 230]], [[5, 5], [10, 230]],
                                        [[0, 2**62 + 1], [10, 230]], [[-(2**63), 2**63 - 1], [10, 230]])]  # fmt: skip
BAD["children"] += [np.array(c, np.int32) for c in ([[0, ~0], [~1, ~2]], [[2, ~0], [~1, ~2]], [[1, ~0], [1, ~2]])]
BAD["window_lengths"] += [np.array(w) for w in ([0, 60, 70], [-5, 60, 70], [2**30 + 1, 60, 70])]
BAD["datasets"] += [np.array([0, 2], np.int32), np.array([-1, 0], np.int32), np.zeros(3, np.int32)]
BAD["draws"] += [np.array([-2, 0]), np.array([0, -(2**63)])]
BAD["table"] += [
    np.array([row, [0.0, 0.25], [0.0, 0.0]])
    for row in ([0.5, 0.15], [np.nan, 0.15], [np.inf, 0.15], [3, np.nan], [3, 1.0], [3, -0.1], [3, 0.0], [-1, 0.15])
]
BAD["sentinel_ids"] += [SENTINELS + 1, SENTINELS - 999, SENTINELS[:1]]
BAD["kinds"] += [np.array([0, 1, 3], np.int32), np.array([-1, 1, 2], np.int32)]
BAD["raw"] += [np.array([1, 9, 50], np.int32), np.array([-9, 9, 50], np.int32), np.array([2, 9, 3], np.int32)]
BAD["cuts"] += [np.array(c, np.int32) for c in ([1, -1, 3], [-1, -1, 50], [-1, -1, 0], [-1, -1, -2])]
BAD["examples"] += [
    np.array([row])
    for row in (
        [2, 0, 0, 9, 0, -1], [-1, 0, 0, 9, 0, -1], [0, 2, 0, 9, 0, -1], [0, -1, 0, 9, 0, -1], [0, 0, 400, 9, 0, -1],
        [0, 0, -1, 9, 0, -1], [0, 1, 9, 9, 0, -1], [0, 1, 230, 9, 0, -1], [0, 0, 0, 1, 0, -1], [0, 0, 0, 401, 0, -1],
        [0, 0, 0, -5, 0, -1], [0, 0, 0, 9, 3, -1], [0, 0, 0, 9, -1, -1], [0, 0, 0, 9, 0, 3], [0, 0, 0, 9, 2, 9],
        [0, 0, 0, 9, 2, -2], [2**63 - 1] * 6, [-(2**63)] * 6,
    )
]  # fmt: skip
BAD["labels"] += [np.zeros((2, 199), np.int32), np.zeros((3, 200), np.int32), np.zeros((2, 10), np.int32)]
BAD["encoder_input_ids"] += [
    np.zeros((2, 30), np.int32), np.broadcast_to(np.int32(0), (2, 210)), np.zeros((210, 2), np.int32).T,
    np.frombuffer(bytes(8 * 210), np.int32).reshape(2, 210), np.zeros((1, 210), np.int32),
]  # fmt: skip
BAD["encoder_segment_ids"] = [None, np.zeros((2, 209), np.int32), np.zeros((2, 210)), "x"]
BAD["decoder_segment_ids"] = [None, np.zeros((1, 200), np.int32)]


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, values in BAD.items() for i in range(len(values))])
def test_each_bad_argument_raises(name: str, index: int) -> None:
    """A call that is right but for one argument is refused, and by the entry point that takes it."""
    call = valid() | {name: BAD[name][index]}
    found = steps(call)
    assert not found["filled"] or any(value is None for value in found.values()), "taken"
    check(call)


# ------------------------------------------------------------------------------------------------------------
# Any arguments

NUMBERS = st.integers(-3, 600) | st.sampled_from(
    [0, 1, -1, 2**30, 2**30 + 1, 2**31 - 1, -(2**31), 2**31, 2**32, 2**62, 2**62 + 1, 2**63 - 1, -(2**63), 2**64, 2**70]
)
TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c16", "?", "O", ">i4", ">i8", "S3", "M8[s]"]


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Arrays of any type, shape and strides, aligned or not, writeable or not."""
    shape = draw(st.lists(st.integers(0, 7), max_size=3))
    size = int(np.prod(shape, dtype=int))
    kind = draw(st.sampled_from(["i4", "i8", "u8", "f8"]) | st.sampled_from(TYPES))
    values = draw(st.lists(NUMBERS, min_size=size, max_size=size))
    dtype = np.dtype(kind)
    if dtype.kind in "iu":
        values = [value % 2 ** (8 * dtype.itemsize) for value in values]
        array = np.array(values, np.uint64).astype(dtype)
    else:
        with np.errstate(all="ignore"):
            array = np.array(values, "f8").astype("i8" if dtype.kind == "M" else "f8").astype(dtype)
    array = array.reshape(shape)
    form = draw(st.sampled_from(["plain", "misaligned", "strided", "reversed", "fortran", "read-only", "broadcast"]))
    if form == "misaligned" and kind != "O":
        return misaligned(array)
    if form == "strided" and shape:
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if form == "reversed" and shape:
        return array[::-1]
    if form == "fortran":
        return np.asfortranarray(array)
    if form == "broadcast":
        return np.broadcast_to(array, (2, *shape))
    array.setflags(write=form != "read-only")
    return array


@st.composite
def likely_examples(draw: st.DrawFn) -> np.ndarray:
    """Examples that may pass: each number from around its limits."""
    columns = [st.integers(-1, 2), st.integers(-1, 2), st.integers(-1, 401), st.integers(0, 402), st.integers(-1, 3)]
    row = st.tuples(*columns, st.integers(-1, 60) | st.just(-1))
    usual = st.tuples(
        st.integers(0, 1), st.integers(0, 1), st.integers(10, 229), st.integers(2, 60), st.integers(0, 1), st.just(-1)
    )
    rows = draw(st.lists(usual | usual | row, max_size=6))
    return np.array(rows, np.int64).reshape(-1, 6)


ANYTHING = st.one_of(
    NUMBERS, st.none(), st.floats(), st.text(max_size=3), arrays(), st.lists(arrays(), max_size=3),
    st.sampled_from([value for values in BAD.values() for value in values]), likely_examples(),
    st.lists(st.lists(arrays(), max_size=2), max_size=2),
)  # fmt: skip


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Valid arguments, some of them replaced, among them by arrays that overlap others."""
    call = valid()
    names = [name for name in call if name != "guarded"]
    call |= draw(st.dictionaries(st.sampled_from(names), ANYTHING, max_size=4))
    if draw(st.booleans()):
        call["examples"] = draw(likely_examples())
        call["example_keys"] = np.arange(len(call["examples"]), dtype=np.uint64)
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(OUTPUTS))
        shared = np.full(4_000, 3, np.int32)
        call[draw(st.sampled_from(OUTPUTS))] = shared[: 2 * 200].reshape(2, 200)
        call[name] = shared[100 : 100 + 2 * 200].reshape(2, 200)
        call["corpora"] = [[shared[:NUM_TOKENS]], [shared[50:400]]]
    return call


def fuzz(examples: int) -> None:
    """Try so many calls."""
    relaxed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(deadline=None, max_examples=examples, suppress_health_check=relaxed, database=None)
    @given(calls())
    def run(call: dict[str, Any]) -> None:
        check(call)

    run()


def test_any_arguments() -> None:
    fuzz(100)


@pytest.mark.slow
def test_any_arguments_for_long() -> None:
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "60"))
    while time.monotonic() < end:
        fuzz(2_000)
