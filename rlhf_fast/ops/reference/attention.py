"""Attention over a paged cache of keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.reference.common import widen


def paged_attention(
    query: Tensor,
    cache: Any,
    batch: Any,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend one sequence at a time: its blocks side by side, then softmax over all that each query may see."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out = torch.empty_like(query, memory_format=torch.contiguous_format)  # (N, heads, dim)
    block_size, dim = cache.block_size, cache.dim
    repeats = query.shape[1] // cache.keys.shape[1]
    for b, context in enumerate(batch.contexts.tolist()):
        begin, end = batch.cu_queries[b : b + 2].tolist()
        blocks = batch.tables[b, : -(-context // block_size)].long()
        keys = cache.keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :context, :dim]  # (kv heads, context, dim)
        values = cache.values[blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, :context, :dim]
        keys, values = (widen(x).repeat_interleave(repeats, 0) for x in (keys, values))  # (heads, context, dim)
        scores = scale * torch.einsum("qhd,hkd->hqk", widen(query[begin:end]), keys)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(context - (end - begin), context, device=query.device)[:, None]  # positions of the queries
        key = torch.arange(context, device=query.device)
        seen = (key <= at) & ((key > at - window) if window else True)  # (queries, context)
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores)[:, None, None].expand(-1, end - begin, 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :context]
        out[begin:end] = torch.einsum("hqk,hkd->qhd", weights, values).to(query.dtype)
    return out


def write_kv(
    cache: Any,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    def rotated(x: Tensor) -> Tensor:
        assert cos is not None and sin is not None
        a, b = widen(x).chunk(2, dim=-1)
        return (widen(x) * widen(cos)[:, None] + torch.cat([-b, a], dim=-1) * widen(sin)[:, None]).to(x.dtype)

    if cos is not None:
        key = rotated(key)
        if query is not None:
            query.copy_(rotated(query))
    block, at = slots // cache.block_size, slots % cache.block_size
    cache.keys[block, :, : cache.dim, at] = key
    cache.values[block, :, at, : cache.dim] = value
