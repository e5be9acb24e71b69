"""group_advantages (GRPO) beside eager PyTorch as people write it, and torch.compile of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import FORWARD, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import F32
from rlhf_fast import ops


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rewards = normal(*case.shape, dtype=F32, device=device, seed=0)

    def eager(rewards: Tensor) -> Tensor:
        return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)

    every: dict[str, Any] = {"rlhf-fast": ops.group_advantages, "eager": eager, "torch.compile": torch.compile(eager)}
    return calls(case, every, [rewards], [])


def work(case: Case) -> Work:
    return Work(copied=case.shape[0] * case.shape[1] * 8)


CASES = [Case(name, shape, F32, FORWARD) for name, shape in (("a step", (64, 8)), ("a large step", (1024, 16)))]

BENCH = Bench("group_advantages", CASES, CASES, providers, "eager", work)
