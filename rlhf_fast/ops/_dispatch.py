"""Which backend an op runs on: what ``use_backend`` says, else ``RLHF_FAST_BACKEND``, else the op's first choice.

Each op file holds a literal table, backend name -> function, best first. A backend that was asked for and cannot
serve is an error, never a quiet detour to another one.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

KNOWN = ("reference", "cpu", "triton", "cuda")
IN_THIS_BUILD = ("reference",)

_chosen: ContextVar[str | None] = ContextVar("rlhf_fast_backend", default=None)
_chosen_for_tracing: str | None = None  # the same for torch.compile, which cannot read a ContextVar but guards a global
Implementation = TypeVar("Implementation", bound=Callable[..., object])


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run every op inside ``with use_backend(name):`` on that backend; nests, and is local to the thread or task.

    ``name`` is "reference" (plain PyTorch), "cpu", "triton" or "cuda"; it wins over ``RLHF_FAST_BACKEND``.
    Raises ValueError for an unknown name and RuntimeError for a backend that this build does not have.
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


def choose(op: str, table: dict[str, Implementation]) -> Implementation:
    """The function of ``table`` that this call of ``op`` runs on."""
    chosen = _chosen_for_tracing if torch.compiler.is_compiling() else _chosen.get()
    name = chosen or os.environ.get("RLHF_FAST_BACKEND")
    if not name:
        return next(iter(table.values()))
    if name not in table:
        check_backend("RLHF_FAST_BACKEND", name)
        raise RuntimeError(f"{op}: has no {name!r} backend; it has {', '.join(table)}")
    return table[name]


def check_backend(source: str, name: str) -> str:
    """``name`` if it is a backend of this build; ``source`` says where the name came from."""
    if name not in KNOWN:
        nearest = difflib.get_close_matches(str(name), KNOWN, n=1, cutoff=0.0)[0]
        raise ValueError(f"{source}: {name!r} is not a backend, did you mean {nearest!r}? Known: {', '.join(KNOWN)}")
    if name not in IN_THIS_BUILD:
        raise RuntimeError(f"{source}: backend {name!r} is not in this build, which has {', '.join(IN_THIS_BUILD)}")
    return name
