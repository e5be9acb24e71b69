"""cross_entropy, plain and with label smoothing, beside PyTorch's, and torch.compile of that."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import BOTH, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import BF16, F32
from rlhf_fast import ops

SMOOTHED = "label smoothing"


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rows, vocabulary = case.shape
    logits = normal(rows, vocabulary, dtype=case.dtype, device=device, seed=0, scale=3.0)
    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    e = 0.1 if SMOOTHED in case.profile else 0.0

    def eager(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), tokens, label_smoothing=e)

    every: dict[str, Any] = {
        "rlhf-fast": lambda x: ops.cross_entropy(x, tokens, label_smoothing=e),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    return calls(case, every, [logits], [torch.ones((), device=device)])


def work(case: Case) -> Work:
    elements = case.shape[0] * case.shape[1] * case.dtype.itemsize
    return Work(read=elements, copied=2 * elements)


def cases(name: str, shape: tuple[int, int], dtype: torch.dtype) -> list[Case]:
    return [Case(full, shape, dtype, BOTH) for full in (name, f"{name}, {SMOOTHED}")]


CPU = cases("SmolLM2", (1024, 49152), F32)
GPU = cases("Llama 3", (8192, 128256), BF16)

BENCH = Bench("cross_entropy", CPU, GPU, providers, "eager", work, lambda c: 2e-4 if c.dtype == F32 else 5e-2)
