// kl_estimate on the CPU: elementwise, bound by memory at 12 bytes a token in float32.
#if !defined(SIMD_ISA)
#include "common/kl_estimate.h"

#include "common/parallel.h"

#define SIMD_FILE "cpu/kl_estimate.cpp"
#include "cpu/foreach_isa.h"
#endif

#include "cpu/math.h"
#include "cpu/sampled_kl.h"

namespace rlhf_fast::SIMD_ISA {
namespace {

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
                       write(out + i, n, mask != nullptr ? mask + i : nullptr, estimate(kind, d));
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
