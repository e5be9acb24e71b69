"""linear_token_logprobs beside the bare matrix products, whole logits in eager PyTorch, and torch.compile of those."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.harness import BOTH, FORWARD, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import BF16, F32, eager
from rlhf_fast import ops


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rows, width, vocabulary = case.shape
    hidden = normal(rows, width, dtype=case.dtype, device=device, seed=0)
    weight = normal(vocabulary, width, dtype=case.dtype, device=device, seed=1, scale=2 / math.sqrt(width))
    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    upstream = [normal(rows, dtype=F32, device=device, seed=seed) for seed in (2, 3)]

    def whole(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return eager(h @ w.T, tokens)

    compiled = torch.compile(whole)
    every: dict[str, Any] = {
        "rlhf-fast": lambda h, w: ops.linear_token_logprobs(h, w, tokens),
        "eager": whole,
        "torch.compile": compiled,
    }
    providers = calls(case, every, [hidden, weight], upstream)
    logits = torch.empty(rows, vocabulary, dtype=case.dtype, device=device)

    def products(out: Tensor | None) -> Call:
        """Multiply what no implementation can do without; these results are not compared, for they are others."""

        def call() -> list[Tensor]:
            z = torch.mm(hidden, weight.T, out=out)
            if case.mode == BOTH:
                torch.mm(z, weight), torch.mm(z.T, hidden)
            return []

        return call

    providers["bare products"] = products(None)
    providers["bare products, into memory"] = products(logits)
    return providers


def work(case: Case) -> Work:
    rows, width, vocabulary = case.shape
    return Work(operations=(3 if case.mode == BOTH else 1) * 2 * rows * width * vocabulary)


CPU = [Case("SmolLM2", (2048, 576, 49152), F32, mode) for mode in (FORWARD, BOTH)]
GPU = [Case("Llama 3", (8192, 4096, 128256), BF16, mode) for mode in (FORWARD, BOTH)]

BENCH = Bench("linear_token_logprobs", CPU, GPU, providers, "eager", work, lambda c: 2e-4 if c.dtype == F32 else 5e-2)
