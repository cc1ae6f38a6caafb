"""Which implementation computes norms, gated activations and the loss: `--norm-backend` and its neighbours.

An implementation is a module. A *kernel* module takes some devices and dtypes (its `supports` says which) and, for
norms, fuses them with the sums around them: `cpu_elementwise`, `triton_elementwise`. Others have the plain functions
and take whatever comes: `torch_elementwise`, and NVIDIA's packages, which have norms only.

`auto` is the kernels where they compute and torch elsewhere. torch.compile fuses torch's norms and activations by
itself, so that compiled layers on GPUs have those; the head, which is not compiled, has kernels in any case.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.config import ComputeConfig
from megatron.core.errors import UserError
from megatron.core.extensions import cpu_elementwise, torch_elementwise, triton_elementwise
from megatron.core.extensions.packages import installed, require

KERNELS = {"cpu": cpu_elementwise, "triton": triton_elementwise}
PACKAGES = ("apex", "transformer_engine")


class Implementations(NamedTuple):
    """What a flag means, before there are tensors.

    Attributes:
        setting: The flag and its value, for the user.
        kernels: Modules of kernels, the first that supports a tensor computes.
        plain: The module that computes what no kernel does; None: that is an error.
    """

    setting: str
    kernels: tuple[ModuleType, ...]
    plain: ModuleType | None

    def kernel(self, *tensors: Tensor, dtype: torch.dtype | None = None) -> ModuleType | None:
        """The module of kernels for these tensors and a result of `dtype`, if there is one."""
        for module in self.kernels:
            if all(module.supports(tensor) for tensor in tensors) and (dtype is None or dtype in module.DTYPES):
                return module
        return None

    def module(self, *tensors: Tensor, dtype: torch.dtype | None = None) -> ModuleType:
        """The module that computes with these tensors: kernels, or the plain functions.

        Raises:
            UserError: The flag names kernels that do not take them.
        """
        module = self.kernel(*tensors, dtype=dtype) or self.plain
        if module is None:
            dtypes = dict.fromkeys([*(tensor.dtype for tensor in tensors), *([] if dtype is None else [dtype])])
            where = f"{' and '.join(map(str, dtypes))} on {tensors[0].device.type}".replace("torch.", "")
            raise UserError(f"{self.setting} does not compute in {where}; use {self.setting.split()[0]} auto")
        return module


def _implementations(flag: str, value: str, *, fuses_itself: bool) -> Implementations:
    setting = f"{flag} {value}"
    if value == "torch":
        return Implementations(setting, (), torch_elementwise)
    if value in KERNELS:
        if value == "triton":
            require(setting, "triton", f"use {flag} auto")
        return Implementations(setting, (KERNELS[value],), None)
    if value in PACKAGES:
        return Implementations(setting, (), import_module(f"megatron.core.extensions.{value}"))
    assert value == "auto", setting
    kernels: tuple[ModuleType, ...] = (cpu_elementwise,)
    # Its interpreter, which computes on CPUs, has to be asked for.
    if torch.cuda.is_available() and installed("triton") and not fuses_itself:
        kernels = (cpu_elementwise, triton_elementwise)
    return Implementations(setting, kernels, torch_elementwise)


def choose_norm(compute: ComputeConfig) -> Implementations:
    """What `--norm-backend` means; raises `UserError` where its package is missing."""
    return _implementations("--norm-backend", compute.norm_backend, fuses_itself=compute.compile)


def choose_activation(compute: ComputeConfig) -> Implementations:
    """What `--activation-backend` means; raises `UserError` where its package is missing."""
    return _implementations("--activation-backend", compute.activation_backend, fuses_itself=compute.compile)


def choose_cross_entropy(value: str) -> Implementations:
    """What `--cross-entropy-backend` means; raises `UserError` where its package is missing."""
    return _implementations("--cross-entropy-backend", value, fuses_itself=False)


def check_elementwise(compute: ComputeConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `UserError` for a backend that cannot compute here, before there is a model.

    Args:
        compute: The flags.
        device: Of the run.
        dtype: Of matrix products; the residual stream under fp16 is fp32.
    """
    numbers = torch.empty(0, dtype=dtype, device=device)
    residual = numbers.float() if dtype == torch.float16 else numbers
    choose_norm(compute).module(residual, dtype=dtype)
    choose_activation(compute).module(numbers)
    choose_cross_entropy(compute.cross_entropy_backend).module(numbers)
    if compute.norm_backend == "apex":
        from megatron.core.extensions import apex

        apex.check_norm(device)
    elif compute.norm_backend == "transformer_engine":
        from megatron.core.extensions import transformer_engine

        transformer_engine.check_norm(device, compute.compile)
