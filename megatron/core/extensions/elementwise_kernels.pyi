"""Types of the C++ extension built from elementwise_kernels.cpp; cpu_elementwise.py checks the arguments.

Tensors are contiguous and given by their addresses; `dtype` is float32 or bfloat16. A wrong size or dtype raises
ValueError.
"""

def softmax_statistics(
    logits: int, dtype: str, rows: int, words: int, labels: int, log_z: int, label_logit: int, threads: int
) -> None:
    """See `cpu_elementwise.softmax_statistics`."""

def logits_gradient(
    logits: int,
    dtype: str,
    rows: int,
    words: int,
    labels: int,
    log_z: int,
    label_scale: int,
    softmax_scale: int,
    threads: int,
) -> None:
    """See `cpu_elementwise.logits_gradient_`."""
