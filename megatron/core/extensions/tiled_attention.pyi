"""Types of the C++ extension built from tiled_attention.cpp; cpu_attention.py checks the arguments.

Tensors are fp32 `[b, s, n, d]`, given by addresses and strides in elements, their channels adjacent; `channels` d is a
multiple of 16 up to 256. A wrong size raises ValueError.
"""

from collections.abc import Sequence

from megatron.core.extensions.attention_kernels import ScoreRule

def available() -> bool:
    """Whether this build has code for the vectors of this processor; without it torch's products are faster."""

def forward(
    rule: ScoreRule,
    channels: int,
    addresses: Sequence[int],
    strides: Sequence[Sequence[int]],
    statistics: int,
    threads: int,
) -> None:
    """Attention; the tensors are query, key, value, context.

    `statistics`, fp32 `[b n, q, 2]`, receives maximum and 1 / sum of each row of the probabilities.
    """

def backward(
    rule: ScoreRule,
    channels: int,
    addresses: Sequence[int],
    strides: Sequence[Sequence[int]],
    statistics: int,
    diagonals: int,
    threads: int,
) -> None:
    """Its gradients; the tensors are gradient, context, query, key, value and the gradients of the last three.

    `diagonals`, fp32 `[n, q + k - 1]`, receives the gradient of the bias, unless 0.
    """
