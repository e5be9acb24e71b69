"""linear on the few rows of decoding, beside torch's product: SmolLM2's output layer, and its gated MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bench.harness import FORWARD, Bench, Call, Case, Work, calls, normal
from bench.ops.bench_token_logprobs import BF16, F32
from rlhf_fast import ops
from rlhf_fast.ops.linear import Weight

LAYERS = 24  # so that weights come from memory, as they do in a model


def is_gated(case: Case) -> bool:
    return "gate" in case.profile


def providers(case: Case, device: torch.device) -> dict[str, Call]:
    rows, k, n = case.shape
    count = LAYERS if is_gated(case) else 1
    x = normal(rows, k, dtype=case.dtype, device=device, seed=0)
    pairs = [
        [normal(n, k, dtype=case.dtype, device=device, seed=2 * i + j, scale=k**-0.5) for j in (0, 1)]
        for i in range(count)
    ]
    ours = [[Weight(w) for w in (pair if is_gated(case) else pair[:1])] for pair in pairs]

    def mine(x: Any) -> Any:
        return [ops.linear(x, weights, "silu" if is_gated(case) else "none")[0] for weights in ours]

    def eager(x: Any) -> Any:
        if is_gated(case):
            return [F.silu(F.linear(x, gate)) * F.linear(x, up) for gate, up in pairs]
        return [F.linear(x, pairs[0][0])]

    return calls(case, {"rlhf-fast": mine, "torch": eager}, [x], [])


def work(case: Case) -> Work:
    rows, k, n = case.shape
    weights = k * n * (2 * LAYERS if is_gated(case) else 1)
    return Work(read=weights * case.dtype.itemsize, operations=2 * rows * weights)


BENCH = Bench(
    op="linear",
    cases=[
        Case(profile, (rows, 576, columns), F32, FORWARD)
        for profile, columns in (("SmolLM2, output layer", 49152), (f"SmolLM2, {LAYERS} gates", 1536))
        for rows in (1, 8, 32, 64)
    ],
    gpu_cases=[Case("Llama 3 8B, output layer", (32, 4096, 128256), BF16, FORWARD)],
    providers=providers,
    truth="torch",
    work=work,
)
