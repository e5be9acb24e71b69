"""Builds csrc/ into rlhf_fast._C. Everything else about the package is in pyproject.toml.

Nothing here is required: without a C++ compiler the install succeeds without rlhf_fast._C, without nvcc it succeeds
without the CUDA kernels in it, and either way it says so. MAX_JOBS limits how many files compile at once;
RLHF_FAST_CUDA_ARCHS="90 100" replaces the list of CUDA architectures, and "" leaves CUDA out. RLHF_FAST_SANITIZE=1
builds with the address and undefined-behaviour sanitizers (`make asan`).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# Code for newer instruction sets sits in target regions inside the sources and is chosen at run time, so there is
# no -march here. Results must not depend on the compiler's mood: it may not fuse a multiply with an add unasked
# (-ffp-contract=off), and -ffast-math must never appear, for linking with it turns denormals off process-wide.
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-Wall", "-Wextra"]
LINK_ARGS = []
if os.environ.get("RLHF_FAST_SANITIZE"):  # `make asan`: what reads or writes where it may not ends the process
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    FEW_LINES = ["-fno-inline", "-DSIMD_INLINE=inline", "-DSIMD_INLINE_LAMBDA="]  # in a function, or GCC takes minutes
    COMPILE_ARGS = ["-O0", "-g1", "-fno-omit-frame-pointer", *FEW_LINES, *SANITIZE, *COMPILE_ARGS[1:], "-Wno-psabi"]
    LINK_ARGS = SANITIZE

# Each runs on its whole family (80 on 86 and 89, say); the PTX of the last is for what is yet to come.
CUDA_ARCHS = ["80", "90", "100", "120"]
# -ftz: exp2f is then one instruction. Kernels read each logit once and keep what they need in registers.
NVCC_ARGS = [
    "-std=c++17",
    "-O3",
    "-ftz=true",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wno-unknown-pragmas",
]

LEFT_OUT = """
****************************************************************************************************
WARNING: {what} left out:
  {error}
The install goes on without; {instead}, more slowly.
To have them, {remedy} and install again.
****************************************************************************************************
"""


def warn(what, error, instead, remedy):
    print(LEFT_OUT.format(what=what, error=error, instead=instead, remedy=remedy), file=sys.stderr)


def find_cuda():
    """(nvcc, folder of the static runtime) of the first toolkit that has both, or None."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    folders.append(str(Path(nvcc).resolve().parents[1]) if nvcc else None)
    for folder in folders:
        for libraries in ("lib64", "lib", "targets/x86_64-linux/lib") if folder else ():
            compiler, runtime = Path(folder, "bin", "nvcc"), Path(folder, libraries, "libcudart_static.a")
            if compiler.exists() and runtime.exists():
                return str(compiler), str(runtime.parent)
    return None


def cuda_archs(nvcc):
    """The architectures to build for: those asked for, or those of ours that this nvcc knows."""
    asked = os.environ.get("RLHF_FAST_CUDA_ARCHS")
    if asked is not None:
        return asked.split()
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]


def compile_cuda(nvcc, archs, sources, folder):
    """Compile each source for all archs; returns the object files."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        target = str(folder / (Path(source).stem + ".o"))
        command = [nvcc, *NVCC_ARGS, *targets, "-Icsrc", "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, sources))


class OptionalBuildExt(build_ext):
    """build_ext that says what was left out, and why, where the standard one would fail."""

    def build_extension(self, ext):
        if self._compiles("int main() { return 0; }", "-fopenmp"):
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        self._add_cuda(ext)
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            if LINK_ARGS:
                raise  # nothing takes the place of a sanitized one, and the ordinary one stays
            # One that an earlier build left in the source tree would not fit the Python code of today.
            Path("rlhf_fast", self.get_ext_filename("_C")).unlink(missing_ok=True)
            warn(
                "rlhf_fast._C was",
                error,
                "the PyTorch and Triton kernels run in its place",
                "install a C++17 compiler (g++ or clang) with the Python headers",
            )

    def _compiles(self, program, flag):
        """Return whether the compiler and its linker know a flag."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=[flag])
            except (BaseError, CCompilerError, OSError):
                return False
        return True

    def _add_cuda(self, ext):
        found = find_cuda()
        if found is None:
            return
        nvcc, libraries = found
        try:
            archs = cuda_archs(nvcc)
            if not archs:
                return
            ext.extra_objects += compile_cuda(
                nvcc, archs, sorted(glob("csrc/cuda/*.cu")), Path(self.build_temp) / "cuda"
            )
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            warn(
                "the CUDA kernels of rlhf_fast._C were",
                error,
                "the Triton kernels run in their place on a GPU",
                "mend the CUDA toolkit that was found (or set CUDA_HOME)",
            )
            return
        version = re.search(r"V([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
        built = " ".join(f"sm_{arch}" for arch in archs) + f" by nvcc {version[1] if version else 'of some version'}"
        ext.define_macros.append(("RLHF_FAST_CUDA", f'"{built}"'))
        ext.library_dirs.append(libraries)
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]


extension = Pybind11Extension(
    "rlhf_fast._C",
    sources=sorted(["csrc/bindings.cpp", *glob("csrc/cpu/*.cpp")]),
    depends=sorted([*glob("csrc/**/*.h", recursive=True), *glob("csrc/cuda/*.cu*")]),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=COMPILE_ARGS,
    extra_link_args=LINK_ARGS,
    optional=True,
)

with ParallelCompile("MAX_JOBS"):
    setup(ext_modules=[extension], cmdclass={"build_ext": OptionalBuildExt})
