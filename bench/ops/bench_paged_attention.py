"""paged_attention when 32 sequences decode, beside torch's attention over the same keys, gathered and padded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import FORWARD, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import BF16, F32
from rlhf_fast import ops
from rlhf_fast.ops.paged_attention import KVCache, PagedBatch

BLOCK = 32


def shared_blocks(case: Case) -> int:
    return max(case.shape[1] - 64, 0) // BLOCK if "shared" in case.profile else 0


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    sequences, context, heads, kv_heads, dim = case.shape
    each, shared = -(-context // BLOCK), shared_blocks(case)
    cache = KVCache.new(sequences * each, kv_heads, dim, BLOCK, torch.empty(0, dtype=case.dtype, device=device))
    cache.keys.copy_(normal(*cache.keys.shape, dtype=case.dtype, device=device, seed=0))
    cache.values.copy_(normal(*cache.values.shape, dtype=case.dtype, device=device, seed=1))
    tables = torch.arange(sequences * each, dtype=torch.int32, device=device).view(sequences, each)
    tables[:, :shared] = tables[:1, :shared]
    counts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    alone = PagedBatch.of(tables, counts, torch.full((sequences,), context, dtype=torch.int32, device=device))
    together = alone._replace(groups=counts[[0, -1]].contiguous(), shared=counts[:1] + shared)
    batch, together = alone.placed(sequences), together.placed(sequences)  # as the layers of a step are given it
    query = normal(sequences, heads, dim, dtype=case.dtype, device=device, seed=2)

    def gathered(query: Tensor) -> Tensor:
        keys = cache.keys[tables.long()].permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :context, :dim]
        values = cache.values[tables.long()].permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :context, :dim]
        return F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, enable_gqa=True).squeeze(2)

    every: dict[str, Any] = {
        "rlhf-fast": lambda q: ops.paged_attention(q, cache, together if shared else batch),
        "torch, gathered": gathered,
    }
    if shared:
        every["rlhf-fast, each its own"] = lambda q: ops.paged_attention(q, cache, batch)
    return calls(case, every, [query], [])


def work(case: Case) -> Work:
    sequences, context, heads, kv_heads, dim = case.shape
    shared = shared_blocks(case) * BLOCK
    positions = sequences * (context - shared) + shared
    return Work(
        read=2 * positions * kv_heads * dim * case.dtype.itemsize, operations=4 * sequences * context * heads * dim
    )


BENCH = Bench(
    op="paged_attention",
    cases=[
        Case("SmolLM2", (32, 128, 9, 3, 64), F32, FORWARD),
        Case("SmolLM2", (32, 1024, 9, 3, 64), F32, FORWARD),
        Case("SmolLM2, 384 shared", (64, 448, 9, 3, 64), F32, FORWARD),
    ],
    gpu_cases=[
        Case("Llama 3 8B", (256, 1024, 32, 8, 128), BF16, FORWARD),
        Case("Llama 3 8B, 384 shared", (256, 448, 32, 8, 128), BF16, FORWARD),
    ],
    providers=providers,
    truth="torch, gathered",
    work=work,
)
