"""gae beside the loop over columns that people write, and torch.compile of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import FORWARD, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import F32
from rlhf_fast import ops


def eager(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GAE as people write it in PyTorch."""
    advantage, columns = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        advantage = rewards[:, t] + 0.99 * following - values[:, t] + 0.99 * 0.95 * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rows, tokens = case.shape
    both = [normal(rows, tokens, dtype=case.dtype, device=device, seed=seed) for seed in (0, 1)]
    cu_seqlens = torch.arange(rows + 1, device=device, dtype=torch.int32) * tokens
    cuts = torch.randint(rows * tokens, (rows - 1,), generator=torch.Generator().manual_seed(0)).sort().values
    ragged = torch.cat([cuts.new_zeros(1), cuts, cuts.new_tensor([rows * tokens])]).to(cu_seqlens)
    packed = [x.view(-1) for x in both]

    def ours(rewards: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return ops.gae(rewards, values, 0.99, 0.95)

    def ours_packed(where: Tensor) -> list[Tensor]:
        return list(ops.gae(packed[0], packed[1], 0.99, 0.95, cu_seqlens=where))

    every: dict[str, Any] = {"rlhf-fast": ours, "eager": eager}
    if tokens <= 256:  # the loop is unrolled: longer ones compile for minutes
        every["torch.compile"] = torch.compile(eager)
    providers = calls(case, every, both, [])
    providers["rlhf-fast, packed"] = lambda: [x.view(rows, tokens) for x in ours_packed(cu_seqlens)]
    # As many tokens in sequences of all lengths; not compared here, for the loop has no such form.
    providers["rlhf-fast, ragged"] = lambda: ours_packed(ragged)[:0]
    return providers


def work(case: Case) -> Work:
    return Work(copied=case.shape[0] * case.shape[1] * (2 * case.dtype.itemsize + 8))


CASES = [Case("batch", shape, F32, FORWARD) for shape in ((8192, 2048), (512, 128), (64, 1024))]

BENCH = Bench("gae", CASES, CASES, providers, "eager", work)
