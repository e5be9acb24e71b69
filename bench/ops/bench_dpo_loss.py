"""dpo_loss beside eager PyTorch as people write it, and torch.compile of that."""

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
    chosen, rejected, *reference = (normal(n, dtype=F32, device=device, seed=seed, scale=5.0) for seed in range(4))

    def eager(chosen: Tensor, rejected: Tensor) -> Tensor:
        """Compute the loss in PyTorch, with the statistics that everybody logs."""
        rewards = 0.1 * (chosen - reference[0]), 0.1 * (rejected - reference[1])
        with torch.no_grad():
            stats = [*rewards, rewards[0] - rewards[1], (rewards[0] > rewards[1]).float()]
            stats = [x.mean() for x in stats]
        return -F.logsigmoid(rewards[0] - rewards[1]).mean() + 0.0 * torch.stack(stats).sum()

    every: dict[str, Any] = {
        "rlhf-fast": lambda c, r: ops.dpo_loss(c, r, reference[0], reference[1])[0],
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    return calls(case, every, [chosen, rejected], [torch.ones((), device=device)])


def work(case: Case) -> Work:
    return Work(copied=case.shape[0] * (4 * 4 + 3 * 8))


CASES = [Case(name, (n,), F32, BOTH) for name, n in (("a step", 64), ("a large step", 1024))]

BENCH = Bench("dpo_loss", CASES, CASES, providers, "eager", work)
