// ppo_loss, as every backend offers it: per token a policy, a value, an entropy and a KL term, their weighted sum over
// the tokens that count, its gradients and statistics, in one sweep. How many tokens
// count is known only after it, so the gradients are those of the sum, and its divisor goes with the statistics.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtypes.h"
#include "common/kl_estimate.h"
#include "common/run.h"

namespace rlhf_fast {

struct PPOInputs {  // count elements of dtype each; the last six may be null, and their terms are left out then
    const void *logprobs, *old_logprobs, *advantages, *values, *old_values, *returns, *entropy, *ref_logprobs,
        *rollout_logprobs;
    DType dtype;
    int64_t count;
    const bool* mask;              // null: every token counts
    const float* weights;          // of a token's terms; null: 1
    const float* log_ratios;       // of a token's sequence, in place of its own; null: its own
    const double* advantage_sums;  // number, sum and sum of squares of those to whiten by; null: as they are
};

// What is made of a ratio r and an advantage A: clipped PPO; CISPO, clipped ratios as weights of log-probabilities;
// SAPO, the smooth -A (4 / tau) sigmoid(tau (r - 1)) = -A 4 / (tau (1 + e)), whose slope in log r is -A r 4 e / (1 +
// e)^2, where e = exp(-tau (r - 1)).
enum class Objective : int { clip = 0, cispo = 1, sapo = 2 };
constexpr float kFarGate = 80.0f;  // |tau (r - 1)| is clamped to this, where exp is far from 0 and from infinity

struct PPOOptions {
    float clip_low, clip_high;
    float dual_clip;   // 0: none
    float value_clip;  // below 0: none
    float value_coef, entropy_coef, kl_coef;
    float rollout_cap;       // the largest weight that rollout_logprobs give
    float tau_pos, tau_neg;  // of SAPO, where A > 0 and elsewhere
    Objective objective;
    Estimate kl, kl_slope;  // the estimate, and the one whose gradient it gets
};

// Advantages become (A - mean) * scale.
struct Whitening {
    float mean, scale;
};

RLHF_FAST_HOST_DEVICE inline Whitening whitening(const double* sums) {
    if (sums == nullptr) return {0.0f, 1.0f};
    const double n = sums[0] < 1.0 ? 1.0 : sums[0], mean = sums[1] / n;
    const double variance = (sums[2] - sums[1] * mean) / (n < 2.0 ? 1.0 : n - 1.0);
    return {static_cast<float>(mean), 1.0f / sqrtf(static_cast<float>((variance < 0.0 ? 0.0 : variance) + 1e-8))};
}

// What sums are divided by: a number on the device, where 0 means 1; a number; or how many tokens count.
struct Denominator {
    const float* there;  // null: number
    float number;        // 0: the tokens that count

    RLHF_FAST_HOST_DEVICE double of(double count) const {
        const double value = there != nullptr ? *there : number != 0.0f ? number : count;
        return value == 0.0 ? 1.0 : value;
    }
};

struct PPOResults {
    float *loss, *stats, *inverse;                      // 1; kPPOStats; 1 over what the terms are divided by
    float *grad_logprobs, *grad_values, *grad_entropy;  // of the sum of terms; null where not needed
    double* partials;                                   // (ranges, kPPOSums), scratch
};

// Log-ratios whose quantiles are wanted are counted between 0, +-1/128, +-1/64, ... +-1/2.
constexpr int kRatioEdges = 15;

RLHF_FAST_HOST_DEVICE inline float ratio_edge(int e) {
    return e < 7 ? -1.0f / (2 << e) : e == 7 ? 0.0f : 1.0f / (1 << (15 - e));
}

// What is summed up over a range of tokens; the last two are maxima, -20 if no token counts.
enum PPOSum : int {
    kCount,
    kPolicy,
    kValue,
    kEntropy,
    kKL,
    kRatio,  // less 1, or equal terms near 1 would round the same way again and again
    kClipped,
    kDualClipped,
    kValueClipped,
    kOldMinusNew,
    kK3,
    kRollout,
    kRolloutCapped,
    kAtMost,  // tokens whose log-ratio is at most an edge
    kReturn = kAtMost + kRatioEdges,
    kReturnSquared,
    kRest,
    kRestSquared,
    kLogRatioMax,
    kMinusLogRatioMax,
    kPPOSums
};
constexpr double kNoLogRatio = -20.0;  // log-ratios are clamped to +-20

// The log-ratio below which a share of the tokens lies: between two edges, as if they lay evenly there.
RLHF_FAST_HOST_DEVICE inline double log_ratio_quantile(const double* sums, double share) {
    const double least = -sums[kMinusLogRatioMax], most = sums[kLogRatioMax], wanted = share * sums[kCount];
    double from = least, before = 0.0;
    for (int e = 0; e <= kRatioEdges; ++e) {
        const double edge = e < kRatioEdges ? ratio_edge(e) : most;
        const double to = edge < least ? least : edge > most ? most : edge;
        const double at_most = e < kRatioEdges ? sums[kAtMost + e] : sums[kCount];
        if (at_most >= wanted && at_most > before) return from + (to - from) * (wanted - before) / (at_most - before);
        from = to;
        before = at_most;
    }
    return most;
}

RLHF_FAST_HOST_DEVICE inline double ppo_sum_of_terms(const double* sums, const PPOOptions& o) {
    double loss = sums[kPolicy];  // a term that has no weight is no NaN, even if it is infinite
    if (o.value_coef != 0.0f) loss += o.value_coef * sums[kValue];
    if (o.entropy_coef != 0.0f) loss -= o.entropy_coef * sums[kEntropy];
    if (o.kl_coef != 0.0f) loss += o.kl_coef * sums[kKL];
    return loss;
}

RLHF_FAST_HOST_DEVICE inline double explained_variance(const double* sums) {
    const double n = sums[kCount] == 0.0 ? 1.0 : sums[kCount];
    const double second_moment = sums[kReturnSquared] / n, mean = sums[kReturn] / n, rest = sums[kRest] / n;
    const double variance = second_moment - mean * mean, left = sums[kRestSquared] / n - rest * rest;
    const bool varies = !(variance <= 1e-12 * second_moment);  // less than rounding leaves of equal returns
    return varies ? 1.0 - left / variance : 0.0;
}

constexpr int kPPOStats = 17, kPPONumbers = kPPOStats + 2;

// Number i of the statistics, in the order in which rlhf_fast/ops/ppo_loss.py names them, then the loss and the inverse
// of its divisor, from sums over all tokens. One at a time, so that a GPU can take them side by side.
RLHF_FAST_HOST_DEVICE inline void ppo_number(int i, const double* sums, const PPOOptions& o,
                                             const Denominator& of_terms, const Denominator& of_tokens,
                                             const PPOResults& out) {
    const double count = sums[kCount], terms = of_terms.of(count), tokens = of_tokens.of(count);
    double x;
    if (i < 4) x = sums[kPolicy + i] / terms;
    else if (i == 4) x = (count + sums[kRatio]) / tokens;
    else if (i < 9) {
        x = i == 5   ? sums[kLogRatioMax]
            : i == 6 ? -sums[kMinusLogRatioMax]
                     : log_ratio_quantile(sums, i == 7 ? 0.05 : 0.95);
        x = count == 0.0 ? 0.0 : exp(x);
    } else if (i < 16) x = sums[kClipped + i - 9] / tokens;
    else if (i == 16) x = explained_variance(sums);
    else if (i == kPPOStats) x = ppo_sum_of_terms(sums, o) / terms;
    else x = 1.0 / terms;
    float* const to = i < kPPOStats ? out.stats + i : i == kPPOStats ? out.loss : out.inverse;
    *to = static_cast<float>(x);
}

// Gradients of a sum of terms, of `count` tokens each, and those of the loss: times upstream and inverse, of which each
// is one number. Null where not needed.
struct PPOGradients {
    const float* from[3];
    float* to[3];
    int64_t count;
    const float *upstream, *inverse;
};

struct PPOLossKernels {
    int64_t range;  // tokens whose sums are one partial result
    void (*forward)(const PPOInputs&, const PPOOptions&, const Denominator& of_terms, const Denominator& of_tokens,
                    const PPOResults&, const Run&);
    void (*scale)(const PPOGradients&, const Run&);
};

namespace cpu {
extern const PPOLossKernels ppo_loss;
}

namespace cuda {
extern const PPOLossKernels ppo_loss;
}

}  // namespace rlhf_fast
