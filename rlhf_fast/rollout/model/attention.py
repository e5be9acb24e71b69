"""The attention function that a transformers model calls while it generates: keys and values go into blocks, queries
read them there. transformers finds it by name (AttentionInterface); no module of a model is changed for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from rlhf_fast.models.inner import evaluating
from rlhf_fast.models.packed_attention import attending_by
from rlhf_fast.ops.paged_attention import KVCache, PagedBatch, paged_attention, write_kv

NAME = "rlhf_fast_paged"


@dataclass(frozen=True)
class Options:
    """Arguments that the attention of a layer is called with, besides its tensors."""

    scale: float | None
    softcap: float
    window: int
    sinks: torch.Tensor | None  # (heads,) float32


@dataclass
class Step:
    """State that the attention of every layer needs to know of one forward pass."""

    caches: dict[int, KVCache]  # by layer
    batch: PagedBatch
    slots: torch.Tensor  # (N,) int64: where each token's key and value go
    new_cache: Any = None  # (layer, kv heads, dim, like) -> KVCache, for a layer that has none yet
    windows: dict[int, int] = field(default_factory=dict)  # of layers, as their masks have them; else as they say
    options: dict[int, Options] = field(default_factory=dict)  # of the layers that have called

    def cache(self, layer: int, kv_heads: int, dim: int, like: torch.Tensor) -> KVCache:
        if layer not in self.caches:
            self.caches[layer] = self.new_cache(layer, kv_heads, dim, like)
        return self.caches[layer]


_step: ContextVar[Step | None] = ContextVar("rlhf_fast_step", default=None)


@contextlib.contextmanager
def using(step: Step) -> Iterator[None]:
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current() -> Step:
    step = _step.get()
    if step is None:
        raise RuntimeError(f"attention {NAME!r} was called outside a Generator")
    return step


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, N, dim), key and value (1, kv heads, N, dim) of N packed tokens -> (1, N, heads, dim)."""
    step, layer = current(), int(module.layer_idx)  # type: ignore[arg-type]
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, dim)
    if position_bias is not None or is_causal is False:
        raise ValueError("a bias of its attention" if is_causal is not False else "attention that is not causal")
    if len(keys) != len(queries):
        raise ValueError(f"{len(keys)} keys for {len(queries)} tokens: keys that are compressed, or another layer's")
    if keys.shape != values.shape:
        raise ValueError(f"keys of {keys.shape[2]} and values of {values.shape[2]} dimensions")
    cache = step.cache(layer, keys.shape[1], keys.shape[2], keys)
    write_kv(cache, keys, values, step.slots)
    sinks = None if s_aux is None else s_aux.float().contiguous()
    window = step.windows.get(layer, sliding_window or 0)
    options = step.options[layer] = Options(scaling, softcap or 0.0, window, sinks)
    out = paged_attention(queries, cache, step.batch, **vars(options))
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, attend)


@contextlib.contextmanager
def paged(model: nn.Module) -> Iterator[None]:
    """Attend from blocks within this context, without dropout; afterwards every config and module is as it was."""
    with attending_by(model, NAME), evaluating(model):
        yield
