"""Calls of the CPU kernels that give the same bits with every instruction set: tails, -inf, nan, every dtype and form.

As a program, prints what the module in this Python makes of them: ``python -m tests.cpu.calls``, under RLHF_FAST_ISA.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import (
    Decays,
    Denominator,
    GAEInputs,
    PPONumbers,
    PPOResults,
    PPOTensors,
    Sequences,
    TokenRewards,
    Transform,
)
from rlhf_fast.ops import compiled
from rlhf_fast.ops._rows import matrix

TOKEN_LOGPROBS, FULL_KL, KL_ESTIMATE, GAE, PPO_LOSS = 0, 1, 2, 3, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    op: int
    dtype: torch.dtype
    kind: int
    transform: Transform
    p: Tensor  # (rows, columns)
    q: Tensor
    tokens: Tensor  # (rows,) int64
    grad: Tensor  # (rows, columns) float32; ops of a vocabulary use the first `rows` of it
    grad_2: Tensor  # (rows,) float32

    @property
    def results(self) -> int:
        """Numbers in each of the nine result arrays."""
        return self.p.numel() if self.op in (KL_ESTIMATE, GAE, PPO_LOSS) else self.p.shape[0]


def calls() -> Iterator[Call]:
    transforms = (Transform(1.0, 0.0, 1.0, None), Transform(0.5, 0.0, 0.7, None), Transform(1.0, 5.0, 1.3, None))
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 7, 16, 33, 4096, 9001):
        for i, dtype in enumerate(DTYPES):
            p, q, grad = (torch.randn(6, columns, generator=generator) * 4 for _ in range(3))
            p[1, ::3] = q[1, ::3] = -math.inf  # some words banned
            p[2, : columns - 1] = q[2, : columns - 1] = -math.inf  # all but one
            p[3] = -math.inf  # no distribution
            p[4, columns // 2] = math.nan
            p[5] *= 40.0  # exp leaves the range of float32
            tokens = torch.randint(columns, (6,), generator=generator)
            rest = p.to(dtype), q.to(dtype), tokens, grad, torch.randn(6, generator=generator)
            for transform in transforms:
                yield Call(TOKEN_LOGPROBS, dtype, 0, transform, *rest)
                for kind in (0, 1):
                    yield Call(FULL_KL, dtype, kind, transform, *rest)
            yield Call(KL_ESTIMATE, dtype, i, transforms[0], *rest)
            yield Call(GAE, dtype, 0, transforms[0], *rest)
            if columns > 1:  # else there is no room for its twelve statistics
                for kind in (0, 1, 2):
                    yield Call(PPO_LOSS, dtype, kind, transforms[0], *rest)


def encode(call: Call) -> bytes:
    """As tests/cpu/calls.cpp reads it."""
    header = struct.pack(
        "4i2q4f", call.op, DTYPES.index(call.dtype), call.kind, 0, *call.p.shape, *call.transform[:3], 0.0
    )
    flags = [call.p > 0] if call.op == PPO_LOSS else []
    return header + b"".join(_bytes(x) for x in (*call[4:], *flags))


def answer(call: Call) -> list[Tensor]:
    """What the module in this Python makes of a call: nine results, and two gradients."""
    p, q, tokens, grad, grad_2 = call[4:]
    results = [torch.zeros(call.results) for _ in range(9)]
    in_p, in_q = torch.zeros_like(p), torch.zeros_like(q)
    x, y, t = matrix(p), matrix(q), call.transform
    if call.op == TOKEN_LOGPROBS:
        kernels = compiled.TokenLogprobs("cpu")
        kernels.forward(x, t, tokens, None, results[:4])
        kernels.gradient(x, t, tokens, None, 0, results[:4], grad, grad_2, in_p, grad_2, grad)
    elif call.op == FULL_KL:
        divergences = compiled.FullKL("cpu")
        divergences.forward(x, y, t, None, call.kind, results)
        divergences.gradient(x, y, t, None, call.kind, results, grad, in_p, in_q)
    elif call.op == GAE:
        advantages, returns = results[:2]
        paid = TokenRewards(q, p, q, grad_2, kl_coef=0.3)
        inputs = GAEInputs(Sequences(None, *p.shape), paid, p, None, grad_2, Decays(0.9, 0.8, 0.95))
        compiled.GAE("cpu").forward(inputs, advantages, returns, None)
    elif call.op == PPO_LOSS:
        ppo_loss = compiled.PPOLoss("cpu")
        ranges = -(-p.numel() // ppo_loss.range_size(p.device))
        partials = torch.zeros(ranges, ppo_loss.SUMS, dtype=torch.float64)
        sums = torch.tensor([10.0, 1.0, 20.0], dtype=torch.float64)
        tensors = PPOTensors(p, q, q, p, q, p, p, q, p, p > 0, grad, None, sums)
        numbers = PPONumbers(0.2, 0.3, 3.0, 0.2, 0.5, 0.01, 0.05, 2.0, 1.5, 2.5, call.kind, call.kind, 1)
        of_all = results[3][:1], results[3][1:18], results[3][18:19]
        outputs = PPOResults(*of_all, *results[:3], partials)
        ppo_loss.forward(tensors, numbers, Denominator(), Denominator(), outputs)
    else:
        estimates = compiled.KLEstimate("cpu")
        estimates.forward(p, q, None, call.kind, results[0])
        estimates.gradient(p, q, None, call.kind, grad, in_p, in_q)
    return [*results, in_p, in_q]


def decode(call: Call, data: bytes) -> list[Tensor]:
    """The same of what tests/cpu/calls.cpp wrote."""
    sizes = [4 * call.results] * 9 + [call.p.nbytes] * 2
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [bytearray(data[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    assert len(data) == ends[-1]
    dtypes = [torch.float32] * 9 + [call.dtype] * 2
    return [torch.frombuffer(part, dtype=dtype) for part, dtype in zip(parts, dtypes, strict=True)]


def output_size(call: Call) -> int:
    return 9 * 4 * call.results + 2 * call.p.nbytes


def digest(tensors: list[Tensor]) -> str:
    """Of all bits, with one nan for all nans: which one comes out is the processor's."""
    whole = hashlib.sha256()
    for x in tensors:
        whole.update(_bytes(torch.where(x.isnan(), math.nan, x)))
    return whole.hexdigest()[:16]


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    print(compiled._C.isa())
    for one in calls():
        print(digest(answer(one)))
