"""Types of the C++ extension built from helpers.cpp."""

import numpy as np
from numpy.typing import NDArray

class TokenOutOfVocabularyError(ValueError):
    """A token of the corpus is not an id of the vocabulary."""

def window_starts(
    begin: int, end: int, window_length: int, seed: int, sample_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """First token of each sample's window: offsets in [begin, end), where the window may wrap to `begin`.

    Args:
        begin: First token of the range.
        end: One past the last token of the range.
        window_length: Tokens of a window; (end - begin) // window_length windows make an epoch.
        seed: Unsigned 64-bit key of the order and of the offsets.
        sample_ids: int64 [b], each at least -1; a padding row (-1) gets `begin`.
    """

def fill_span_corruption(
    tokens: NDArray[np.integer],
    begin: int,
    end: int,
    sample_ids: NDArray[np.int64],
    window_length: int,
    noise_tokens: int,
    num_spans: int,
    seed: int,
    vocab_size: int,
    pad_id: int,
    eos_id: int,
    decoder_start_id: int,
    sentinel_ids: NDArray[np.int32],
    encoder_input_ids: NDArray[np.int32],
    decoder_input_ids: NDArray[np.int32],
    labels: NDArray[np.int32],
) -> None:
    """Fill the rows of a batch with span-corrupted windows; the GIL is released meanwhile.

    A row has window_length - noise_tokens + num_spans + 1 encoder tokens and noise_tokens + num_spans + 1
    targets; what the arrays are longer is filled with `pad_id`, in `labels` with -100. Sample id -1 gives a row
    of nothing but that. When it raises, the output arrays may be partly written.

    Args:
        tokens: The corpus, one-dimensional and contiguous, of any integer type of indexed datasets; never copied.
        begin: First token of the range that is read.
        end: One past the last token of the range.
        sample_ids: int64 [b], each at least -1.
        window_length: Raw tokens of a sample.
        noise_tokens: How many of them are masked.
        num_spans: In how many spans.
        seed: Unsigned 64-bit key of all randomness.
        vocab_size: Ids from this on (or below 0) in `tokens` are refused.
        pad_id: Fills the inputs.
        eos_id: Ends inputs and targets.
        decoder_start_id: First decoder input.
        sentinel_ids: int32 [at least num_spans], in order of use.
        encoder_input_ids: Output, int32 [b, at least the inputs].
        decoder_input_ids: Output, int32 [b, at least the targets].
        labels: Output, int32, shaped as `decoder_input_ids`.

    Raises:
        TokenOutOfVocabularyError: A token is not in [0, vocab_size); says id and token offset.
        ValueError: An argument does not fit; TypeError when it has the wrong type.
    """
