"""Builds the C++ extensions; everything else about the package is in pyproject.toml."""

import os
import platform
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext, has_flag
from setuptools import setup
from setuptools.errors import CompileError, LinkError

DATASETS = "megatron/core/datasets"
DATASETS_HEADERS = ("arrays", "denoising", "mixture_tree", "randomness", "token_sources", "window_layouts")
KERNELS = "megatron/core/extensions"
KERNELS_HEADERS = (
    "amx_tiles",
    "attention_rule",
    "kernel_arguments",
    "parallel",
    "random_bits",
    "tiled_attention_items",
    "vector_math",
)
# errno and traps of floating-point operations keep loops from being vectorised, and nobody asks for them.
# GCC's own AVX-512 headers look uninitialised to it.
KERNELS_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized"]
VECTOR_WIDTH_FLAG = "-mprefer-vector-width=512"


class BuildExtensions(build_ext):
    """Adds to the kernels' flags what this compiler has: OpenMP, wide vectors."""

    def finalize_options(self) -> None:
        """As given, but as many at a time as there are processors."""
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def has_openmp(self) -> bool:
        """Whether a shared library with OpenMP compiles and links."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp", "-fPIC"])
                self.compiler.link_shared_object(objects, f"{folder}/probe.so", extra_postargs=["-fopenmp"])
            except (CompileError, LinkError):
                return False
            return True

    def build_extensions(self) -> None:
        """Builds all of them."""
        openmp = ["-fopenmp"] if self.has_openmp() else []
        wide = platform.machine() in ("x86_64", "AMD64") and has_flag(self.compiler, VECTOR_WIDTH_FLAG)
        for extension in self.extensions:
            if extension.name.startswith("megatron.core.extensions."):
                extension.extra_compile_args += openmp + ([VECTOR_WIDTH_FLAG] if wide else [])
                extension.extra_link_args += openmp
        super().build_extensions()


setup(
    ext_modules=[
        Pybind11Extension(
            f"megatron.core.datasets.{name}",
            [f"{DATASETS}/{name}.cpp"],
            depends=[f"{DATASETS}/{header}.h" for header in DATASETS_HEADERS],
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
        for name in ("blending_helpers", "checksum_helpers", "file_mapping", "helpers", "packing_helpers")
    ]
    + [
        Pybind11Extension(
            f"megatron.core.extensions.{name}",
            [f"{KERNELS}/{name}.cpp"],
            depends=[f"{KERNELS}/{header}.h" for header in KERNELS_HEADERS],
            cxx_std=17,
            extra_compile_args=list(KERNELS_FLAGS),
        )
        for name in ("amx_attention", "attention_kernels", "elementwise_kernels", "linear_kernels", "tiled_attention")
    ],
    cmdclass={"build_ext": BuildExtensions},
)
