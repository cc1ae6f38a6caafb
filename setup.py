"""Builds the C++ extensions; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

FOLDER = "megatron/core/datasets"
HEADERS = ("arrays", "denoising", "mixture_tree", "randomness", "token_sources", "window_layouts")

setup(
    ext_modules=[
        Pybind11Extension(
            f"megatron.core.datasets.{name}",
            [f"{FOLDER}/{name}.cpp"],
            depends=[f"{FOLDER}/{header}.h" for header in HEADERS],
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
        for name in ("blending_helpers", "checksum_helpers", "file_mapping", "helpers", "packing_helpers")
    ],
    cmdclass={"build_ext": build_ext},
)
