"""group_advantages in Triton: a program a group, 64 responses at a time, in float64."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.arguments import Sequences

BLOCK = 64
WARPS = 1


@triton.jit
def _read(rewards, mask, first, end, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    counts = i < end
    if HAS_MASK:
        counts = counts & (tl.load(mask + i, mask=counts, other=0) != 0)
    return i, counts, tl.load(rewards + i, mask=counts, other=0.0).to(tl.float64)


@triton.jit
def _forward(
    rewards, mask, cu_seqlens, length, eps, out,
    KIND: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64)
    if PACKED:
        begin, end = tl.load(cu_seqlens + g).to(tl.int64), tl.load(cu_seqlens + g + 1).to(tl.int64)
    else:
        begin, end = g * length, g * length + length
    nothing = tl.zeros((BLOCK,), tl.float64)
    counted, total, squares = nothing, nothing, nothing
    for first in range(begin, end, BLOCK):
        _, counts, reward = _read(rewards, mask, first, end, HAS_MASK, BLOCK)
        counted += counts.to(tl.float64)
        total += reward
    n, sum_ = tl.sum(counted), tl.sum(total)
    mean = sum_ / tl.where(n > 0.0, n, 1.0)
    for first in range(begin, end, BLOCK):
        _, counts, reward = _read(rewards, mask, first, end, HAS_MASK, BLOCK)
        squares += tl.where(counts, (reward - mean) * (reward - mean), 0.0)
    others = tl.where(n > 1.0, n - 1.0, 1.0)
    deviation = tl.sqrt(tl.sum(squares) / others) + eps
    for first in range(begin, end, BLOCK):
        i, counts, reward = _read(rewards, mask, first, end, HAS_MASK, BLOCK)
        if KIND == 2:
            advantage = reward - (sum_ - reward) / others
        else:
            advantage = reward - mean
            if KIND == 0:
                advantage = advantage / deviation
        advantage = tl.where(counts, tl.where(n > 1.0, advantage, 0.0), 0.0)
        tl.store(out + i, advantage.to(tl.float32), mask=i < end)


def forward(where: Sequences, rewards: Tensor, mask: Tensor | None, kind: int, eps: float, out: Tensor) -> None:
    _forward[(where.number,)](
        rewards, mask, where.cu_seqlens, where.length, eps, out, KIND=kind, HAS_MASK=mask is not None,
        PACKED=where.cu_seqlens is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
