"""`--cuda-graphs`: the passes of a microbatch as one CUDA graph.

Launching a kernel takes the host several microseconds, and small models have more kernels than the GPU has work for.
A graph is launched whole. What it reads and writes stays where it was when it was captured: inputs are copied to one
place, gradients accumulate in one place, and the optimizer, outside, changes parameters in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron.core.datasets.loader import TensorBatch
from megatron.core.distributed import ShardingStrategy
from megatron.core.errors import UserError
from megatron.core.parallel_state import ParallelContext
from megatron.training.config import RunConfig

# Microbatches that run as usual first. They compile and tune kernels and set up libraries, which cannot be captured.
WARM_UPS = 3

# Forward and backward pass of a microbatch, times a factor `[]`: accumulates gradients and returns loss sums `[2]`.
MicrobatchPass: TypeAlias = Callable[[TensorBatch, Tensor], Tensor]


def check_cuda_graphs(config: RunConfig, context: ParallelContext, strategy: ShardingStrategy) -> None:
    """Raise `UserError` for a run with `--cuda-graphs` whose microbatches cannot be captured.

    Args:
        config: The run.
        context: The layout.
        strategy: What data-parallel ranks divide.
    """
    model = config.model
    refusals = (
        (context.device.type != "cuda", f"captures kernels of a GPU, and this run is on {context.device}", "remove it"),
        (context.pp_size > 1, "does not capture a pipeline's exchange between stages",
         "remove it, or --pipeline-model-parallel-size"),
        (context.tp_size > 1, "does not capture the collectives of tensor parallelism",
         "remove it, or --tensor-model-parallel-size"),
        (context.dp_size > 1 and strategy != "no_shard", "does not capture the gathering of sharded parameters",
         "remove it or add --data-parallel-sharding-strategy no_shard"),
        (model.hidden_dropout > 0 or model.attention_dropout > 0, "would repeat the same dropout masks",
         "remove it, or --hidden-dropout and --attention-dropout"),
        (config.training.check_determinism_interval is not None,
         "puts gradients where those of the computation before were, with which they are to be compared",
         "remove it, or --check-determinism-interval"),
    )  # fmt: skip
    for applies, reason, cure in refusals:
        if applies:
            raise UserError(f"--cuda-graphs {reason}; {cure}")


class Graph(Protocol):
    """Work that is done again and again on the same memory."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do `work`, where it will be captured."""

    def capture(self, work: Callable[[], None]) -> None:
        """Record `work` without doing it."""

    def replay(self) -> None:
        """Do what was recorded."""


class DeviceGraph:
    """A `Graph` of a GPU.

    The backward pass runs on the stream on which the forward pass ran, but a parameter's accumulation where it first
    did. So warming up happens on the stream of the capture too, or the capture would meet another one.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do `work` after what is queued so far and before what is queued next."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> None:
        """Record `work`; waits for the GPU."""
        # Other threads go on meanwhile: the one that copies batches, NCCL's watchdog, the autograd engine's own.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        """Do what was recorded."""
        self._graph.replay()


class GraphedMicrobatches:
    """A `MicrobatchPass` that is captured once and replayed from then on.

    Microbatches of another shape than the first are computed as usual. Takes memory for one more set of gradients where
    those are joined for a sum over ranks, as these here stay.

    Args:
        compute: What to capture.
        parameters: Plain ones, where they will stay. All get a gradient, maybe of zeros.
        graph: What captures.
    """

    def __init__(self, compute: MicrobatchPass, parameters: Sequence[nn.Parameter], graph: Graph) -> None:
        assert not any(isinstance(parameter, DTensor) for parameter in parameters)
        self._compute, self._parameters, self._graph = compute, parameters, graph
        self._gradients: list[Tensor] = []
        self._inputs: dict[str, Tensor] = {}  # of a microbatch
        self._calls = 0

    def begin_step(self) -> None:
        """Start from gradients of zero; whatever the parameters have by now is left to its owner."""
        if self._gradients:
            torch._foreach_zero_(self._gradients)
        else:
            self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, microbatch: TensorBatch, factor: Tensor) -> Tensor:
        """Accumulate a microbatch's gradients, after `begin_step`; the returned `[2]` is good until the next call."""
        inputs = microbatch.inputs()
        if not self._inputs:
            self._inputs = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
            self._factor = torch.empty_like(factor)
            self._sums = torch.empty(2, dtype=torch.float64, device=factor.device)
        if _shapes(inputs) != _shapes(self._inputs):
            return self._compute(microbatch, factor)
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._factor.copy_(factor)
        if self._calls < WARM_UPS:
            self._graph.warm_up(self._work)
        else:
            if self._calls == WARM_UPS:
                self._graph.capture(self._work)
            self._graph.replay()
        self._calls += 1
        return self._sums

    def _work(self) -> None:
        self._sums.copy_(self._compute(TensorBatch(**self._inputs), self._factor))


def _shapes(inputs: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in inputs.items()}
