"""linear_cross_entropy beside the bare matrix products, whole logits in eager PyTorch, and torch.compile of those."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import BOTH, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import BF16, F32
from rlhf_fast import ops


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rows, width, vocabulary = case.shape
    hidden = normal(rows, width, dtype=case.dtype, device=device, seed=0)
    weight = normal(vocabulary, width, dtype=case.dtype, device=device, seed=1, scale=2 / math.sqrt(width))
    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(device)

    def whole(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.T).float(), tokens)

    every: dict[str, Any] = {
        "rlhf-fast": lambda h, w: ops.linear_cross_entropy(h, w, tokens),
        "eager": whole,
        "torch.compile": torch.compile(whole),
    }
    providers = calls(case, every, [hidden, weight], [torch.ones((), device=device)])

    def products() -> list[Tensor]:
        """Multiply what no implementation can do without; these results are not compared, for they are others."""
        z = torch.mm(hidden, weight.T)
        torch.mm(z, weight), torch.mm(z.T, hidden)
        return []

    providers["bare products"] = products
    return providers


def work(case: Case) -> Work:
    rows, width, vocabulary = case.shape
    return Work(operations=3 * 2 * rows * width * vocabulary)


CPU = [Case("SmolLM2", (2048, 576, 49152), F32, BOTH)]
GPU = [Case("Llama 3", (8192, 4096, 128256), BF16, BOTH)]

BENCH = Bench("linear_cross_entropy", CPU, GPU, providers, "eager", work, lambda c: 2e-4 if c.dtype == F32 else 5e-2)
