"""Products of few rows on CPUs, with the decoder's weights in the layout that oneDNN wants for them.

`linear` reads weights as they are stored, which for a handful of rows can take twice as long. Packing a weight takes
as long as a few products with it, and memory for a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parameters import local_tensor
from megatron.core.tensor_parallel import Linear
from megatron.core.tensor_parallel.products import linear
from megatron.core.tensor_parallel.weight_gradients import LinearFunction

# Elements of a weight from which on less reading makes up for oneDNN's 20 microseconds a call.
LARGE_WEIGHT = 2**17
# Uses of a weight before it is packed, so that short results do without.
USES_BEFORE_PACKING = 8
# From here on products are limited by arithmetic, whatever the layout.
MANY_ROWS = 128


def decoding_linear(model: T5Model, rows: int, dtype: torch.dtype) -> LinearFunction:
    """What computes the linear layers of `model` fastest while `rows` rows are decoded in `dtype`.

    The parameters must not change while it is in use.
    """
    # A single row in fp32 waits for the memory in any layout.
    gains = dtype == torch.bfloat16 or (dtype == torch.float32 and rows > 1)
    on_cpu = next(model.parameters()).device.type == "cpu" and torch.backends.mkldnn.is_available()
    return _PackedLinear(model, rows, dtype) if on_cpu and gains and rows < MANY_ROWS else linear


class _PackedLinear:
    """`linear` with the decoder's large weights packed once they have been used for a while.

    Weights of another dtype are cast for each product and so never packed.
    """

    def __init__(self, model: T5Model, rows: int, dtype: torch.dtype) -> None:
        head = model.embedding.word_embeddings if model.lm_head is None else model.lm_head
        modules = [head, *(module for module in model.decoder.modules() if isinstance(module, Linear))]
        weights = [local_tensor(module.weight) for module in modules]
        self.rows = rows
        self.uses = {w.data_ptr(): 0 for w in weights if w.dtype == dtype and w.numel() >= LARGE_WEIGHT}
        self.packed: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        place = weight.data_ptr()
        packed = self.packed.get(place)
        if packed is None:
            uses = self.uses.get(place)
            if uses is None:
                return linear(x, weight, bias)
            self.uses[place] = uses + 1
            if uses < USES_BEFORE_PACKING:
                return linear(x, weight, bias)
            # What torch's own compiler uses for constant weights.
            packed = self.packed[place] = torch.ops.mkldnn._reorder_linear_weight(weight, self.rows)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return product
