// kl_estimate, as every backend offers it: with d = log p - log q, k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/run.h"

namespace rlhf_fast {

enum class Estimate : int { k1 = 0, k2 = 1, k3 = 2 };

struct KLEstimateKernels {
    // logprobs and ref_logprobs: count elements of dtype; where mask (may be null) is false, out is 0.
    void (*forward)(const void* logprobs, const void* ref_logprobs, DType, int64_t count, const bool* mask, Estimate,
                    float* out, const Run&);

    // grad * d estimate / d logprobs to out, and its negative to ref_out; both of dtype, either may be null.
    void (*gradient)(const void* logprobs, const void* ref_logprobs, DType, int64_t count, const bool* mask, Estimate,
                     const float* grad, void* out, void* ref_out, const Run&);
};

namespace cpu {
extern const KLEstimateKernels kl_estimate;
}

namespace cuda {
extern const KLEstimateKernels kl_estimate;
}

}  // namespace rlhf_fast
