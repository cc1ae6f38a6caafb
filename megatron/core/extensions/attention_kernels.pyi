"""Types of the C++ extension built from attention_kernels.cpp; cpu_attention.py checks the arguments.

Tensors are given by their addresses, 0 for none; scores and probabilities `[b n, q, k]` are contiguous; `dtype` is
float32 or bfloat16. A wrong size or dtype raises ValueError.
"""

class ScoreRule:
    """What becomes of scores `[b n, q, k]` on their way to probabilities."""

    def __init__(
        self,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        causal: bool,
        scale: float,
        diagonals: int,
        mask: int,
        mask_batch_stride: int,
        mask_head_stride: int,
        mask_query_stride: int,
        seed: int,
        dropout: float,
    ) -> None:
        """Holds addresses: `diagonals`, fp32 `[n, q + k - 1]`; `mask`, fp32, by strides in elements, keys adjacent."""

def softmax(rule: ScoreRule, dtype: str, scores: int, dropped: int, statistics: int, known: bool, threads: int) -> None:
    """Scores to probabilities, in place.

    Args:
        rule: Bias, mask, dropout.
        dtype: Of scores and probabilities.
        scores: Are overwritten.
        dropped: Receives the probabilities after dropout, unless 0.
        statistics: fp32 `[b n, q, 2]`, maximum and 1 / sum of a row.
        known: Statistics are read, not written.
        threads: How many to use.
    """

def dropout(rule: ScoreRule, dtype: str, probabilities: int, dropped: int, threads: int) -> None:
    """Probabilities to those after dropout."""

def softmax_backward(
    rule: ScoreRule, dtype: str, probabilities: int, gradients: int, diagonals: int, threads: int
) -> None:
    """Gradients of probabilities (after dropout, if there is any) to those of scores, in place.

    `diagonals`, fp32 `[n, q + k - 1]`, receives the gradient of the bias, unless 0.
    """

def copy_heads(
    element_size: int,
    source: int,
    source_strides: tuple[int, ...],
    target: int,
    target_strides: tuple[int, ...],
    batch: int,
    positions: int,
    heads: int,
    channels: int,
    threads: int,
) -> None:
    """Copies `[b, s, n, d]` between any two layouts; strides in elements."""
