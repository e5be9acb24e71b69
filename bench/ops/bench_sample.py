"""sample beside what people write in PyTorch: log_softmax, sort for top_p, multinomial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import FORWARD, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import BF16, F32
from rlhf_fast import ops


def top_p_of(case: Case) -> float:
    return 0.9 if "top_p" in case.profile else 1.0


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rows, _ = case.shape
    logits = normal(*case.shape, dtype=case.dtype, device=device, seed=0, scale=2.0)
    top_p = top_p_of(case)
    column = torch.ones(rows, device=device)
    uniform = torch.linspace(0.01, 0.99, rows, device=device).double()

    def mine(x: Tensor) -> Any:
        drawn = ops.sample(x, uniform, column, (column * 0).int(), column * top_p, column * 0)
        return [drawn[3], *drawn[:3]]  # the entropy first: eager has nothing else to compare

    def eager(x: Tensor) -> Any:
        logprobs = torch.log_softmax(x.float(), dim=-1)
        p = logprobs.exp()
        entropy = -(p * logprobs).sum(-1)
        if top_p < 1.0:
            ordered, index = p.sort(dim=-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
            p = torch.zeros_like(p).scatter_(-1, index, ordered)
        tokens = torch.multinomial(p, 1)
        logprobs.gather(-1, tokens)
        return [entropy]

    return calls(case, {"rlhf-fast": mine, "eager": eager}, [logits], [])


def work(case: Case) -> Work:
    rows, vocabulary = case.shape
    return Work(read=rows * vocabulary * case.dtype.itemsize)


BENCH = Bench(
    op="sample",
    cases=[Case(profile, (32, 49152), F32, FORWARD) for profile in ("SmolLM2", "SmolLM2, top_p")],
    gpu_cases=[Case(profile, (256, 128256), BF16, FORWARD) for profile in ("Llama 3", "Llama 3, top_p")],
    providers=providers,
    truth="eager",
    work=work,
)
