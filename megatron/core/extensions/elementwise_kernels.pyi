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

def gated(x: int, y: int, dtype: str, activation: str, units: int, threads: int) -> None:
    """`y = activation(gate) * up` of units in x, pairs (gate, up); activation is gelu or silu."""

def gated_gradient(
    gradient: int, x: int, x_gradient: int, dtype: str, activation: str, units: int, threads: int
) -> None:
    """Gradient of x."""

def dropout(
    residual: int, x: int, y: int, dtype: str, rows: int, width: int, probability: float, seed: int, threads: int
) -> None:
    """`y = residual + dropout(x)`; residual may be 0, none. Seed is the address of 64 bits."""

def rms_norm(
    residual: int,
    branch: int,
    total: int,
    weight: int,
    y: int,
    dtype: str,
    out_dtype: str,
    rows: int,
    width: int,
    epsilon: float,
    probability: float,
    seed: int,
    threads: int,
) -> None:
    """`total = residual + dropout(branch)` and its norm y. With residual 0, total is given; with seed 0, no dropout."""

def rms_norm_gradient(
    more: int,
    gradient: int,
    x: int,
    weight: int,
    x_gradient: int,
    weight_gradient: int,
    dtype: str,
    out_dtype: str,
    rows: int,
    width: int,
    epsilon: float,
    threads: int,
) -> None:
    """Gradients of x, plus `more` unless 0, and of the weight, fp32; dtypes are those of x and of the gradient."""

def sum_of_squares(address: int, dtype: str, size: int, threads: int) -> float:
    """Sum of the squares of `size` numbers."""
