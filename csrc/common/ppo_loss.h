// ppo_loss, as every backend offers it: per token a policy, a value, an entropy and a KL term, their weighted sum over
// the tokens that count, its gradients and statistics, in one sweep.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/kl_estimate.h"
#include "common/run.h"

namespace rlhf_fast {

struct PPOInputs {  // count elements of dtype each; the last five may be null, and their terms are 0 then
    const void *logprobs, *old_logprobs, *advantages, *values, *old_values, *returns, *entropy, *ref_logprobs;
    DType dtype;
    int64_t count;
    const bool* mask;      // null: every token counts
    const float* weights;  // of a token's terms; null: 1
};

struct PPOOptions {
    float clip_low, clip_high;
    float dual_clip;   // 0: none
    float value_clip;  // below 0: none
    float value_coef, entropy_coef, kl_coef;
    Estimate kl, kl_slope;  // the estimate, and the one whose gradient it gets
};

// What sums are divided by: a number on the device, where 0 means 1; a number; or how many tokens count.
struct Denominator {
    const float* there;  // null: number
    float number;        // 0: the tokens that count

    RLHF_FAST_HOST_DEVICE bool is_count() const { return there == nullptr && number == 0.0f; }
    RLHF_FAST_HOST_DEVICE double of(double count) const {
        const double value = there != nullptr ? *there : number != 0.0f ? number : count;
        return value == 0.0 ? 1.0 : value;
    }
};

struct PPOResults {
    float* stats;                                       // kPPOStats
    float *grad_logprobs, *grad_values, *grad_entropy;  // of the loss; null where not needed
    double* partials;                                   // (ranges, kPPOSums), scratch
    int64_t* counts;                                    // (ranges), scratch
};

// What is summed up over a range of tokens; the largest ratio is a maximum.
enum PPOSum : int {
    kCount,
    kPolicy,
    kValue,
    kEntropy,
    kKL,
    kRatio,
    kClipped,
    kValueClipped,
    kOldMinusNew,
    kK3,
    kReturn,
    kReturnSquared,
    kRest,
    kRestSquared,
    kRatioMax,
    kPPOSums
};
constexpr int kPPOStats = 12;

// The statistics, in the order in which rlhf_fast/ops/ppo_loss.py names them, from sums over all tokens.
RLHF_FAST_HOST_DEVICE inline void ppo_stats(const double* sums, const PPOOptions& o, const Denominator& of_terms,
                                            const Denominator& of_tokens, float* stats) {
    const double count = sums[kCount], terms = of_terms.of(count), tokens = of_tokens.of(count);
    const double policy = sums[kPolicy] / terms, value = sums[kValue] / terms;
    const double entropy = sums[kEntropy] / terms, kl = sums[kKL] / terms;
    double loss = policy;  // a term that has no weight is no NaN, even if it is infinite
    if (o.value_coef != 0.0f) loss += o.value_coef * value;
    if (o.entropy_coef != 0.0f) loss -= o.entropy_coef * entropy;
    if (o.kl_coef != 0.0f) loss += o.kl_coef * kl;
    const double n = count == 0.0 ? 1.0 : count;
    const double second_moment = sums[kReturnSquared] / n, mean = sums[kReturn] / n, rest = sums[kRest] / n;
    const double variance = second_moment - mean * mean, left = sums[kRestSquared] / n - rest * rest;
    const bool varies = !(variance <= 1e-12 * second_moment);  // less than rounding leaves of equal returns
    const double all[kPPOStats] = {
        loss,
        policy,
        value,
        entropy,
        kl,
        sums[kRatio] / tokens,
        sums[kRatioMax],
        sums[kClipped] / tokens,
        sums[kValueClipped] / tokens,
        sums[kOldMinusNew] / tokens,
        sums[kK3] / tokens,
        varies ? 1.0 - left / variance : 0.0,
    };
    for (int i = 0; i < kPPOStats; ++i) stats[i] = static_cast<float>(all[i]);
}

struct PPOLossKernels {
    int64_t range;  // tokens whose sums are one partial result
    void (*forward)(const PPOInputs&, const PPOOptions&, const Denominator& of_terms, const Denominator& of_tokens,
                    const PPOResults&, const Run&);
};

namespace cpu {
extern const PPOLossKernels ppo_loss;
}

namespace cuda {
extern const PPOLossKernels ppo_loss;
}

}  // namespace rlhf_fast
