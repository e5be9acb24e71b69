"""ppo_loss (policy and value) beside eager PyTorch as people write it, and torch.compile of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import BOTH, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import F32
from rlhf_fast import ops


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    (n,) = case.shape
    logprobs, old, advantages, values, old_values, returns = (
        normal(n, dtype=case.dtype, device=device, seed=seed, scale=0.3) for seed in range(6)
    )
    mask = normal(n, dtype=F32, device=device, seed=6) > -1.0

    def eager(logprobs: Tensor, values: Tensor) -> Tensor:
        """Compute the loss in PyTorch, with the statistics that everybody logs."""
        count = mask.sum()
        log_ratio = logprobs - old
        ratio = log_ratio.exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
        policy = (torch.max(plain, clipped) * mask).sum() / count
        near = old_values + (values - old_values).clamp(-0.2, 0.2)
        error, near_error = (values - returns) ** 2, (near - returns) ** 2
        value = 0.5 * (torch.max(error, near_error) * mask).sum() / count
        with torch.no_grad():
            stats = [ratio, (clipped > plain).float(), (near_error > error).float(), -log_ratio, ratio - 1 - log_ratio]
            stats = [(x * mask).sum() / count for x in stats]
        return policy + 0.1 * value + 0.0 * torch.stack(stats).sum()

    def ours(logprobs: Tensor, values: Tensor) -> Tensor:
        return ops.ppo_loss(logprobs, old, advantages, values, old_values, returns, mask)[0]

    every: dict[str, Any] = {"rlhf-fast": ours, "eager": eager, "torch.compile": torch.compile(eager)}
    return calls(case, every, [logprobs, values], [torch.ones((), device=device)])


def work(case: Case) -> Work:
    # Six inputs and the mask; two gradients written, then multiplied by that of the loss.
    return Work(copied=case.shape[0] * (6 * case.dtype.itemsize + 1 + 3 * 8))


CASES = [Case(name, (n,), F32, BOTH) for name, n in (("a step", 32768), ("long", 1 << 20))]

BENCH = Bench("ppo_loss", CASES, CASES, providers, "eager", work)
