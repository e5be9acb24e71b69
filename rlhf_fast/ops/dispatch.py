"""Choose the backend of an op: what ``use_backend`` says, else ``RLHF_FAST_BACKEND``, else the device's best.

A backend that was asked for and cannot serve is an error that says what to do, never a quiet detour to another one.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from rlhf_fast.ops import compiled

KNOWN = ("reference", "cpu", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of all backends but the reference, which takes any

# Device type -> backends for it. Of those that an op has, best first, the first one of these runs that is here and
# takes the dtype.
SERVE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# Backend -> the device types whose tensors it takes; the reference takes all.
RUNS_ON: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "triton": ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",),
    "cuda": ("cuda",),
}

# Backend -> what to do about it, for those that are not here.
MISSING: dict[str, str] = {}
if compiled.cpu is None:
    MISSING["cpu"] = "rlhf_fast._C was not built: install g++ or clang and install rlhf-fast again"
if compiled.cuda is None:
    MISSING["cuda"] = "rlhf_fast._C was built without CUDA: install the CUDA toolkit (nvcc) and install rlhf-fast again"
if importlib.util.find_spec("triton") is None:
    MISSING["triton"] = "triton is not installed; run: python -m pip install triton"

_chosen: ContextVar[str | None] = ContextVar("rlhf_fast_backend", default=None)
_chosen_for_tracing: str | None = None  # the same for torch.compile, which cannot read a ContextVar but guards a global


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run every op inside ``with use_backend(name):`` on that backend; nests, and is local to the thread or task.

    ``name`` is "reference" (plain PyTorch), "cpu" (C++), "triton" or "cuda" (C++); it wins over ``RLHF_FAST_BACKEND``.
    Raises ValueError for an unknown name and RuntimeError for a backend that is not here, with what to do about it.
    """
    return _scope(check_backend("use_backend", name))


@contextmanager
def _scope(name: str) -> Iterator[None]:
    global _chosen_for_tracing
    token, before = _chosen.set(name), _chosen_for_tracing
    _chosen_for_tracing = name
    try:
        yield
    finally:
        _chosen.reset(token)
        _chosen_for_tracing = before


def asked() -> str:
    """The backend that was asked for, by `use_backend` or else the environment; empty if none was."""
    scoped = _chosen_for_tracing if torch.compiler.is_compiling() else _chosen.get()
    return scoped or os.environ.get("RLHF_FAST_BACKEND") or ""


def choose(op: str, backends: tuple[str, ...], x: Tensor) -> str:
    """The backend that this call of ``op``, which has ``backends``, runs on; ``x`` is its leading tensor."""
    if name := asked():
        return _asked_for(name, op, backends, x)
    here = SERVE.get(x.device.type, ())
    for name in backends:
        if name in here and name not in MISSING and (name == "reference" or x.dtype in KERNEL_DTYPES):
            return name
    return "reference"


def _asked_for(name: str, op: str, backends: tuple[str, ...], x: Tensor) -> str:
    if name not in backends:
        check_backend("RLHF_FAST_BACKEND", name)
        raise RuntimeError(f"{op}: has no {name!r} backend; it has {', '.join(backends)}")
    if name == "reference":
        return name
    check_backend("RLHF_FAST_BACKEND", name)
    if x.device.type not in RUNS_ON[name]:
        raise RuntimeError(f"{op}: backend {name!r} takes tensors on {' or '.join(RUNS_ON[name])}, not on {x.device}")
    if x.dtype not in KERNEL_DTYPES:
        dtype = str(x.dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{op}: backend {name!r} takes float32, bfloat16 or float16, not {dtype}; backend 'reference' does"
        )
    return name


def check_backend(source: str, name: str) -> str:
    """``name`` if it is a backend that is here; ``source`` says where the name came from."""
    if name not in KNOWN:
        nearest = difflib.get_close_matches(str(name), KNOWN, n=1, cutoff=0.0)[0]
        raise ValueError(f"{source}: {name!r} is not a backend, did you mean {nearest!r}? Known: {', '.join(KNOWN)}")
    if name in MISSING:
        raise RuntimeError(f"{source}: backend {name!r} is not here: {MISSING[name]}")
    return name
