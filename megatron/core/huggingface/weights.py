"""The weights of a checkpoint of `transformers`: safetensors or pickled by torch, one file or several."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.safetensors_file import SafetensorsFile, TensorKind
from megatron.core.errors import UserError, one_line
from megatron.core.file_utils import read_json

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NAMES = (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)  # the first that is there is read
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PickledFile:
    """A file of `torch.save`, read without running anything that is in it.

    Args:
        path: The file.

    Raises:
        UserError: It is damaged, or holds more than tensors.
    """

    def __init__(self, path: Path) -> None:
        try:
            # Formats before torch 1.6 cannot be mapped: they are read as a whole.
            mapped = zipfile.is_zipfile(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError:
            raise UserError(
                f"{path} holds more than tensors, which could run anything; use one in safetensors"
            ) from None
        except (RuntimeError, EOFError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {one_line(error)[:300]}; use another copy of it") from None
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(f"{path} is no table of tensors by name; use the file that save_pretrained wrote")
        self._tensors = {str(name): tensor for name, tensor in found.items()}
        self.tensors = {name: TensorKind(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """A tensor; not to be changed."""
        return self._tensors[name]


WeightFile: TypeAlias = SafetensorsFile | PickledFile


class Weights:
    """All tensors of a directory by name.

    Args:
        directory: A directory of `transformers`.

    Attributes:
        tensors: Dtype and shape of each.

    Raises:
        UserError: There are no weights, or files are missing, damaged or contradict each other.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        name = weights_name(directory)
        if name is None:
            raise UserError(f"{directory} holds no weights ({', '.join(NAMES)}); give a directory of save_pretrained")
        self._files: dict[str, WeightFile] = {}
        if name in (SAFETENSORS, PICKLE):
            self._files = dict.fromkeys(*self._open(name))
        else:
            self._open_indexed(name)
        self.tensors: dict[str, TensorKind] = {name: file.tensors[name] for name, file in self._files.items()}
        for name, kind in self.tensors.items():
            if kind.dtype not in FLOATS:
                raise UserError(f"{directory}: {name} is {kind.dtype}; quantised models cannot be converted")

    def _open(self, name: str) -> tuple[Mapping[str, TensorKind], WeightFile]:
        path = self.directory / name
        try:
            file: WeightFile = SafetensorsFile(path.resolve()) if path.suffix == ".safetensors" else PickledFile(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}; copy the directory again") from None
        return file.tensors, file

    def _open_indexed(self, name: str) -> None:
        index = self.directory / name
        places = read_json(index).get("weight_map")
        suffix = Path(name.removesuffix(".index.json")).suffix
        if not isinstance(places, dict) or not all(_is_bare(place, suffix) for place in places.values()):
            raise UserError(f"{index} is damaged: its weight_map does not name files of weights beside it")
        for place in sorted(set(places.values())):
            found, file = self._open(place)
            wanted = {tensor for tensor, where in places.items() if where == place}
            if wanted != found.keys():
                differing = ", ".join(sorted(wanted ^ found.keys())[:5])
                raise UserError(f"{index} and {place} disagree about {differing}; copy the directory again")
            self._files |= dict.fromkeys(found, file)

    def read(self, name: str) -> Tensor:
        """A tensor; not to be changed."""
        return self._files[name].read(name)


def weights_name(directory: Path) -> str | None:
    """Name of the file that holds or lists the weights in `directory`, or None."""
    return next((name for name in NAMES if (directory / name).is_file()), None)


def _is_bare(name: object, suffix: str) -> bool:
    """Whether `name` is that of a file beside the index: an index cannot point elsewhere."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(suffix)
