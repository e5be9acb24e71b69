"""Attention over packed rows: each segment attends by itself, through the function that the model uses anyway.

transformers finds an attention function by name (AttentionInterface); no module of a model is changed for it. Cut into
segments, attention needs no mask, and no time for pairs of tokens that do not see each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "rlhf_fast_packed"

_packed: ContextVar[tuple[Any, tuple[int, ...]] | None] = ContextVar("rlhf_fast_packed", default=None)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, dim), key and value (1, kv heads, T, dim) -> (1, T, heads, dim)."""
    current = _packed.get()
    if current is None:
        raise RuntimeError(f"attention {NAME!r} was called outside of a packed batch")
    function, segments = current
    pieces = zip(*(x.split(segments, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([function(module, q, k, v, None, **options)[0] for q, k, v in pieces], dim=1), None


AttentionInterface.register(NAME, attend)


def segments_of_now() -> tuple[int, ...] | None:
    """Return the segments of the packed row that is being computed, if one is."""
    current = _packed.get()
    return None if current is None else current[1]


@contextlib.contextmanager
def packed(model: nn.Module, segments: tuple[int, ...]) -> Iterator[None]:
    """Attend within segments of a single row, for a block.

    Raises:
        ValueError: the model does not call its attention through transformers' interface.
    """
    name = model.config.get_text_config()._attn_implementation  # type: ignore[operator, union-attr]
    function = AttentionInterface().get(name)
    if function is None:
        raise ValueError(f"model: attention {name!r} cannot be packed; expected a registered one, such as 'sdpa'")
    token = _packed.set((function, segments))
    try:
        with attending_by(model, NAME):
            yield
    finally:
        _packed.reset(token)


@contextlib.contextmanager
def attending_by(model: nn.Module, name: str) -> Iterator[None]:
    """Attend by the function of that name, for a block; afterwards every config is as it was."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, earlier in before:
            config._attn_implementation_internal = earlier
