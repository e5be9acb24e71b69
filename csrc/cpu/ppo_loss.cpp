// ppo_loss on the CPU: one sweep, sixteen tokens at a time, that reads every input once and writes the gradients. Sums
// are taken over ranges of 1,024 tokens and added up in their order, so the bits do not depend on the threads.
#if !defined(SIMD_ISA)
#include "common/ppo_loss.h"

#include "common/parallel.h"

#define SIMD_FILE "cpu/ppo_loss.cpp"
#include "cpu/foreach_isa.h"
#endif

#include "cpu/math.h"
#include "cpu/sampled_kl.h"

namespace rlhf_fast::SIMD_ISA {
namespace {

constexpr int64_t kRange = 1024;

// The tokens [i, i + n): those that count as ones, the others as zeros.
SIMD_INLINE f32x16 flags(const bool* mask, int64_t i, int64_t n) {
    if (mask == nullptr) return keep_first(set1(1.0f), n, 0.0f);
    return n == kLanes ? load16(mask + i) : load_first(mask + i, n, 0.0f);
}

template <class T>
struct Sweep {
    const PPOInputs& in;
    const PPOOptions& o;
    const PPOResults& out;
    Whitening white;

    f32x16 sums[kLogRatioMax], most, most_negative;  // of the log-ratios
    float return_pivot, rest_pivot;  // of a range, from which what varies is measured: else squares would hide it

    // An input at these tokens; where one does not count it is 0 and may have been anything.
    SIMD_INLINE f32x16 read(const void* data, int64_t i, int64_t n, mask16 counts) const {
        const T* const p = static_cast<const T*>(data) + i;
        const f32x16 x = n == kLanes ? load16(p) : load_first(p, n, 0.0f);
        return select(counts, x, set1(0.0f));
    }
    SIMD_INLINE static f32x16 floats(const float* p, int64_t i, int64_t n, mask16 counts) {
        return select(counts, n == kLanes ? load16(p + i) : load_first(p + i, n, 0.0f), set1(0.0f));
    }
    SIMD_INLINE static f32x16 bound(f32x16 x) { return min(set1(20.0f), max(set1(-20.0f), x)); }
    SIMD_INLINE static void write(float* to, int64_t i, int64_t n, f32x16 x) {
        if (to == nullptr) return;
        if (n == kLanes) {
            store16(to + i, x);
        } else {
            store_first(to + i, n, x);
        }
    }
    SIMD_INLINE void add_up(PPOSum which, f32x16 x, f32x16 weight) { sums[which] = fma(x, weight, sums[which]); }

    SIMD_INLINE void tokens(int64_t i, int64_t n) {
        const f32x16 zero = set1(0.0f), one = set1(1.0f), ones = flags(in.mask, i, n);
        const mask16 counts = less(zero, ones);
        f32x16 weight = ones;
        if (in.weights != nullptr) {
            const float* const p = in.weights + i;
            weight = mul(ones, n == kLanes ? load16(p) : load_first(p, n, 0.0f));
        }

        const f32x16 logprobs = read(in.logprobs, i, n, counts), old_logprobs = read(in.old_logprobs, i, n, counts);
        const f32x16 own = sub(logprobs, old_logprobs), own_bounded = bound(own);
        const f32x16 log_ratio = in.log_ratios != nullptr ? floats(in.log_ratios, i, n, counts) : own;
        const f32x16 bounded = in.log_ratios != nullptr ? bound(log_ratio) : own_bounded, ratio = exp(bounded);
        const f32x16 advantages = mul(sub(read(in.advantages, i, n, counts), set1(white.mean)), set1(white.scale));
        const f32x16 minus = sub(zero, advantages);
        const f32x16 near = min(set1(1.0f + o.clip_high), max(set1(1.0f - o.clip_low), ratio));
        const f32x16 plain = mul(minus, ratio), clipped = mul(minus, near);
        f32x16 policy, slope;
        if (o.objective == Objective::sapo) {
            const f32x16 tau = select(less(zero, advantages), set1(o.tau_pos), set1(o.tau_neg));
            const f32x16 x = mul(tau, sub(ratio, one)), far = set1(kFarGate);
            const f32x16 e = exp(sub(zero, min(far, max(sub(zero, far), x)))), inverse = add(one, e);
            const f32x16 outside = sub(log_ratio, bounded);  // a clamped ratio has no slope
            policy = mul(minus, div(set1(4.0f), mul(tau, inverse)));
            slope = mul(minus, mul(div(mul(set1(4.0f), e), mul(inverse, inverse)), ratio));
            slope = select(less(zero, max(outside, sub(zero, outside))), zero, slope);
        } else if (o.objective == Objective::cispo) {
            policy = mul(clipped, logprobs);
            slope = clipped;
            const f32x16 moved = sub(ratio, near);
            add_up(kClipped, select(less(zero, max(moved, sub(zero, moved))), one, zero), ones);
        } else {
            const mask16 pulled = less(plain, clipped), low = less(log_ratio, set1(-20.0f));
            policy = select(pulled, clipped, plain);
            slope = select(pulled, zero, plain);
            slope = select(low, zero, select(less(set1(20.0f), log_ratio), zero, slope));
            add_up(kClipped, select(pulled, one, zero), ones);
            if (o.dual_clip != 0.0f) {
                const f32x16 dual = select(less(advantages, zero), mul(minus, set1(o.dual_clip)), set1(INFINITY));
                const mask16 held = less(dual, policy);
                slope = select(held, zero, slope);
                policy = select(held, dual, policy);
                add_up(kDualClipped, select(held, one, zero), ones);
            }
        }
        if (in.rollout_logprobs != nullptr) {
            const f32x16 apart = exp(bound(sub(old_logprobs, read(in.rollout_logprobs, i, n, counts))));
            const f32x16 cap = set1(o.rollout_cap), held = min(cap, apart);
            policy = mul(policy, held);
            slope = mul(slope, held);
            add_up(kRollout, held, ones);
            add_up(kRolloutCapped, select(less(cap, apart), one, zero), ones);
        }
        add_up(kPolicy, policy, weight);
        add_up(kRatio, sub(ratio, one), ones);
        add_up(kOldMinusNew, sub(zero, own), ones);
        add_up(kK3, expm1_minus(own_bounded), ones);
        sums[kCount] = add(sums[kCount], ones);
        const f32x16 none = set1(static_cast<float>(kNoLogRatio));
        most = max(most, select(counts, bounded, none));
        most_negative = max(most_negative, select(counts, sub(zero, bounded), none));
        for (int e = 0; e < kRatioEdges; ++e) {
            f32x16& at_most = sums[kAtMost + e];
            at_most = add(at_most, select(less(set1(ratio_edge(e)), bounded), zero, ones));
        }

        if (in.ref_logprobs != nullptr) {
            const f32x16 d = sub(logprobs, read(in.ref_logprobs, i, n, counts));
            add_up(kKL, estimate(o.kl, d), weight);
            if (o.kl_coef != 0.0f) slope = fma(set1(o.kl_coef), rlhf_fast::SIMD_ISA::slope(o.kl_slope, d), slope);
        }
        write(out.grad_logprobs, i, n, select(counts, mul(slope, weight), zero));

        if (in.values != nullptr) {
            const f32x16 values = read(in.values, i, n, counts), target = read(in.returns, i, n, counts);
            const f32x16 error = sub(values, target);
            f32x16 squared = mul(error, error), gradient = error;
            if (o.value_clip >= 0.0f && in.old_values != nullptr) {
                const f32x16 old = read(in.old_values, i, n, counts), moved = sub(values, old);
                const f32x16 clip = set1(o.value_clip), held = min(clip, max(sub(zero, clip), moved));
                const f32x16 near_error = sub(add(old, held), target), near_squared = mul(near_error, near_error);
                const mask16 worse = less(squared, near_squared);
                const f32x16 size = max(moved, sub(zero, moved));
                gradient = select(worse, select(less(clip, size), zero, near_error), error);
                squared = select(worse, near_squared, squared);
                add_up(kValueClipped, select(worse, one, zero), ones);
            }
            add_up(kValue, mul(squared, set1(0.5f)), weight);
            const f32x16 in_values = mul(mul(gradient, set1(o.value_coef)), weight);
            write(out.grad_values, i, n, select(counts, in_values, zero));
            const f32x16 apart = sub(target, set1(return_pivot)), rest_apart = sub(error, set1(rest_pivot));
            add_up(kReturn, apart, ones);
            add_up(kReturnSquared, mul(apart, apart), ones);
            add_up(kRest, rest_apart, ones);
            add_up(kRestSquared, mul(rest_apart, rest_apart), ones);
        }
        if (in.entropy != nullptr) add_up(kEntropy, read(in.entropy, i, n, counts), weight);
        write(out.grad_entropy, i, n, mul(weight, set1(-o.entropy_coef)));
    }

    // Returns and rests of the first token of [begin, end) that counts.
    SIMD_INLINE void set_pivots(int64_t begin, int64_t end) {
        return_pivot = rest_pivot = 0.0f;
        if (in.values == nullptr) return;
        int64_t i = begin;
        while (i < end && in.mask != nullptr && !in.mask[i]) ++i;
        if (i == end) return;
        return_pivot = to_float(static_cast<const T*>(in.returns)[i]);
        rest_pivot = to_float(static_cast<const T*>(in.values)[i]) - return_pivot;
    }

    // The sums of x and of x^2, from those of x - pivot.
    SIMD_INLINE static void move(double* partial, PPOSum which, double count, double pivot) {
        const double sum = partial[which], squares = partial[which + 1];
        partial[which] = sum + count * pivot;
        partial[which + 1] = squares + 2.0 * pivot * sum + count * pivot * pivot;
    }

    // Tokens [begin, end), and their sums.
    SIMD_INLINE void range(int64_t begin, int64_t end, double* partial) {
        for (f32x16& sum : sums) sum = set1(0.0f);
        most = most_negative = set1(static_cast<float>(kNoLogRatio));
        set_pivots(begin, end);
        for (int64_t i = begin; i < end; i += kLanes) tokens(i, end - i < kLanes ? end - i : int64_t{kLanes});
        for (int s = 0; s < kLogRatioMax; ++s) partial[s] = reduce_add(sums[s]);
        move(partial, kReturn, partial[kCount], return_pivot);
        move(partial, kRest, partial[kCount], rest_pivot);
        partial[kLogRatioMax] = reduce_max(most);
        partial[kMinusLogRatioMax] = reduce_max(most_negative);
    }
};

void forward(const PPOInputs& in, const PPOOptions& o, const PPOResults& out, int64_t from, int64_t to) {
    with_element(in.dtype, [&](auto element) {
        Sweep<typename decltype(element)::type> sweep = {in, o,    out, whitening(in.advantage_sums), {}, {},
                                                         {}, 0.0f, 0.0f};
        for (int64_t r = from; r < to; ++r) {
            const int64_t begin = r * kRange, end = in.count - begin < kRange ? in.count : begin + kRange;
            sweep.range(begin, end, out.partials + r * kPPOSums);
        }
    });
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS

namespace rlhf_fast::cpu {
namespace {

constexpr int64_t kRange = SIMD_ISA::kRange;

void forward(const PPOInputs& in, const PPOOptions& o, const Denominator& of_terms, const Denominator& of_tokens,
             const PPOResults& out, const Run& run) {
    const int64_t ranges = (in.count + kRange - 1) / kRange;
    const auto kernel = SIMD_CHOOSE(forward);
    parallel_rows(ranges, kRange, run.threads, [&](int64_t from, int64_t to) { kernel(in, o, out, from, to); });
    double sums[kPPOSums] = {};
    for (int s = kLogRatioMax; s < kPPOSums; ++s) sums[s] = kNoLogRatio;
    for (int64_t r = 0; r < ranges; ++r) {
        const double* const partial = out.partials + r * kPPOSums;
        for (int s = 0; s < kLogRatioMax; ++s) sums[s] += partial[s];
        for (int s = kLogRatioMax; s < kPPOSums; ++s) sums[s] = std::max(sums[s], partial[s]);
    }
    for (int i = 0; i < kPPONumbers; ++i) ppo_number(i, sums, o, of_terms, of_tokens, out);
}

void scale(const PPOGradients& g, const Run& run) {
    const float factor = *g.upstream * *g.inverse;
    parallel_rows(g.count, 1, run.threads, [&](int64_t from, int64_t to) {
        for (int which = 0; which < 3; ++which) {
            if (g.to[which] == nullptr) continue;
            for (int64_t i = from; i < to; ++i) g.to[which][i] = g.from[which][i] * factor;
        }
    });
}

}  // namespace

const PPOLossKernels ppo_loss = {kRange, forward, scale};

}  // namespace rlhf_fast::cpu

#endif  // SIMD_LAST_PASS
