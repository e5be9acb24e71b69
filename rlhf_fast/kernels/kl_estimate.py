"""kl_estimate in Triton: elementwise, bound by memory at 12 bytes a token in float32, by the launch below a million."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
K1, K2 = 0, 1  # k3: 2, as csrc/common/kl_estimate.h numbers them


@triton.jit
def _expm1_minus(x):
    """e^x - 1 - x. Near 0 by its own series, since expm1(x) - x would leave only rounding errors there."""
    series = 2.484168e-5 * x + 1.99619564e-4  # by Remez on |x| <= 1/2: 7e-10
    series = series * x + 1.38890406e-3
    series = series * x + 8.33318289e-3
    series = series * x + 4.16666642e-2
    series = series * x + 1.66666672e-1
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def _forward(logprobs, ref_logprobs, mask, count, out, KIND: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = i < count
    if HAS_MASK:
        counts = counts & (tl.load(mask + i, mask=i < count, other=0) != 0)
    d = tl.load(logprobs + i, mask=counts, other=0.0).to(tl.float32)
    d = d - tl.load(ref_logprobs + i, mask=counts, other=0.0).to(tl.float32)
    if KIND == 0:
        value = d
    elif KIND == 1:
        value = d * d * 0.5
    else:
        value = _expm1_minus(-d)
    tl.store(out + i, value, mask=i < count)


@triton.jit
def _gradient(
    logprobs, ref_logprobs, mask, count, grad, out, ref_out,
    KIND: tl.constexpr, HAS_MASK: tl.constexpr, NEED: tl.constexpr, NEED_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = i < count
    if HAS_MASK:
        counts = counts & (tl.load(mask + i, mask=i < count, other=0) != 0)
    d = tl.load(logprobs + i, mask=counts, other=0.0).to(tl.float32)
    d = d - tl.load(ref_logprobs + i, mask=counts, other=0.0).to(tl.float32)
    slope = tl.load(grad + i, mask=counts, other=0.0)
    if KIND == 1:
        slope = slope * d
    if KIND == 2:
        slope = slope * (d - _expm1_minus(-d))  # 1 - e^-d
    if NEED:
        tl.store(out + i, slope.to(out.dtype.element_ty), mask=i < count)
    if NEED_REF:
        tl.store(ref_out + i, (-slope).to(ref_out.dtype.element_ty), mask=i < count)


def forward(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimate: int, out: Tensor) -> None:
    count = logprobs.numel()
    _forward[(triton.cdiv(count, BLOCK),)](
        logprobs, ref_logprobs, mask, count, out, KIND=estimate, HAS_MASK=mask is not None, BLOCK=BLOCK
    )


def gradient(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    estimate: int,
    grad: Tensor,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    count = logprobs.numel()
    _gradient[(triton.cdiv(count, BLOCK),)](
        logprobs, ref_logprobs, mask, count, grad, out, ref_out,
        KIND=estimate, HAS_MASK=mask is not None, NEED=out is not None, NEED_REF=ref_out is not None, BLOCK=BLOCK,
    )  # fmt: skip
