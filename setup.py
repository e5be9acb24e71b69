"""Builds csrc/ into rlhf_fast._C. Everything else about the package is in pyproject.toml.

The extension is optional: without a C++ compiler the install succeeds, says that rlhf_fast._C was left out,
and the library runs on its PyTorch and Triton kernels. MAX_JOBS limits how many files compile at once.
"""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# Code for newer instruction sets sits in target regions inside the sources and is chosen at run time, so there is
# no -march here. Results must not depend on the compiler's mood: it may not fuse a multiply with an add unasked
# (-ffp-contract=off), and -ffast-math must never appear, for linking with it turns denormals off process-wide.
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-Wall", "-Wextra"]

LEFT_OUT = """
****************************************************************************************************
WARNING: rlhf_fast._C was left out, because it did not compile:
  {error}
The install goes on without the compiled CPU kernels; the PyTorch ones run in their place, more slowly.
To have them, install a C++17 compiler (g++ or clang) with the Python headers and install again.
****************************************************************************************************
"""


class OptionalBuildExt(build_ext):
    """build_ext that says what was left out, and why, where the standard one would fail."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            print(LEFT_OUT.format(error=error), file=sys.stderr)


extension = Pybind11Extension(
    "rlhf_fast._C",
    sources=sorted(["csrc/bindings.cpp", *glob("csrc/cpu/*.cpp")]),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=COMPILE_ARGS,
    optional=True,
)

with ParallelCompile("MAX_JOBS"):
    setup(ext_modules=[extension], cmdclass={"build_ext": OptionalBuildExt})
