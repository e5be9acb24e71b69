"""paged_attention and write_kv in Triton: a program a few query tokens, one key head, and some of the keys.

Keys are taken in parts of PART positions (or the multiple of the block size that comes first), wherever a batch begins
or ends: online softmax block by block within a part, then the parts in their order. One program goes through all parts
of its tokens, or, where there are few tokens, each part has a program of its own and a second launch puts them
together; the arithmetic is the same. Parts that all sequences of a group share are computed by programs that hold
tokens of the whole group.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._math import tanh
from rlhf_fast.kernels.launch_sizes import sizes

ROWS = 16  # heads of tokens in a program: what tl.dot needs
MOST_SPLIT = 256 << 20  # bytes of parts in memory


@triton.jit
def _unit_of(starts, units, tile, TOKENS: tl.constexpr):
    """Find the unit that a tile belongs to: unit u has tiles from starts[u] // TOKENS + u on."""
    low = 0
    high = units
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _merge(most, total, sums, other_most, other_total, other_sums):
    """Merge two parts of a softmax into one."""
    new = tl.maximum(most, other_most)
    base = tl.where(new == float("-inf"), 0.0, new)
    a = tl.exp(most - base)
    b = tl.exp(other_most - base)
    return new, total * a + other_total * b, sums * a[:, None] + other_sums * b[:, None]


@triton.jit
def _part(
    q, keys, values, table, kv_head, kv_heads, first_block, last_block, position, first_key, scale, softcap,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """(largest score, sum of weights, weighted values) of the rows over some blocks."""
    most = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    sums = tl.zeros((q.shape[0], WIDE), tl.float32)
    d = tl.arange(0, WIDE)
    k = tl.arange(0, KEYS)
    for block in range(first_block, last_block):
        place = (tl.load(table + block).to(tl.int64) * kv_heads + kv_head) * (WIDTH * BLOCK)
        at = block * BLOCK + k
        # What no row may see is not read: it may be anything.
        valid = (k < BLOCK) & (at <= tl.max(position, 0))
        key = tl.load(
            keys + place + d[:, None] * BLOCK + k[None, :], mask=(d[:, None] < WIDTH) & valid[None, :], other=0.0
        )
        if WIDEN:
            key = key.to(tl.float32)
        s = tl.dot(q, key, input_precision="ieee") * scale
        if HAS_CAP:
            s = softcap * tanh(s / softcap)
        seen = valid[None, :] & (at[None, :] <= position[:, None]) & (at[None, :] >= first_key[:, None])
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(most, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - base[:, None])
        decay = tl.exp(most - base)
        value = tl.load(
            values + place + k[:, None] * WIDTH + d[None, :], mask=valid[:, None] & (d[None, :] < WIDTH), other=0.0
        )
        total = total * decay + tl.sum(p, 1)
        if WIDEN:
            value = value.to(tl.float32)
        sums = sums * decay[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        most = new
    return most, total, sums


@triton.jit
def _forward(
    query, keys, values, tables, table_stride, starts, units, firsts, shared, positions, sinks, out, parts,
    part_stats, token_stride, head_stride, heads, kv_heads, scale, softcap, window, number_of_parts,
    REP: tl.constexpr, REPS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, SPLIT: tl.constexpr, OF_GROUPS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    unit = _unit_of(starts, units, tile, TOKENS)
    begin = tl.load(starts + unit)
    end = tl.load(starts + unit + 1)
    row = tl.arange(0, TOKENS * REPS)
    token = begin + (tile - (begin // TOKENS + unit)) * TOKENS + row // REPS
    head = kv_head * REP + row % REPS
    real = (token < end) & (row % REPS < REP)
    if tl.max(real.to(tl.int32), 0) > 0:
        d = tl.arange(0, WIDE)
        q = tl.load(
            query + (token.to(tl.int64) * token_stride + head * head_stride)[:, None] + d[None, :],
            mask=real[:, None] & (d[None, :] < DIM),
            other=0.0,
        )
        if WIDEN:
            q = q.to(tl.float32)
        position = tl.load(positions + token, mask=real, other=-1)
        first_key = tl.where((window > 0) & real, tl.maximum(position - window + 1, 0), 0)
        least_key = tl.min(tl.where(real, first_key, 2147483647), 0)
        table = tables + tl.load(firsts + unit).to(tl.int64) * table_stride
        shared_parts = tl.load(shared + unit) // BLOCKS
        last_part = tl.max(position, 0) // (BLOCK * BLOCKS) + 1
        most = tl.full((TOKENS * REPS,), float("-inf"), tl.float32)
        total = tl.zeros((TOKENS * REPS,), tl.float32)
        sums = tl.zeros((TOKENS * REPS, WIDE), tl.float32)
        if SPLIT:
            first = tl.program_id(2)
            last = tl.minimum(first + 1, last_part)
            if OF_GROUPS:
                last = tl.minimum(last, shared_parts)
            elif first < shared_parts:
                last = first  # somebody else computes it, for the whole group
        else:
            first = least_key // (BLOCK * BLOCKS)
            last = last_part
        for part in range(first, last):
            first_block = tl.maximum(part * BLOCKS, least_key // BLOCK)
            last_block = tl.minimum((part + 1) * BLOCKS, tl.max(position, 0) // BLOCK + 1)
            one_most, one_total, one_sums = _part(
                q, keys, values, table, kv_head, kv_heads, first_block, last_block, position, first_key, scale,
                softcap, WIDTH, WIDE, BLOCK, KEYS, HAS_CAP, WIDEN,
            )  # fmt: skip
            if SPLIT:
                at = (token.to(tl.int64) * heads + head) * number_of_parts + part
                tl.store(part_stats + 2 * at, one_most, mask=real)
                tl.store(part_stats + 2 * at + 1, one_total, mask=real)
                tl.store(parts + at[:, None] * WIDE + d[None, :], one_sums, mask=real[:, None])
            else:
                most, total, sums = _merge(most, total, sums, one_most, one_total, one_sums)
        if not SPLIT:
            _store(out, sinks, most, total, sums, token, head, real, heads, DIM, WIDE, HAS_SINKS)


@triton.jit
def _store(
    out, sinks, most, total, sums, token, head, real, heads, DIM: tl.constexpr, WIDE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=real, other=0.0)
        new = tl.maximum(most, sink)
        scale = tl.exp(most - new)
        total = total * scale + tl.exp(sink - new)
        sums = sums * scale[:, None]
    d = tl.arange(0, WIDE)
    y = sums / tl.where(real, total, 1.0)[:, None]
    tl.store(
        out + ((token.to(tl.int64) * heads + head) * DIM)[:, None] + d[None, :],
        y.to(out.dtype.element_ty),
        mask=real[:, None] & (d[None, :] < DIM),
    )


@triton.jit
def _finish(
    parts, part_stats, positions, sinks, out, heads, window, number_of_parts,
    DIM: tl.constexpr, WIDE: tl.constexpr, PER_PART: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """The parts of one head of one token, in order."""
    token = tl.program_id(0) + tl.arange(0, 1)
    head = tl.program_id(1) + tl.arange(0, 1)
    d = tl.arange(0, WIDE)
    position = tl.load(positions + tl.program_id(0))
    first = 0
    if window > 0:
        first = tl.maximum(position - window + 1, 0) // PER_PART
    most = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((1, WIDE), tl.float32)
    for part in range(first, position // PER_PART + 1):
        at = (token.to(tl.int64) * heads + head) * number_of_parts + part
        one = tl.load(parts + at[:, None] * WIDE + d[None, :])
        most, total, sums = _merge(
            most, total, sums, tl.load(part_stats + 2 * at), tl.load(part_stats + 2 * at + 1), one
        )
    _store(out, sinks, most, total, sums, token, head, token >= 0, heads, DIM, WIDE, HAS_SINKS)


def forward(
    query: Tensor,
    cache: Any,
    batch: Any,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Attend as csrc/common/paged_attention.h defines."""
    n, heads, dim = query.shape
    if n == 0:
        return
    kv_heads, width, block = cache.keys.shape[1:]
    size = sizes("paged_attention", query.device)
    rep = heads // kv_heads
    reps = triton.next_power_of_2(rep)
    tokens = max(1, ROWS // reps)
    blocks = -(-size["PART"] // block)  # in a part
    number_of_parts = -(-batch.tables.shape[1] // blocks)
    wide = triton.next_power_of_2(max(width, 16))
    split = number_of_parts > 1 and 4 * n * heads * number_of_parts * (wide + 2) <= MOST_SPLIT
    positions, shared, numbers, group_queries = batch.places
    parts = stats = None
    if split:
        parts = torch.empty(n, heads, number_of_parts, wide, device=query.device)
        stats = torch.empty(n, heads, number_of_parts, 2, device=query.device)
    sequences = batch.contexts.shape[0]
    units = [(batch.cu_queries, sequences, numbers, shared, False)]
    if split and batch.shared.shape[0] < sequences:
        units.append((group_queries, batch.shared.shape[0], batch.groups, batch.shared, True))
    for starts, count, firsts, of_group, of_groups in units:
        grid = (n // tokens + count, kv_heads, number_of_parts if split else 1)
        _forward[grid](
            query, cache.keys, cache.values, batch.tables, batch.tables.stride(0), starts, count, firsts, of_group,
            positions, sinks, out, parts, stats, query.stride(0), query.stride(1), heads, kv_heads, scale, softcap,
            window, number_of_parts, REP=rep, REPS=reps, TOKENS=tokens, DIM=dim, WIDTH=width, WIDE=wide, BLOCK=block,
            KEYS=triton.next_power_of_2(block), BLOCKS=blocks, HAS_CAP=softcap > 0, HAS_SINKS=sinks is not None,
            SPLIT=split, OF_GROUPS=of_groups, num_stages=size["STAGES"], num_warps=size["WARPS"],
            WIDEN=query.device.type == "cpu",  # the interpreter has no bfloat16 products
        )  # fmt: skip
    if split:
        _finish[(n, heads)](
            parts, stats, positions, sinks, out, heads, window, number_of_parts, DIM=dim, WIDE=wide,
            PER_PART=block * blocks, HAS_SINKS=sinks is not None, num_warps=1,
        )  # fmt: skip


@triton.jit
def _write(
    key, value, query, cos, sin, keys, values, slots, key_token, key_head, value_token, value_head, query_token,
    query_head, kv_heads,
    DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROTATED: tl.constexpr,
    HAS_QUERY: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, SIZE)
    inside = d < DIM
    other = tl.where(d < HALF, d + HALF, d - HALF)  # rotate_half
    sign = tl.where(d < HALF, -1.0, 1.0)
    c = tl.zeros((SIZE,), tl.float32)
    s = tl.zeros((SIZE,), tl.float32)
    if ROTATED:
        c = tl.load(cos + n * DIM + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + n * DIM + d, mask=inside, other=0.0).to(tl.float32)
    if head < kv_heads:
        slot = tl.load(slots + n)
        place = ((slot // BLOCK) * kv_heads + head) * (WIDTH * BLOCK)
        from_key = key + n * key_token + head * key_head
        k = tl.load(from_key + d, mask=inside, other=0.0).to(tl.float32)
        if ROTATED:
            turned_key = tl.load(from_key + other, mask=inside, other=0.0).to(tl.float32) * sign
            k = k * c + turned_key * s
        tl.store(keys + place + d * BLOCK + slot % BLOCK, k.to(keys.dtype.element_ty), mask=inside)
        v = tl.load(value + n * value_token + head * value_head + d, mask=inside, other=0.0)
        tl.store(values + place + (slot % BLOCK) * WIDTH + d, v, mask=inside)
    elif HAS_QUERY:
        from_query = query + n * query_token + (head - kv_heads) * query_head
        q = tl.load(from_query + d, mask=inside, other=0.0).to(tl.float32)
        turned_query = tl.load(from_query + other, mask=inside, other=0.0).to(tl.float32) * sign
        tl.debug_barrier()  # all is read before any is written
        tl.store(from_query + d, (q * c + turned_query * s).to(query.dtype.element_ty), mask=inside)


def write(
    cache: Any,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    query: Tensor | None,
) -> None:
    """Write keys and values as csrc/common/paged_attention.h defines."""
    n, kv_heads, dim = key.shape
    turns = cos is not None and query is not None
    if n == 0:
        return
    strides = query.stride()[:2] if query is not None else (0, 0)
    _write[(n, kv_heads + (query.shape[1] if turns and query is not None else 0))](
        key, value, query, cos, sin, cache.keys, cache.values, slots, key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), *strides, kv_heads, DIM=dim, HALF=dim // 2, WIDTH=cache.keys.shape[2],
        BLOCK=cache.keys.shape[3], ROTATED=cos is not None, HAS_QUERY=turns,
        SIZE=triton.next_power_of_2(max(dim, 16)), num_warps=1,
    )  # fmt: skip
