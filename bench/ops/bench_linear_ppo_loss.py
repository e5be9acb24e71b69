"""linear_ppo_loss beside the bare matrix products, whole logits in eager PyTorch, and torch.compile of those.

Half of the tokens masked, and a frozen head as adapters leave it, are cases of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.harness import BOTH, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import BF16, F32, eager
from rlhf_fast import ops

FROZEN, MASKED = "frozen head", "half masked"


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rows, width, vocabulary = case.shape
    hidden = normal(rows, width, dtype=case.dtype, device=device, seed=0)
    weight = normal(vocabulary, width, dtype=case.dtype, device=device, seed=1, scale=2 / math.sqrt(width))
    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    advantages = 1.0 + normal(rows, dtype=F32, device=device, seed=2)  # a loss near zero has no relative error
    with torch.no_grad():
        old, _ = ops.linear_token_logprobs(hidden, weight, tokens)
    # In a narrow dtype near enough for no rounding to carry a token over the edge of the clip range.
    old = old + normal(rows, dtype=F32, device=device, seed=3, scale=0.1 if case.dtype == F32 else 0.03)
    mask = torch.arange(rows, device=device) % 2 == 0 if MASKED in case.profile else torch.ones_like(tokens).bool()

    def whole(h: Tensor, w: Tensor) -> Tensor:
        """Compute the whole loss, with the entropy and the statistics that everybody logs."""
        logprobs, entropy = eager(h @ w.T, tokens)
        count = mask.sum()
        log_ratio = logprobs - old
        ratio = log_ratio.exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
        loss = (torch.max(plain, clipped) * mask).sum() / count
        stats = [entropy.detach(), ratio.detach(), (clipped > plain).float(), -log_ratio.detach()]
        return loss + 0.0 * torch.stack([(x * mask).sum() / count for x in stats]).sum()

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return ops.linear_ppo_loss(h, w, tokens, old, advantages, mask=mask)[0]

    compiled = torch.compile(whole)
    every: dict[str, Any] = {"rlhf-fast": ours, "eager": whole, "torch.compile": compiled}
    frozen = FROZEN in case.profile
    if frozen:
        every = {name: lambda h, f=f: f(h, weight) for name, f in every.items()}
    providers = calls(case, every, [hidden] if frozen else [hidden, weight], [torch.ones((), device=device)])
    kept = hidden[mask]
    logits = torch.empty(kept.shape[0], vocabulary, dtype=case.dtype, device=device)

    def products(out: Tensor | None) -> Call:
        """Multiply what no implementation can do without; these results are not compared, for they are others."""

        def call() -> list[Tensor]:
            z = torch.mm(kept, weight.T, out=out)
            torch.mm(z, weight)
            if not frozen:
                torch.mm(z.T, kept)
            return []

        return call

    providers["bare products"] = products(None)
    providers["bare products, into memory"] = products(logits)
    return providers


def work(case: Case) -> Work:
    rows, width, vocabulary = case.shape
    left = rows // 2 if MASKED in case.profile else rows
    return Work(operations=(2 if FROZEN in case.profile else 3) * 2 * left * width * vocabulary)


def cases(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Case]:
    return [Case(full, shape, dtype, BOTH) for full in (name, f"{name}, {MASKED}", f"{name}, {FROZEN}")]


CPU = cases("SmolLM2", (2048, 576, 49152), F32)
GPU = cases("Llama 3", (8192, 4096, 128256), BF16)

BENCH = Bench("linear_ppo_loss", CPU, GPU, providers, "eager", work, lambda c: 2e-4 if c.dtype == F32 else 5e-2)
