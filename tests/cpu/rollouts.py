"""Digests of what the kernels of rollouts make of some inputs, one a line: ``python -m tests.cpu.rollouts``, under
RLHF_FAST_ISA; the instruction set comes first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_fast import _C, ops  # type: ignore[attr-defined]
from rlhf_fast.ops.linear import Weight
from tests.cpu import calls
from tests.unit.ops import cases
from tests.unit.ops.test_paged_attention import problem


def answers() -> Iterator[list[Tensor]]:
    for dtype in calls.DTYPES:
        for k in (5, 64, 583):
            x, a = cases.random(13, k, seed=1, dtype=dtype), cases.random(6, k, seed=5, dtype=dtype)
            weights = [Weight(cases.random(n, k, seed=n, dtype=dtype)) for n in (9, 7)]
            up, bias = cases.random(9, 6, seed=6, dtype=dtype), cases.random(9, seed=7, dtype=dtype)
            yield ops.linear(x, [weights[0]._replace(bias=bias, lora=(a, up, 0.5)), *weights])
            for gate in ("silu", "gelu_tanh"):
                yield ops.linear(x, [weights[0], weights[0]], gate)
            yield [ops.rms_norm(x, a[0], 1e-5, 1.0)]
        for options in ({}, {"window": 9, "softcap": 2.0}, {"sinks": torch.linspace(-1.0, 1.0, 4)}):
            for dim in (8, 64, 80):
                p = problem([5, 17, 40], [5, 3, 1], dim=dim, dtype=dtype)
                yield [ops.paged_attention(p.query, p.cache, p.batch, **options), p.cache.keys, p.cache.values]
        logits = cases.random(6, 1001, seed=3, scale=4.0, dtype=dtype)
        for temperature, top_k, top_p, min_p in ((1.0, 0, 1.0, 0.0), (0.7, 20, 0.8, 0.0), (1.3, 0, 0.9, 0.01)):
            fill = torch.full((6,), 1.0)
            cuts = fill * temperature, (fill * top_k).int(), fill * top_p, fill * min_p
            yield list(ops.sample(logits, torch.linspace(0, 0.99, 6).double(), *cuts))


def main() -> None:
    print(_C.isa(), *(calls.digest([torch.nan_to_num(x.double(), 7.0) for x in found]) for found in answers()))


if __name__ == "__main__":
    main()
