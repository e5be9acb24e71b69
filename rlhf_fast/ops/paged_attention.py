"""paged_attention and write_kv: causal attention of packed tokens over keys and values that lie in blocks. Inference
only: no gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, compiled, dispatch, reference

BACKENDS = ("cpu", "triton", "cuda", "reference")  # best first: Triton has the tensor cores
MOST_DIM = 256  # of a head, on kernels
BLOCK_SIZES = range(16, 129, 16)


class KVCache(NamedTuple):
    """The keys and values of one layer, in blocks; what lies beyond a head's dimension is zero.

    The last but one size of `keys`, and the last of `values`, is the width: `dim` rounded up to a multiple of 16.
    """

    keys: Tensor  # (blocks, kv_heads, width, block_size)
    values: Tensor  # (blocks, kv_heads, block_size, width)
    dim: int

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]

    @staticmethod
    def new(blocks: int, kv_heads: int, dim: int, block_size: int, like: Tensor) -> KVCache:
        """Zeros, in the dtype and on the device of `like`."""
        width = -(-dim // 16) * 16
        return KVCache(
            like.new_zeros(blocks, kv_heads, width, block_size),
            like.new_zeros(blocks, kv_heads, block_size, width),
            dim,
        )


class Places(NamedTuple):
    """Places that follow from a batch, for kernels that would find them anew in every layer; int32 and contiguous."""

    positions: Tensor  # (N,): of each query
    shared: Tensor  # (B,): leading blocks that each sequence shares with its group
    numbers: Tensor  # (B,): 0, 1, ...
    group_queries: Tensor  # (G + 1,): where the queries of each group begin


class PagedBatch(NamedTuple):
    """Layout of the packed queries of a step. All int32, contiguous, and on the device of the queries.

    Sequence b has queries `cu_queries[b] : cu_queries[b + 1]`, which are the last ones of its `contexts[b]` positions.
    Consecutive sequences form groups, `groups[g] : groups[g + 1]`, whose first `shared[g]` blocks are the same and
    lie before their queries: those are read once for the group. No result depends on how sequences are grouped.
    """

    tables: Tensor  # (B, most blocks): the blocks of each sequence in order
    cu_queries: Tensor  # (B + 1,)
    contexts: Tensor  # (B,)
    groups: Tensor  # (G + 1,)
    shared: Tensor  # (G,)
    places: Places | None = None  # as `placed` finds them

    def placed(self, n: int) -> PagedBatch:
        """Return this batch with its places computed once, for `n` queries in all, to serve several layers.

        They are of the tensors as they are now: a tensor that changes later, or is replaced, needs them anew.
        """
        counts, sizes = self.cu_queries.diff(), self.groups.diff()
        sequences = self.contexts.shape[0]
        before = (self.contexts - self.cu_queries[1:]).repeat_interleave(counts, output_size=n)
        numbers = torch.arange(max(n, sequences), dtype=torch.int32, device=before.device)
        shared = self.shared.repeat_interleave(sizes, output_size=sequences)
        places = Places(before + numbers[:n], shared, numbers[:sequences], self.cu_queries[self.groups.long()])
        return self._replace(places=places)

    @staticmethod
    def of(tables: Tensor, cu_queries: Tensor, contexts: Tensor) -> PagedBatch:
        """Lay out sequences of which each is a group of its own."""
        count = contexts.shape[0]
        groups = torch.arange(count + 1, dtype=torch.int32, device=contexts.device)
        return PagedBatch(tables, cu_queries, contexts, groups, torch.zeros_like(groups[:count]))


def paged_attention(
    query: Tensor,
    cache: KVCache,
    batch: PagedBatch,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(softcap(scale * q . k)) v over the keys of each query's own sequence, up to its own position.

    Online softmax over blocks in the order of positions. A token's result depends on its own sequence alone: the same
    bits alone and in any batch, in any chunks, with shared blocks or without.

    Args:
        query: (N, heads, dim), packed as `batch` says; float32, bfloat16 or float16 like the cache. Query head h
            reads key head h // (heads // kv_heads).
        cache: keys and values, those of the queries' own positions included (see `write_kv`).
        scale: of the scores; dim ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        window: a query sees this many keys, its own included; 0 for all.
        sinks: (heads,) float32: a logit per head that takes part in the softmax and has no value.

    Returns:
        (N, heads, dim), in the dtype of `query`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.

    Source: Kwon et al. 2023, arXiv 2309.06180 (paged keys); Milakov & Gimelshein 2018, arXiv 1805.02867
        (online softmax).
    """
    _checks.floats(query=query, sinks=sinks)
    _checks.devices(query=query, keys=cache.keys, values=cache.values, sinks=sinks, **batch._asdict())
    if query.dim() != 3:
        raise ValueError(f"query: shape {tuple(query.shape)}, expected (N, heads, {cache.dim})")
    n, heads, dim = query.shape
    _checks.shapes((heads,), "the heads of query", sinks=sinks)
    kv_heads = cache.keys.shape[1]
    if dim != cache.dim or heads % kv_heads:
        raise ValueError(
            f"query: shape {tuple(query.shape)}, expected (N, a multiple of {kv_heads}, {cache.dim}) like the cache"
        )
    if query.dtype != cache.keys.dtype:
        raise TypeError(f"query: {query.dtype}, expected {cache.keys.dtype} like the cache")
    _check_places(batch, cache, n)
    scale = dim**-0.5 if scale is None else scale
    backend = dispatch.choose("paged_attention", _backends(cache), query)
    if backend == "reference":
        return reference.paged_attention(query, cache, batch, scale=scale, softcap=softcap, window=window, sinks=sinks)
    out = torch.empty(n, heads, dim, dtype=query.dtype, device=query.device)
    if query.stride(2) != 1:
        query = query.contiguous()
    if backend == "triton" and batch.places is None:
        batch = batch.placed(n)
    sinks = None if sinks is None else sinks.float().contiguous()
    kernels(backend).forward(query, cache, batch, scale=scale, softcap=softcap, window=window, sinks=sinks, out=out)
    return out


def write_kv(
    cache: KVCache,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into their places, in one launch with their rotation if asked for.

    Args:
        cache: written to.
        key, value: (N, kv_heads, dim), in the cache's dtype.
        slots: (N,) int64: block * block_size + position in the block.
        cos, sin: (N, dim): the keys, and `query` (N, heads, dim) in place, become x * cos + rotate_half(x) * sin
            first (RoPE, Su et al. 2021, arXiv 2104.09864). In the cache's dtype, like `query`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    _checks.integers(slots=slots)
    _checks.devices(keys=cache.keys, key=key, value=value, slots=slots)
    expected = (slots.shape[0], cache.keys.shape[1], cache.dim)
    _checks.shapes(expected, "the cache", key=key, value=value)
    for name, x in (("key", key), ("value", value), ("cos", cos), ("sin", sin), ("query", query)):
        if x is not None and x.dtype != cache.keys.dtype:
            raise TypeError(f"{name}: {x.dtype}, expected {cache.keys.dtype} like the cache")
    _checks.shapes((slots.shape[0], cache.dim), "the cache", cos=cos, sin=sin)
    if (cos is None) != (sin is None) or (query is not None and cos is None):
        raise ValueError("cos, sin: expected both or neither, and both with a query, which is there to be rotated")
    if query is not None and (query.shape[::2] != (slots.shape[0], cache.dim) or query.stride(2) != 1):
        raise ValueError(
            f"query: shape {tuple(query.shape)}, expected ({slots.shape[0]}, heads, {cache.dim}), the last contiguous"
        )
    if _checks.values_are_checked(slots) and slots.numel():
        _check_range("slots", slots, cache.keys.shape[0] * cache.block_size)
    backend = dispatch.choose("write_kv", _backends(cache), key)
    if backend == "reference":
        return reference.write_kv(cache, key, value, slots, cos=cos, sin=sin, query=query)
    if key.stride(2) != 1 or value.stride(2) != 1:
        key, value = key.contiguous(), value.contiguous()
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    kernels(backend).write(cache, key, value, slots.long().contiguous(), cos=cos, sin=sin, query=query)


def _backends(cache: KVCache) -> tuple[str, ...]:
    """List the backends that serve heads and blocks of these sizes."""
    return BACKENDS if cache.dim <= MOST_DIM and cache.block_size in BLOCK_SIZES else ("reference",)


def _check_places(batch: PagedBatch, cache: KVCache, n: int) -> None:
    for name, x in zip(batch._fields, batch[:5], strict=False):
        if x.dtype != torch.int32 or not x.is_contiguous():
            raise TypeError(f"batch.{name}: {x.dtype} with strides {x.stride()}, expected int32 and contiguous")
    if not _checks.values_are_checked(batch.tables) or not batch.contexts.numel():
        return
    counts = batch.cu_queries.diff()
    if int(batch.cu_queries[0]) != 0 or int(batch.cu_queries[-1]) != n or bool((counts < 0).any()):
        raise ValueError(f"batch.cu_queries: expected to rise from 0 to the {n} queries")
    _check_range("batch.tables", batch.tables, cache.keys.shape[0])
    room = batch.tables.shape[1] * cache.block_size
    if int(batch.contexts.max()) > room or bool((batch.contexts < counts).any()):
        raise ValueError(
            f"batch.contexts: up to {int(batch.contexts.max())}, expected at least each one's queries and at most the "
            f"{room} positions of its table"
        )


def _check_range(name: str, x: Tensor, end: int) -> None:
    low, high = (int(value) for value in x.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{name}: from {low} to {high}, expected from 0 to {end - 1}")


def kernels(backend: str) -> Any:
    """The kernels of a backend: forward and write (see csrc/common/paged_attention.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import paged_attention as in_triton

        return in_triton
    return compiled.PagedAttention(backend)
