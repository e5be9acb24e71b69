"""Estimate KL(p || q) from a token, by d = log p - log q; kinds as csrc/common/kl_estimate.h numbers them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1_minus(x):
    """e^x - 1 - x. Near 0 by its own series, since expm1(x) - x would leave only rounding errors there."""
    series = 2.484168e-5 * x + 1.99619564e-4  # by Remez on |x| <= 1/2: 7e-10
    series = series * x + 1.38890406e-3
    series = series * x + 8.33318289e-3
    series = series * x + 4.16666642e-2
    series = series * x + 1.66666672e-1
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def estimate(d, KIND: tl.constexpr):
    if KIND == 0:
        return d
    if KIND == 1:
        return d * d * 0.5
    return expm1_minus(-d)


@triton.jit
def slope(d, KIND: tl.constexpr):
    if KIND == 0:
        return tl.zeros_like(d) + 1.0
    if KIND == 1:
        return d
    return d - expm1_minus(-d)  # 1 - e^-d
