"""Compiles csrc/cuda/ for the CPU, against tests/simt/cuda_runtime.h, into a module like rlhf_fast._C with a `cuda`
part."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock  # comes with torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-w"]


def toolkit_headers() -> Path | None:
    """A folder with cuda_bf16.h: a CUDA toolkit's, or the one that triton brings."""
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", str(Path(nvcc).resolve().parents[1]) if nvcc else None]
    candidates = [Path(folder) / "include" for folder in folders if folder]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        candidates.append(Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "include")
    return next((folder for folder in candidates if (folder / "cuda_bf16.h").exists()), None)


def missing() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    if toolkit_headers() is None:
        return "needs the headers of a CUDA toolkit, or triton, which brings them"
    return None


def compile_program(source: Path, target: Path, *flags: str) -> Path:
    """One .cu or .cpp file as an object (or, with the right flags, a program)."""
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{toolkit_headers()}"]
    subprocess.run(["g++", *FLAGS, *includes, *flags, "-x", "c++", str(source), "-o", str(target)], check=True)
    return target


@functools.cache
def module() -> Any:
    """The compiled module; built once for each state of its sources, and kept in build/simt."""
    import pybind11

    sources = [
        *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        ROOT / "csrc" / "bindings.cpp",
        ROOT / "csrc/cpu/isa.cpp",
    ]
    texts = [path for pattern in ("*.cu", "*.cuh", "*.h", "*.cpp") for path in sorted(ROOT.glob(f"csrc/**/{pattern}"))]
    state = hashlib.sha256()
    for text in (*texts, *sorted(HERE.glob("*.h")), Path(__file__)):
        state.update(text.read_bytes())
    state.update(f"{sys.version} {pybind11.__version__}".encode())
    folder = ROOT / "build" / "simt" / state.hexdigest()[:16]
    path = folder / f"_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # several processes test
        _build(path, sources, folder)
    spec = importlib.util.spec_from_file_location("_simt", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build(path: Path, sources: list[Path], folder: Path) -> None:
    import pybind11

    if not path.exists():
        flags = [
            "-c",
            '-DRLHF_FAST_CUDA="simt"',
            "-DRLHF_FAST_ONLY_CUDA",
            "-DRLHF_FAST_MODULE=_simt",
            "-fvisibility=hidden",
        ]
        flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda s: compile_program(s, folder / f"{s.stem}.o", *flags), sources))
        aside = path.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(aside)], check=True)
        aside.replace(path)
