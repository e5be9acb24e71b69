"""Compiles csrc/cuda/ for the CPU, against tests/simt/cuda_runtime.h, into a module like rlhf_fast._C with a `cuda`
part. An object is kept as long as what it is made of stays, so one changed kernel is one compilation."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
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
FLAGS = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-ffp-contract=off", "-w"]  # fibers jump between stacks


class CompileError(RuntimeError):
    """What the compiler said."""


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


def compile_program(source: Path, target: Path, *flags: str, root: Path = ROOT) -> Path:
    """One .cu or .cpp file as an object (or, with the right flags, a program)."""
    includes = [f"-I{root / 'tests' / 'simt'}", f"-I{root / 'csrc'}", f"-I{toolkit_headers()}"]
    command = ["g++", *FLAGS, *includes, *flags, "-x", "c++", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return target


@functools.cache
def module() -> Any:
    """The compiled module; built once for each state of its sources, and kept in build/simt."""

    path = library("cuda")
    spec = importlib.util.spec_from_file_location("_simt", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def library(side: str, root: Path = ROOT) -> Path:
    """The extension module of one side, `cuda` as above, or `cpu` as the package has it, but built more quickly."""
    import pybind11

    flags = ["-c", "-fvisibility=hidden", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    if side == "cuda":
        flags += ['-DRLHF_FAST_CUDA="simt"', "-DRLHF_FAST_ONLY_CUDA", "-DRLHF_FAST_MODULE=_simt"]
    else:
        flags += ["-fopenmp", "-O1"]
    folder = root / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"), ThreadPoolExecutor(os.cpu_count()) as pool:  # several processes test
        objects = list(pool.map(lambda source: _object(source, root, folder, flags), sources(side, root)))
        together = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        name = "_simt" if side == "cuda" else "_C"
        path = folder / together / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            aside = path.with_suffix(f".{os.getpid()}")
            subprocess.run(["g++", "-shared", "-fopenmp", *map(str, objects), "-o", str(aside)], check=True)
            aside.replace(path)
    return path


def sources(side: str, root: Path = ROOT) -> list[Path]:
    """What is compiled for a side."""
    kernels = sorted((root / "csrc").glob("cuda/*.cu" if side == "cuda" else "cpu/*.cpp"))
    return list(dict.fromkeys([*kernels, root / "csrc" / "bindings.cpp", root / "csrc" / "cpu" / "isa.cpp"]))


def included(source: Path, root: Path = ROOT) -> set[Path]:
    """The headers of csrc/ and of this folder that a source includes, through others too."""
    found: set[Path] = set()
    left = [source]
    while left:
        file = left.pop()
        for name in re.findall(r'^\s*#\s*include ["<](.+)[">]', file.read_text(encoding="utf-8"), re.MULTILINE):
            for folder in (file.parent, root / "csrc", root / "tests" / "simt"):
                header = (folder / name).resolve()
                if header.is_file() and header not in found:
                    found.add(header)
                    left.append(header)
    return found


def _object(source: Path, root: Path, folder: Path, flags: list[str]) -> Path:
    import pybind11

    state = hashlib.sha256(f"{flags} {FLAGS} {sys.version} {pybind11.__version__}".encode())
    for file in (source, *sorted(included(source, root))):
        state.update(file.read_bytes())
    target = folder / f"{source.stem}-{state.hexdigest()[:16]}.o"
    if not target.exists():
        aside = target.with_suffix(f".{os.getpid()}")
        compile_program(source, aside, *flags, root=root)
        aside.replace(target)
    return target
