"""token_logprobs with entropy, beside eager PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import BOTH, FORWARD, Bench, Call, Case, Work, calls, normal
from rlhf_fast import ops

F32, BF16 = torch.float32, torch.bfloat16


def eager(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Score tokens as people write it in PyTorch."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    return logp.gather(-1, tokens[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rows, vocabulary = case.shape
    logits = normal(rows, vocabulary, dtype=case.dtype, device=device, seed=0, scale=2.0)
    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    upstream = [normal(rows, dtype=F32, device=device, seed=seed) for seed in (2, 3)]
    compiled = torch.compile(eager)
    every: dict[str, Any] = {
        "rlhf-fast": lambda z: ops.token_logprobs(z, tokens),
        "eager": lambda z: eager(z, tokens),
        "torch.compile": lambda z: compiled(z, tokens),
    }
    return calls(case, every, [logits], upstream)


def work(case: Case) -> Work:
    logits = case.shape[0] * case.shape[1] * case.dtype.itemsize
    return Work(read=logits, copied=2 * logits if case.mode == BOTH else 0)


SHAPES = (
    ("SmolLM2", 1024, 49152),
    ("Qwen, a small batch", 16, 151936),
    ("one row", 1, 49152),
    ("one small row", 1, 1000),
)
CPU = [Case(name, (n, v), F32, mode) for name, n, v in SHAPES for mode in (FORWARD, BOTH)]
CPU += [Case("SmolLM2", (1024, 49152), BF16, mode) for mode in (FORWARD, BOTH)]
GPU_SHAPES = (
    ("Llama 3", 8192, 128256),
    ("Qwen", 8192, 151936),
    ("Qwen, a small batch", 16, 151936),
    ("one row", 1, 1000),
)
GPU = [Case(name, (n, v), BF16, mode) for name, n, v in GPU_SHAPES for mode in (FORWARD, BOTH)]

BENCH = Bench("token_logprobs", CPU, GPU, providers, "eager", work)
