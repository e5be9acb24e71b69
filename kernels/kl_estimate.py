"""kl_estimate in Triton: elementwise, bound by memory at 12 bytes a token in float32, by the launch below a million."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._sampled_kl import estimate as value_of
from rlhf_fast.kernels._sampled_kl import slope
from rlhf_fast.kernels.launch_sizes import sizes


@triton.jit
def _forward(logprobs, ref_logprobs, mask, count, out, KIND: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = i < count
    if HAS_MASK:
        counts = counts & (tl.load(mask + i, mask=i < count, other=0) != 0)
    d = tl.load(logprobs + i, mask=counts, other=0.0).to(tl.float32)
    d = d - tl.load(ref_logprobs + i, mask=counts, other=0.0).to(tl.float32)
    tl.store(out + i, value_of(d, KIND), mask=i < count)


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
    gradient = tl.load(grad + i, mask=counts, other=0.0) * slope(d, KIND)
    if NEED:
        tl.store(out + i, gradient.to(out.dtype.element_ty), mask=i < count)
    if NEED_REF:
        tl.store(ref_out + i, (-gradient).to(ref_out.dtype.element_ty), mask=i < count)


def forward(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimate: int, out: Tensor) -> None:
    count, size = logprobs.numel(), sizes("kl_estimate", logprobs.device)
    _forward[(triton.cdiv(count, size["BLOCK"]),)](
        logprobs, ref_logprobs, mask, count, out, KIND=estimate, HAS_MASK=mask is not None, BLOCK=size["BLOCK"],
        num_warps=size["WARPS"],
    )  # fmt: skip


def gradient(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    estimate: int,
    grad: Tensor,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    count, size = logprobs.numel(), sizes("kl_estimate", logprobs.device)
    _gradient[(triton.cdiv(count, size["BLOCK"]),)](
        logprobs, ref_logprobs, mask, count, grad, out, ref_out,
        KIND=estimate, HAS_MASK=mask is not None, NEED=out is not None, NEED_REF=ref_out is not None,
        BLOCK=size["BLOCK"], num_warps=size["WARPS"],
    )  # fmt: skip
