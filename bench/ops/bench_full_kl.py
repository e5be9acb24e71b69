"""full_kl, each divergence, beside eager PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import BOTH, FORWARD, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import BF16, F32
from rlhf_fast import ops


def eager(logits: Tensor, ref_logits: Tensor, kind: str) -> Tensor:
    """Compute the KL as people write it in PyTorch."""
    logp, logq = torch.log_softmax(logits.float(), -1), torch.log_softmax(ref_logits.float(), -1)
    if kind == "kl":
        return F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
    logm = torch.logaddexp(logp, logq) - 0.6931471805599453
    js = (F.kl_div(logm, log, reduction="none", log_target=True).sum(-1) for log in (logp, logq))
    return (next(js) + next(js)) / 2


def kind_of(case: Case) -> str:
    return "js" if case.profile.endswith("js") else "kl"


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rows, vocabulary = case.shape
    both = [normal(rows, vocabulary, dtype=case.dtype, device=device, seed=seed, scale=2.0) for seed in (0, 1)]
    kind, compiled = kind_of(case), torch.compile(eager)
    every: dict[str, Any] = {
        "rlhf-fast": lambda p, q: ops.full_kl(p, q, kind=kind),
        "eager": lambda p, q: eager(p, q, kind),
        "torch.compile": lambda p, q: compiled(p, q, kind),
    }
    return calls(case, every, both, [normal(rows, dtype=F32, device=device, seed=2)])


def work(case: Case) -> Work:
    logits = 2 * case.shape[0] * case.shape[1] * case.dtype.itemsize
    return Work(read=logits, copied=2 * logits if case.mode == BOTH else 0)


CPU = [Case(f"SmolLM2, {kind}", (512, 49152), F32, mode) for kind in ("kl", "js") for mode in (FORWARD, BOTH)]
GPU = [Case(f"Llama 3, {kind}", (4096, 128256), BF16, mode) for kind in ("kl", "js") for mode in (FORWARD, BOTH)]

BENCH = Bench("full_kl", CPU, GPU, providers, "eager", work, lambda c: 1e-4 if c.dtype == F32 else 3e-2)
