"""Types of the C++ extension built from packing_helpers.cpp."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def mixture_draws(
    fractions: NDArray[np.uint64], children: NDArray[np.int32], positions: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Which dataset gives each position of a mixture's stream, and how many of the positions before were its.

    Args:
        fractions: uint64 [n], share of its draws that node n gives to its left child, in units of 2**-64.
        children: int32 [n, 2], left and right child of each node, which follow it; ~d is dataset d. Without nodes
            there is one dataset.
        positions: int64 [m], none negative.

    Returns:
        Datasets, int32 [m], and draws, int64 [m].
    """

def shuffled(
    datasets: NDArray[np.int32], draws: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """The example that each draw of a dataset is: another permutation of all in each epoch of the dataset.

    Args:
        datasets: int32 [m], each in [0, d).
        draws: int64 [m], none negative.
        sizes: int64 [d], examples of each dataset.
        keys: uint64 [d], which order they come in.

    Returns:
        Examples, int64 [m].
    """

def example_spans(
    boundaries: Sequence[NDArray[np.int64]],
    datasets: NDArray[np.int32],
    examples: NDArray[np.int64],
    most: tuple[int, int],
) -> NDArray[np.int64]:
    """Where the tokens of examples are in their datasets.

    Args:
        boundaries: Of each dataset of n examples int64 [2n + 1], where inputs and targets begin, in turn, and the end.
        datasets: int32 [m].
        examples: int64 [m].
        most: Longer inputs and targets are cut to these lengths.

    Returns:
        int64 [m, 4]: begin and length of the inputs, begin and length of the targets.
    """

def cut_documents(
    starts: NDArray[np.int64], bounds: NDArray[np.int64], longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Cut documents into pieces of 2 to `longest` tokens, which hold every token of a document of 2 or more once.

    Args:
        starts: int64 [m + 1], first token of each document, then the end of the last; ascending.
        bounds: int64 [w + 1], first document of each block, then m.
        longest: Most tokens of a piece, at least 3.

    Returns:
        First token of each piece, int64 [p]; its tokens, int32 [p]; first piece of each block, then p, int64 [w + 1].
    """

def first_fit(
    lengths: NDArray[np.int32], window_starts: NDArray[np.int64], capacities: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The row of each example: in order, each goes to the first row of its window that has room along all axes.

    Args:
        lengths: int32 [m, axes], none above the capacity; one axis or two.
        window_starts: int64 [w + 1], first example of each window, then m.
        capacities: int64 [axes], room of an empty row.

    Returns:
        Row of each example, counted from 0 in each window, int32 [m], and rows of each window, int64 [w].
    """

def fill_packed_rows(
    sources: Sequence[NDArray[np.integer]],
    placements: NDArray[np.int64],
    pad_id: int,
    eos_id: int,
    decoder_start_id: int,
    encoder_input_ids: NDArray[np.int32],
    decoder_input_ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    encoder_segment_ids: NDArray[np.int32],
    decoder_segment_ids: NDArray[np.int32],
) -> None:
    """Fill the rows of a batch with examples, one after the other; the last token of each side becomes EOS.

    Args:
        sources: Token ids of each dataset, uint16 or int32.
        placements: int64 [m, 6]: row, dataset, and the four of `example_spans`. Examples of a row stand in it in this
            order.
        pad_id: Fills what is left of the inputs; labels have -100 there, segment ids 0.
        eos_id: Ends inputs and targets, cut or not.
        decoder_start_id: First decoder input of each example.
        encoder_input_ids: Output, int32 [b, s_enc].
        decoder_input_ids: Output, int32 [b, s_dec].
        labels: Output, int32 [b, s_dec].
        encoder_segment_ids: Output, int32 [b, s_enc], counts the examples of a row from 1.
        decoder_segment_ids: Output, int32 [b, s_dec].

    Raises:
        ValueError: An argument does not fit, such as examples that are too long for their row.
    """
