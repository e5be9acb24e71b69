// kl_estimate on the CPU: elementwise, bound by memory at 12 bytes a token in float32.
#if !defined(SIMD_ISA)
#include "common/kl_estimate.h"

#include "common/logits.h"
#include "common/parallel.h"

#define SIMD_FILE "cpu/kl_estimate.cpp"
#include "cpu/foreach_isa.h"
#endif

#include "cpu/math.h"
#include "cpu/transform.h"

namespace rlhf_fast::SIMD_ISA {
namespace {

// e^x - 1 - x. Near 0 by its own series, since expm1(x) - x would leave only rounding errors there.
SIMD_INLINE f32x16 expm1_minus(f32x16 x) {
    f32x16 series = fma(x, set1(0x1.a0c634p-16f), set1(0x1.a2a1f0p-13f));  // by Remez on |x| <= 1/2: 7e-10
    series = fma(series, x, set1(0x1.6c17c6p-10f));
    series = fma(series, x, set1(0x1.110fcep-7f));
    series = fma(series, x, set1(0x1.555554p-5f));
    series = fma(series, x, set1(0x1.555556p-3f));
    series = fma(series, x, set1(0x1p-1f));
    const f32x16 size = max(x, sub(set1(0.0f), x));
    return select(less(size, set1(0.5f)), mul(mul(x, x), series), sub(expm1(x), x));
}

SIMD_INLINE f32x16 value(Estimate kind, f32x16 d) {
    if (kind == Estimate::k1) return d;
    if (kind == Estimate::k2) return mul(mul(d, d), set1(0.5f));
    return expm1_minus(sub(set1(0.0f), d));
}

SIMD_INLINE f32x16 slope(Estimate kind, f32x16 d) {
    if (kind == Estimate::k1) return set1(1.0f);
    if (kind == Estimate::k2) return d;
    return sub(set1(0.0f), expm1(sub(set1(0.0f), d)));
}

// body(i, n, d) for each run of n <= 16 elements from i.
template <class T, class Body>
SIMD_INLINE void for_each_d(const T* logprobs, const T* ref_logprobs, int64_t begin, int64_t end, const Body& body) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
        body(i, int64_t{kLanes}, sub(load16(logprobs + i), load16(ref_logprobs + i)));
    if (i < end) {
        const int64_t n = end - i;
        body(i, n, sub(load_first(logprobs + i, n, 0.0f), load_first(ref_logprobs + i, n, 0.0f)));
    }
}

template <class T>
SIMD_INLINE void write(T* out, int64_t n, const bool* mask, f32x16 a) {
    if (mask == nullptr && n == kLanes) return store16(out, a);
    T lanes[kLanes];
    store16(lanes, a);
    for (int64_t i = 0; i < n; ++i) out[i] = mask == nullptr || mask[i] ? lanes[i] : from_float<T>(0.0f);
}

void forward(const void* logprobs, const void* ref_logprobs, DType dtype, const bool* mask, Estimate kind, float* out,
             int64_t begin, int64_t end) {
    with_element(dtype, [&](auto element) {
        using T = typename decltype(element)::type;
        for_each_d(static_cast<const T*>(logprobs), static_cast<const T*>(ref_logprobs), begin, end,
                   [&](int64_t i, int64_t n, f32x16 d) {
                       write(out + i, n, mask != nullptr ? mask + i : nullptr, value(kind, d));
                   });
    });
}

void gradient(const void* logprobs, const void* ref_logprobs, DType dtype, const bool* mask, Estimate kind,
              const float* grad, void* out, void* ref_out, int64_t begin, int64_t end) {
    with_element(dtype, [&](auto element) {
        using T = typename decltype(element)::type;
        for_each_d(static_cast<const T*>(logprobs), static_cast<const T*>(ref_logprobs), begin, end,
                   [&](int64_t i, int64_t n, f32x16 d) {
                       const f32x16 upstream = n == kLanes ? load16(grad + i) : load_first(grad + i, n, 0.0f);
                       const f32x16 g = mul(upstream, slope(kind, d));
                       const bool* flags = mask != nullptr ? mask + i : nullptr;
                       if (out != nullptr) write(static_cast<T*>(out) + i, n, flags, g);
                       if (ref_out != nullptr) write(static_cast<T*>(ref_out) + i, n, flags, sub(set1(0.0f), g));
                   });
    });
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS

namespace rlhf_fast::cpu {
namespace {

void forward(const void* logprobs, const void* ref_logprobs, DType dtype, int64_t count, const bool* mask,
             Estimate kind, float* out, const Run& run) {
    const auto kernel = SIMD_CHOOSE(forward);
    parallel_rows(count, 1, run.threads, [&](int64_t begin, int64_t end) {
        kernel(logprobs, ref_logprobs, dtype, mask, kind, out, begin, end);
    });
}

void gradient(const void* logprobs, const void* ref_logprobs, DType dtype, int64_t count, const bool* mask,
              Estimate kind, const float* grad, void* out, void* ref_out, const Run& run) {
    const auto kernel = SIMD_CHOOSE(gradient);
    parallel_rows(count, 1, run.threads, [&](int64_t begin, int64_t end) {
        kernel(logprobs, ref_logprobs, dtype, mask, kind, grad, out, ref_out, begin, end);
    });
}

}  // namespace

const KLEstimateKernels kl_estimate = {forward, gradient};

}  // namespace rlhf_fast::cpu

#endif  // SIMD_LAST_PASS
