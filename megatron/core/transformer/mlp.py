"""Feed-forward block: ReLU (T5 v1.0), GELU, or a gated unit (Shazeer 2020: GEGLU in T5 v1.1, SwiGLU in UL2)."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.extensions.elementwise import choose_activation
from megatron.core.extensions.torch_elementwise import activate
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel
from megatron.core.transformer.elementwise import gated_activation
from megatron.core.transformer.initialization import matrix_init, residual_output_init
from megatron.core.transformer.precision import residual_dtype


class MLP(nn.Module):
    """`wo(act(wi x))`, or `wo(act(gate x) * up x)` with the rows of gate and up interleaved, `(unit, gate|up)`.

    Units that only make their number divide among the ranks have zero weights on both sides. Since every activation
    maps zero to zero, neither they nor their gradients are ever anything else.

    Args:
        config: Sizes and options.
        compute: Precision and backends.
        num_layers: Layers of the stack this belongs to, for the initialisation of the output projection.
        tensor_parallel: The ranks, which divide the units.

    Raises:
        UserError: `--activation-backend` does not compute the activation.
    """

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, num_layers: int, tensor_parallel: TensorParallel
    ) -> None:
        super().__init__()
        hidden, units = config.hidden_size, config.ffn_hidden_size
        padded = tensor_parallel.round_up(units)
        self.activation = config.activation_function
        self.gated = config.gated
        self.gated_activations = choose_activation(compute)
        if not self.gated and self.gated_activations.plain is None:
            raise UserError(
                f"{self.gated_activations.setting} computes gated activations, not --activation-function "
                f"{self.activation}; use --activation-backend auto"
            )
        self.dropout = config.hidden_dropout
        matrices = ("gate", "up") if self.gated else ("weight",)
        self.tensor_parallel = tensor_parallel
        self.wi = ColumnParallelLinear(
            hidden,
            len(matrices) * padded,
            axes=("mlp", "embed"),
            init=matrix_init(config, *(hidden**-0.5 for _ in matrices), truncated=True),
            matrices=matrices,
            bias=config.add_bias_linear,
            tensor_parallel=tensor_parallel,
            valid_shape=(len(matrices) * units, hidden),
        )
        self.wo = RowParallelLinear(
            padded,
            hidden,
            axes=("embed", "mlp"),
            init=residual_output_init(config, units**-0.5, num_layers, truncated=True),
            bias=config.add_bias_linear,
            tensor_parallel=tensor_parallel,
            valid_shape=(hidden, units),
            output_dtype=residual_dtype(compute),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """`[b, s', h]` to `[b, s', h]`, s' this rank's part of the sequence under sequence parallelism."""
        inner = self.wi(hidden)
        if self.gated:
            activated = gated_activation(inner, self.activation, self.gated_activations)
        else:
            activated = activate(inner, self.activation)
        return self.wo(self.tensor_parallel.dropout(activated, self.dropout, self.training))
