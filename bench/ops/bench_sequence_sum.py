"""sequence_sum beside eager PyTorch as people write it, and torch.compile of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import BOTH, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import F32
from rlhf_fast import ops


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    x = normal(*case.shape, dtype=F32, device=device, seed=0)
    mask = normal(*case.shape, dtype=F32, device=device, seed=1) > -1.0

    def eager(x: Tensor) -> Tensor:
        return (x * mask).sum(1)

    every: dict[str, Any] = {
        "rlhf-fast": lambda x: ops.sequence_sum(x, mask),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    return calls(case, every, [x], [normal(case.shape[0], dtype=F32, device=device, seed=2)])


def work(case: Case) -> Work:
    return Work(copied=case.shape[0] * case.shape[1] * (4 + 1 + 4 + 1))


CASES = [Case(name, shape, F32, BOTH) for name, shape in (("a step", (64, 512)), ("long", (512, 2048)))]

BENCH = Bench("sequence_sum", CASES, CASES, providers, "eager", work)
