"""kl_estimate (k3) beside eager PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import BOTH, FORWARD, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import F32
from rlhf_fast import ops


def eager(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Compute the estimate as people write it in PyTorch, with expm1 for exp - 1."""
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    (tokens,) = case.shape
    both = [normal(tokens, dtype=case.dtype, device=device, seed=seed) for seed in (0, 1)]
    every: dict[str, Any] = {
        "rlhf-fast": lambda p, q: ops.kl_estimate(p, q, "k3"),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    return calls(case, every, both, [normal(tokens, dtype=F32, device=device, seed=2)])


def work(case: Case) -> Work:
    token = case.dtype.itemsize
    return Work(copied=case.shape[0] * (3 * token if case.mode == FORWARD else 8 * token))


CASES = [Case(name, (n,), F32, mode) for name, n in (("a step", 32768), ("long", 1 << 20)) for mode in (FORWARD, BOTH)]

BENCH = Bench("kl_estimate", CASES, CASES, providers, "eager", work)
