// sample on the CPU: a row stays in the L2 cache for its two sweeps. What top_k and top_p keep is found by counting,
// and weighing, the probabilities by the leading bits of their float32 form: exact, and linear in the vocabulary.
#if !defined(SIMD_ISA)
#include "common/sample.h"

#include <vector>

#include "common/parallel.h"

#define SIMD_FILE "cpu/sample.cpp"
#include "cpu/foreach_isa.h"
#endif

#include "cpu/math.h"

namespace rlhf_fast::SIMD_ISA {
namespace {

constexpr int64_t kRun = 256;  // columns whose probabilities are summed before the walk over sums

// Tokens with weights above `bits`, and the first `equals` of those with exactly these bits, in order.
struct Cut {
    uint32_t bits;
    int64_t equals;
};

// Where the likeliest weights reach a count of `most` or a sum of `enough`: a token is kept while fewer than `most` and
// less than `enough` rank before it. Weights are in [0, 1]; only those that `within` keeps count.
inline Cut cut(const float* weights, int64_t n, const Cut& within, int64_t most, double enough) {
    constexpr int kBits[3] = {11, 11, 10};
    uint32_t prefix = 0, mask = 0;
    int shift = 32;
    int64_t before = 0;
    double mass = 0.0;
    for (int level = 0; level < 3; ++level) {
        static thread_local int64_t counts[1 << 11];
        static thread_local double masses[1 << 11];
        const int buckets = 1 << kBits[level];
        shift -= kBits[level];
        for (int i = 0; i < buckets; ++i) counts[i] = 0, masses[i] = 0.0;
        int64_t equals = within.equals;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = bits_of(weights[i]);
            if (bits < within.bits || (bits == within.bits && equals-- <= 0)) continue;
            if ((bits & mask) != prefix) continue;
            const uint32_t bucket = (bits >> shift) & static_cast<uint32_t>(buckets - 1);
            ++counts[bucket];
            masses[bucket] += static_cast<double>(weights[i]);
        }
        int bucket = buckets - 1, least = 0;
        while (least < buckets && counts[least] == 0) ++least;
        for (; bucket > least; --bucket) {
            if (before + counts[bucket] >= most || mass + masses[bucket] >= enough) break;
            before += counts[bucket];
            mass += masses[bucket];
        }
        prefix |= static_cast<uint32_t>(bucket) << shift;
        mask |= static_cast<uint32_t>(buckets - 1) << shift;
        if (level == 2) {  // all in the bucket weigh the same
            const float one = float_of(prefix);
            int64_t equal = 0;
            while (equal < counts[bucket] && before + equal < most && mass + static_cast<double>(equal) * one < enough)
                ++equal;
            return {prefix, equal > 0 ? equal : 1};
        }
    }
    return {0, 0};
}

template <class T>
inline void row(const SampleInputs& in, const Samples& out, int64_t r, float* weights, double* runs) {
    const T* const z = static_cast<const T*>(in.logits) + r * in.row_stride;
    const int64_t n = in.columns;
    f32x16 highest = set1(-INFINITY);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) highest = max(load16(z + i), highest);
    if (i < n) highest = max(load_first(z + i, n - i, -INFINITY), highest);
    const float top = reduce_max(highest);
    const bool greedy = in.temperature[r] == 0.0f;
    const float least = 0x1p-126f;  // below it the inverse is no float32, and no two logits are as near as that
    const float scale = greedy ? 1.0f : 1.0f / (in.temperature[r] < least ? least : in.temperature[r]);
    out.tokens[r] = -1;
    out.logprobs[r] = out.kept[r] = out.entropy[r] = NAN;
    if (!(top > -INFINITY && top < INFINITY)) return;

    double total = 0.0, moment = 0.0;
    for (int64_t start = 0; start < n; start += kRun) {
        const int64_t end = start + kRun < n ? start + kRun : n;
        f32x16 sum = set1(0.0f), moments = set1(0.0f);
        for (int64_t j = start; j < end; j += kLanes) {
            const f32x16 x = j + kLanes <= end ? load16(z + j) : load_first(z + j, end - j, -INFINITY);
            const f32x16 y = mul(sub(x, set1(top)), set1(scale)), e = exp(y);
            store16(weights + j, e);  // weights has room for a last vector
            sum = add(sum, e);
            moments = fma(e, max(y, set1(-1e4f)), moments);  // 0 and not nan for a banned token
        }
        runs[start / kRun] = static_cast<double>(reduce_add(sum));
        total += runs[start / kRun];
        moment += static_cast<double>(reduce_add(moments));
    }
    if (!(total > 0.0 && total < INFINITY)) return;

    Cut kept = {0, n};
    double mass = total;
    if (greedy) {
        kept = {bits_of(1.0f), 1};
        mass = 1.0;
    } else {
        const bool limits_count = in.top_k[r] > 0 && in.top_k[r] < n, limits_mass = in.top_p[r] < 1.0f;
        if (limits_count) kept = cut(weights, n, kept, in.top_k[r], INFINITY);
        const auto weigh = [&] {
            mass = 0.0;
            int64_t equals = kept.equals;
            for (int64_t j = 0; j < n; ++j) {
                const uint32_t bits = bits_of(weights[j]);
                if (bits > kept.bits || (bits == kept.bits && equals-- > 0)) mass += static_cast<double>(weights[j]);
            }
        };
        if (limits_mass) {
            if (limits_count) weigh();
            kept = cut(weights, n, kept, n, static_cast<double>(in.top_p[r]) * mass);
        }
        const uint32_t least = bits_of(in.min_p[r]);
        if (in.min_p[r] > 0.0f && least > kept.bits) kept = {least, n};
        if (limits_count || limits_mass || in.min_p[r] > 0.0f) weigh();
    }

    // The token at which the cumulative sum first exceeds the target; with rounding, the last one that is kept.
    const double target = greedy ? 0.0 : in.uniform[r] * mass;
    const bool all = kept.bits == 0 && kept.equals == n;
    double sum = 0.0;
    int64_t found = -1, from = 0, equals = kept.equals;
    if (all)
        while (from + kRun < n && sum + runs[from / kRun] <= target) sum += runs[from / kRun], from += kRun;
    while (greedy && to_float(z[from]) != top) ++from;  // its weight alone does not tell: 1 may also be one rounded up
    for (int64_t j = from; j < n; ++j) {
        const uint32_t bits = bits_of(weights[j]);
        if (bits == 0 || bits < kept.bits || (bits == kept.bits && equals-- <= 0)) continue;
        found = j;
        sum += static_cast<double>(weights[j]);
        if (sum > target) break;
    }
    for (int64_t j = from; found < 0 && j > 0; --j)
        if (weights[j - 1] > 0.0f) found = j - 1;
    if (found < 0) return;  // options out of their range kept nothing
    out.tokens[r] = found;
    const double log_sum = std::log(total);
    out.logprobs[r] = static_cast<float>((static_cast<double>(to_float(z[found])) - top) * scale - log_sum);
    out.kept[r] = static_cast<float>(mass / total);
    out.entropy[r] = static_cast<float>(log_sum - moment / total);
}

void forward(const SampleInputs& in, const Samples& out, int64_t begin, int64_t end, float* weights, double* runs) {
    with_element(in.dtype, [&](auto element) {
        for (int64_t r = begin; r < end; ++r) row<typename decltype(element)::type>(in, out, r, weights, runs);
    });
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS

namespace rlhf_fast::cpu {
namespace {

void forward(const SampleInputs& in, const Samples& out, const Run& run) {
    const auto kernel = SIMD_CHOOSE(forward);
    parallel_rows(in.rows, 4 * in.columns, run.threads, [&](int64_t begin, int64_t end) {
        std::vector<float> weights(static_cast<std::size_t>(in.columns) + 16);
        std::vector<double> runs(static_cast<std::size_t>(in.columns) / 256 + 1);
        kernel(in, out, begin, end, weights.data(), runs.data());
    });
}

}  // namespace

const SampleKernels sample = {forward};

}  // namespace rlhf_fast::cpu

#endif  // SIMD_LAST_PASS
