"""Types of the C++ extension built from helpers.cpp."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class TokenOutOfVocabularyError(ValueError):
    """A token of the corpus is not an id of the vocabulary."""

class TokenSources:
    """The tokens of datasets, each a ring: a part of a corpus, joined end to start. Threads can share it."""

    def __init__(
        self,
        corpora: Sequence[Sequence[NDArray[Any]]],
        ranges: NDArray[np.int64],
        vocab_size: int,
        names: Sequence[str] = (),
    ) -> None:
        """Read no token and copy none; keeps the arrays alive.

        Args:
            corpora: Of each dataset the corpus: vectors of any one integer type of indexed datasets, read end to end.
            ranges: int64 [d, 2], [begin, end) of each dataset in the tokens of its corpus.
            vocab_size: Ids from this on (or below 0) are refused when they are read.
            names: What messages call the datasets; none: nothing.
        """

    def read(self, dataset: int, start: int, length: int) -> NDArray[np.int32]:
        """The tokens from `start` (in the corpus) on, which wrap at the end of the range.  # [length]

        Raises:
            TokenOutOfVocabularyError: A token is not in [0, vocab_size); says dataset, id and token offset.
        """

    def will_need(self, examples: NDArray[np.int64]) -> None:
        """Ask for the tokens of examples [m, 6] from the disk without waiting, so that they are read side by side."""

    def expect_random_reads(self) -> None:
        """Let memory maps read what is asked for and not megabytes around it."""

class WindowLayouts:
    """Which windows of rings the samples are, epoch after epoch. Threads can share it."""

    def __init__(
        self,
        ranges: NDArray[np.int64],
        keys: NDArray[np.uint64],
        window_lengths: NDArray[np.int64],
        fractions: NDArray[np.uint64],
        children: NDArray[np.int32],
        block_windows: int = 1,
    ) -> None:
        """Lay out windows.

        Args:
            ranges: int64 [d, 2], [begin, end) of each dataset in the tokens of its corpus.
            keys: uint64 [d], of all randomness.
            window_lengths: int64 [k], tokens of a window of each denoiser.
            fractions: uint64 [k - 1], of the `Mixture` that gives the windows their denoisers.
            children: int32 [k - 1, 2], likewise.
            block_windows: Neighbouring windows that stay together: blocks of them come in random order, and windows
                are shuffled within 256 blocks. 1: all windows of an epoch are in random order.
        """

    @property
    def windows_per_epoch(self) -> NDArray[np.int64]:
        """The most windows that fit each ring, [d]."""

    def examples(
        self, datasets: NDArray[np.int32], draws: NDArray[np.int64], whole_blocks: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The windows that draws of datasets are.

        Args:
            datasets: int32 [b].
            draws: int64 [b], how-manieth sample of the dataset; -1 gives no window.
            whole_blocks: Give the block that each window is in, as what is to be read from the disk.

        Returns:
            As `fill_rows` takes them: examples int64 [m, 6], in the row of their place in `draws` and with cuts of -1,
            and keys uint64 [m].
        """

class Denoisers:
    """How tokens become inputs and targets; see denoising.py. Threads can share it."""

    def __init__(
        self,
        table: NDArray[np.float64],
        mode_ids: Sequence[NDArray[np.int32]],
        sentinel_ids: NDArray[np.int32],
        eos_id: int,
        pad_id: int,
        decoder_start_id: int,
        vocab_size: int,
    ) -> None:
        """Check the ids.

        Args:
            table: float64 [k, 2], `DenoisingPlan.table`: mean span length (0: prefix) and density (0: uniform).
            mode_ids: k vectors of int32, put before the inputs.
            sentinel_ids: int32, in order of use.
            eos_id: Ends inputs and targets.
            pad_id: Fills the inputs of rows.
            decoder_start_id: First decoder input of an example.
            vocab_size: All ids are below it.
        """

    def lengths(
        self, denoisers: NDArray[np.int32], raw: NDArray[np.int32], cuts: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Inputs and targets of examples, as `Denoiser.lengths`.  # [m, 2]

        Args:
            denoisers: int32 [m].
            raw: int32 [m], tokens of each example, at least 2.
            cuts: int32 [m], tokens before the cut of uniform denoisers, in [1, raw - 1]; -1 for the most inputs and the
                most targets of them, and for all others.
        """

    def cuts(self, denoisers: NDArray[np.int32], raw: NDArray[np.int32], keys: NDArray[np.uint64]) -> NDArray[np.int32]:
        """The cuts that `fill_rows` draws for these keys; -1 for denoisers that are not uniform.  # [m]"""

def fill_rows(
    sources: TokenSources,
    examples: NDArray[np.int64],
    keys: NDArray[np.uint64],
    denoisers: Denoisers,
    encoder_input_ids: NDArray[np.int32],
    decoder_input_ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    encoder_segment_ids: NDArray[np.int32] | None = None,
    decoder_segment_ids: NDArray[np.int32] | None = None,
) -> None:
    """Fill the rows of a batch with denoised examples; the GIL is released meanwhile.

    What the rows are longer is filled with the pad id, in `labels` with -100, in segment ids with 0, and so are rows
    without examples. When it raises, the output arrays may be partly written.

    Args:
        sources: The tokens.
        examples: int64 [m, 6]: row, dataset, first token in the corpus, tokens (at least 2), denoiser, and tokens
            before the cut of a uniform denoiser or -1 (drawn from the key). Rows get their examples in this order.
        keys: uint64 [m], of the randomness of each example.
        denoisers: How inputs and targets are made.
        encoder_input_ids: Output, int32 [b, s_enc].
        decoder_input_ids: Output, int32 [b, s_dec].
        labels: Output, int32 [b, s_dec].
        encoder_segment_ids: Output, int32 [b, s_enc], counts the examples of a row from 1. Without segment ids a row
            has one example at most.
        decoder_segment_ids: Output, int32 [b, s_dec], likewise.

    Raises:
        TokenOutOfVocabularyError: A token is not in the vocabulary; says dataset, id and token offset.
        ValueError: An argument does not fit; TypeError when it has the wrong type.
    """

def derived_keys(key: int, values: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys that share no random numbers, one for each value.  # [m]"""
