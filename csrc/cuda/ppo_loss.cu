// ppo_loss in CUDA C++: a block a range of 2,048 tokens, one sweep that reads every input once, 16 bytes at a time, and
// writes the gradients; the ranges' sums are added up by a second, small kernel in a fixed order. Bound by memory where
// there are many tokens, and else by latency: so sums are taken side by side wherever there are threads for it.
#include "common/ppo_loss.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sampled_kl.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int64_t kRange = 2048;
constexpr int kFinishThreads = 1024;  // of the one block that adds the ranges' sums up
constexpr int kGroups = kFinishThreads / kPPOSums;
static_assert(kLogRatioMax == 32 && kPPOSums == 34 && kPPONumbers <= kFinishThreads / 32);

struct Larger {
    __device__ double operator()(double a, double b) const { return b > a ? b : a; }
};

__device__ inline double merge(int sum, double a, double b) { return sum >= kLogRatioMax ? Larger()(a, b) : a + b; }

// 32 sums over a warp at once, number l in lane l: each time a lane gives half of what it has to the lane it keeps the
// other half of, 31 shuffles for what takes 160 one sum after another.
template <int kApart = 16>
__device__ inline double sums_of_warp(double (&x)[2 * kApart]) {
    const bool upper = (threadIdx.x & kApart) != 0;
    double half[kApart];
#pragma unroll
    for (int i = 0; i < kApart; ++i) {
        const double keep = upper ? x[i + kApart] : x[i], give = upper ? x[i] : x[i + kApart];
        half[i] = keep + __shfl_xor_sync(kAllLanes, give, kApart);
    }
    if constexpr (kApart == 1) return half[0];
    else return sums_of_warp<kApart / 2>(half);
}

// The block's sums (and maxima) of what its threads have.
__device__ inline void sum_block(double (&mine)[32], double most, double most_negative, double (*scratch)[kPPOSums],
                                 double* whole) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    scratch[warp][lane] = sums_of_warp(mine);
    most = reduce_warp(most, Larger());
    most_negative = reduce_warp(most_negative, Larger());
    if (lane == 0) scratch[warp][kLogRatioMax] = most, scratch[warp][kMinusLogRatioMax] = most_negative;
    __syncthreads();
    const int s = threadIdx.x;
    if (s >= kPPOSums) return;
    double x = scratch[0][s];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) x = merge(s, x, scratch[w][s]);
    whole[s] = x;
}

// One token's numbers; those that are not given are 0.
struct Token {
    float logprob, old_logprob, advantage, value, old_value, target, entropy, ref_logprob, rollout_logprob, log_ratio;
};
struct Slopes {  // of the token's share of the loss, before its weight
    float logprob, value;
};

struct Sums {  // of a thread's tokens
    float sums[kReturn];
    double of_returns[kLogRatioMax - kReturn];  // their variances are differences of large numbers
    float most, most_negative;                  // log-ratio
};

__device__ inline float bound(float x) { return x < -20.0f ? -20.0f : x > 20.0f ? 20.0f : x; }

__device__ inline Slopes add_token(const Token& x, float weight, const PPOInputs& in, const PPOOptions& o, Sums& mine) {
    float (&sums)[kReturn] = mine.sums;
    const float bounded = bound(x.log_ratio), ratio = expf(bounded), own = x.logprob - x.old_logprob;
    const float low = 1.0f - o.clip_low, high = 1.0f + o.clip_high;
    const float near = ratio < low ? low : ratio > high ? high : ratio;
    const float plain = -x.advantage * ratio, clipped = -x.advantage * near;
    const bool cispo = o.objective == Objective::cispo, far = x.log_ratio < -20.0f || x.log_ratio > 20.0f;
    bool pulled = cispo ? ratio != near : clipped > plain;
    float policy = cispo ? clipped * x.logprob : pulled ? clipped : plain;
    Slopes slopes = {cispo ? clipped : pulled || far ? 0.0f : plain, 0.0f};
    if (o.objective == Objective::sapo) {
        const float tau = x.advantage > 0.0f ? o.tau_pos : o.tau_neg, moved = tau * (ratio - 1.0f);
        const float e = expf(moved < -kFarGate ? kFarGate : moved > kFarGate ? -kFarGate : -moved);
        const float inverse = 1.0f + e;
        pulled = false;
        policy = -x.advantage * (4.0f / (tau * inverse));
        slopes.logprob = far ? 0.0f : -x.advantage * (4.0f * e / (inverse * inverse) * ratio);
    }
    if (o.dual_clip != 0.0f && x.advantage < 0.0f && policy > -x.advantage * o.dual_clip) {
        policy = -x.advantage * o.dual_clip;
        slopes.logprob = 0.0f;
        sums[kDualClipped] += 1.0f;
    }
    if (in.rollout_logprobs != nullptr) {
        const float apart = expf(bound(x.old_logprob - x.rollout_logprob));
        const float held = apart > o.rollout_cap ? o.rollout_cap : apart;
        policy *= held;
        slopes.logprob *= held;
        sums[kRollout] += held;
        sums[kRolloutCapped] += apart > o.rollout_cap ? 1.0f : 0.0f;
    }
    sums[kCount] += 1.0f;
    sums[kPolicy] += weight * policy;
    sums[kRatio] += ratio - 1.0f;
    sums[kClipped] += pulled ? 1.0f : 0.0f;
    sums[kOldMinusNew] -= own;
    sums[kK3] += expm1_minus(bound(own));
#pragma unroll
    for (int e = 0; e < kRatioEdges; ++e) sums[kAtMost + e] += bounded > ratio_edge(e) ? 0.0f : 1.0f;
    mine.most = bounded > mine.most ? bounded : mine.most;
    mine.most_negative = -bounded > mine.most_negative ? -bounded : mine.most_negative;
    if (in.ref_logprobs != nullptr) {
        const float d = x.logprob - x.ref_logprob;
        sums[kKL] += weight * estimate(o.kl, d);
        if (o.kl_coef != 0.0f) slopes.logprob += o.kl_coef * slope(o.kl_slope, d);
    }
    if (in.values != nullptr) {
        const float error = x.value - x.target;
        float squared = error * error, gradient = error;
        if (o.value_clip >= 0.0f && in.old_values != nullptr) {
            const float moved = x.value - x.old_value;
            const float held = moved < -o.value_clip ? -o.value_clip : moved > o.value_clip ? o.value_clip : moved;
            const float near_error = x.old_value + held - x.target;
            if (near_error * near_error > squared) {
                squared = near_error * near_error;
                gradient = held == moved ? near_error : 0.0f;
                sums[kValueClipped] += 1.0f;
            }
        }
        sums[kValue] += weight * (0.5f * squared);
        slopes.value = o.value_coef * gradient;
        mine.of_returns[0] += x.target;
        mine.of_returns[kReturnSquared - kReturn] += static_cast<double>(x.target) * x.target;
        mine.of_returns[kRest - kReturn] += error;
        mine.of_returns[kRestSquared - kReturn] += static_cast<double>(error) * error;
    }
    if (in.entropy != nullptr) sums[kEntropy] += weight * x.entropy;
    return slopes;
}

// A thread's tokens of one input, zeros if it is not given.
template <class T>
__device__ inline void read(const void* data, int64_t i, int64_t count, float (&to)[kVector<T>]) {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) to[j] = 0.0f;
    if (data != nullptr) load(static_cast<const T*>(data), i, count, 1, aligned16(data), to);
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(PPOInputs in, PPOOptions o, PPOResults out) {
    __shared__ double scratch[kWarps][kPPOSums];
    const Whitening white = whitening(in.advantage_sums);
    Sums mine = {};
    mine.most = mine.most_negative = static_cast<float>(kNoLogRatio);
    const int64_t begin = blockIdx.x * kRange;
    for (int64_t first = begin; first < begin + kRange; first += kThreads * kVector<T>) {
        const int64_t i = first + threadIdx.x * kVector<T>;
        if (i >= in.count) continue;
        float logprobs[kVector<T>], old_logprobs[kVector<T>], advantages[kVector<T>], values[kVector<T>],
            old_values[kVector<T>], returns[kVector<T>], entropy[kVector<T>], ref_logprobs[kVector<T>],
            rollout_logprobs[kVector<T>];
        read<T>(in.logprobs, i, in.count, logprobs);
        read<T>(in.old_logprobs, i, in.count, old_logprobs);
        read<T>(in.advantages, i, in.count, advantages);
        read<T>(in.values, i, in.count, values);
        read<T>(in.old_values, i, in.count, old_values);
        read<T>(in.returns, i, in.count, returns);
        read<T>(in.entropy, i, in.count, entropy);
        read<T>(in.ref_logprobs, i, in.count, ref_logprobs);
        read<T>(in.rollout_logprobs, i, in.count, rollout_logprobs);
        float in_logprobs[kVector<T>], in_values[kVector<T>], in_entropy[kVector<T>];
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
            in_logprobs[j] = in_values[j] = in_entropy[j] = 0.0f;
            if (i + j >= in.count || (in.mask != nullptr && !in.mask[i + j])) continue;
            const float weight = in.weights != nullptr ? in.weights[i + j] : 1.0f;
            const float log_ratio = in.log_ratios != nullptr ? in.log_ratios[i + j] : logprobs[j] - old_logprobs[j];
            const float advantage = (advantages[j] - white.mean) * white.scale;
            const Token token = {logprobs[j], old_logprobs[j], advantage,       values[j],           old_values[j],
                                 returns[j],  entropy[j],      ref_logprobs[j], rollout_logprobs[j], log_ratio};
            const Slopes slopes = add_token(token, weight, in, o, mine);
            in_logprobs[j] = slopes.logprob * weight;
            in_values[j] = slopes.value * weight;
            in_entropy[j] = -o.entropy_coef * weight;
        }
        if (out.grad_logprobs != nullptr) store_floats<T>(out.grad_logprobs, i, in.count, in_logprobs);
        if (out.grad_values != nullptr) store_floats<T>(out.grad_values, i, in.count, in_values);
        if (out.grad_entropy != nullptr) store_floats<T>(out.grad_entropy, i, in.count, in_entropy);
    }
    double sums[kLogRatioMax];
#pragma unroll
    for (int s = 0; s < kReturn; ++s) sums[s] = mine.sums[s];
#pragma unroll
    for (int s = kReturn; s < kLogRatioMax; ++s) sums[s] = mine.of_returns[s - kReturn];
    sum_block(sums, mine.most, mine.most_negative, scratch, out.partials + blockIdx.x * int64_t{kPPOSums});
}

// A thread one sum over every kGroups-th range, then a thread a sum over the groups, then a warp a statistic.
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(PPOOptions o, Denominator of_terms, Denominator of_tokens, PPOResults out, int64_t ranges) {
    __shared__ double scratch[kGroups][kPPOSums], whole[kPPOSums];
    const int group = threadIdx.x / kPPOSums, s = threadIdx.x % kPPOSums;
    if (group < kGroups) {
        double sum = s >= kLogRatioMax ? kNoLogRatio : 0.0;
#pragma unroll 8
        for (int64_t r = group; r < ranges; r += kGroups) sum = merge(s, sum, out.partials[r * kPPOSums + s]);
        scratch[group][s] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kPPOSums) {
        double sum = scratch[0][s];
#pragma unroll
        for (int g = 1; g < kGroups; ++g) sum = merge(s, sum, scratch[g][s]);
        whole[s] = sum;
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp < kPPONumbers && threadIdx.x % 32 == 0) ppo_number(warp, whole, o, of_terms, of_tokens, out);
}

__global__ void __launch_bounds__(kThreads) scale_kernel(PPOGradients g) {
    const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector<float>;
    const float factor = __ldg(g.upstream) * __ldg(g.inverse);
#pragma unroll
    for (int which = 0; which < 3; ++which) {
        if (g.to[which] == nullptr) continue;
        float x[kVector<float>];
        load(g.from[which], i, g.count, 1, aligned16(g.from[which]), x);
#pragma unroll
        for (int j = 0; j < kVector<float>; ++j) x[j] *= factor;
        store(g.to[which], i, g.count, aligned16(g.to[which]), x);
    }
}

void forward(const PPOInputs& in, const PPOOptions& o, const Denominator& of_terms, const Denominator& of_tokens,
             const PPOResults& out, const Run& run) {
    const OnDevice guard(run);
    const int64_t ranges = (in.count + kRange - 1) / kRange;
    const auto stream = stream_of(run);
    if (ranges > 0)
        with_element(in.dtype, [&](auto element) {
            using T = decltype(element);
            RLHF_FAST_LAUNCH(forward_kernel<T>, grid(ranges), kThreads, stream, in, o, out);
        });
    RLHF_FAST_LAUNCH(finish_kernel, 1, kFinishThreads, stream, o, of_terms, of_tokens, out, ranges);
    check(cudaGetLastError(), "ppo_loss: forward");
}

void scale(const PPOGradients& g, const Run& run) {
    if (g.count == 0) return;
    const OnDevice guard(run);
    constexpr int64_t kEach = kThreads * kVector<float>;
    RLHF_FAST_LAUNCH(scale_kernel, grid((g.count + kEach - 1) / kEach), kThreads, stream_of(run), g);
    check(cudaGetLastError(), "ppo_loss: scale");
}

}  // namespace

const PPOLossKernels ppo_loss = {kRange, forward, scale};

}  // namespace rlhf_fast::cuda
