// What a token says about KL(p || q), from d = log p - log q.
#pragma once

#include "common/kl_estimate.h"

namespace rlhf_fast::cuda {

// e^x - 1 - x. Near 0 by its own series, since expm1(x) - x would leave only rounding errors there.
__device__ inline float expm1_minus(float x) {
    float series = 0x1.a0c634p-16f * x + 0x1.a2a1f0p-13f;  // by Remez on |x| <= 1/2: 7e-10
    series = series * x + 0x1.6c17c6p-10f;
    series = series * x + 0x1.110fcep-7f;
    series = series * x + 0x1.555554p-5f;
    series = series * x + 0x1.555556p-3f;
    series = series * x + 0.5f;
    return fabsf(x) < 0.5f ? x * x * series : expf(x) - 1.0f - x;
}

__device__ inline float estimate(Estimate kind, float d) {
    if (kind == Estimate::k1) return d;
    if (kind == Estimate::k2) return d * d * 0.5f;
    return expm1_minus(-d);
}

__device__ inline float slope(Estimate kind, float d) {
    if (kind == Estimate::k1) return 1.0f;
    if (kind == Estimate::k2) return d;
    return d - expm1_minus(-d);  // 1 - e^-d
}

}  // namespace rlhf_fast::cuda
