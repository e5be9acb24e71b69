"""reward_loss beside eager PyTorch as people write it, and torch.compile of that."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import BOTH, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import F32
from rlhf_fast import ops


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    (n,) = case.shape
    chosen, rejected, margin = (normal(n, dtype=F32, device=device, seed=seed) for seed in range(3))

    def eager(chosen: Tensor, rejected: Tensor) -> Tensor:
        """Compute the loss in PyTorch, with the statistics that everybody logs."""
        loss = -F.logsigmoid(chosen - rejected - margin) + 0.01 * (chosen + rejected) ** 2
        with torch.no_grad():
            stats = [(chosen > rejected).float().mean(), (chosen - rejected).mean()]
        return loss.mean() + 0.0 * torch.stack(stats).sum()

    every: dict[str, Any] = {
        "rlhf-fast": lambda c, r: ops.reward_loss(c, r, margin, center_coef=0.01)[0],
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    return calls(case, every, [chosen, rejected], [torch.ones((), device=device)])


def work(case: Case) -> Work:
    return Work(copied=case.shape[0] * (3 * 4 + 3 * 8))


CASES = [Case(name, (n,), F32, BOTH) for name, n in (("a step", 64), ("a large step", 1024))]

BENCH = Bench("reward_loss", CASES, CASES, providers, "eager", work)
