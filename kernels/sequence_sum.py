"""sequence_sum in Triton: a program a sequence, BLOCK elements at a time, its sum in float64."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.arguments import Sequences
from rlhf_fast.kernels.launch_sizes import sizes


@triton.jit
def _forward(x, mask, cu_seqlens, length, out, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    if PACKED:
        begin, end = tl.load(cu_seqlens + b).to(tl.int64), tl.load(cu_seqlens + b + 1).to(tl.int64)
    else:
        begin, end = b * length, b * length + length
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        counts = i < end
        if HAS_MASK:
            counts = counts & (tl.load(mask + i, mask=counts, other=0) != 0)
        total += tl.load(x + i, mask=counts, other=0.0).to(tl.float64)
    tl.store(out + b, tl.sum(total).to(tl.float32))


def forward(where: Sequences, x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    size = sizes("sequence_sum", x.device)
    _forward[(where.number,)](
        x, mask, where.cu_seqlens, where.length, out,
        HAS_MASK=mask is not None, PACKED=where.cu_seqlens is not None, BLOCK=size["BLOCK"],
        num_warps=size["WARPS"],
    )  # fmt: skip
