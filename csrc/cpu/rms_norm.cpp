// rms_norm on the CPU: one row at a time, in the L1 cache; bound by the call for the few rows of decoding.
#if !defined(SIMD_ISA)
#include "common/rms_norm.h"

#include "common/parallel.h"

#define SIMD_FILE "cpu/rms_norm.cpp"
#include "cpu/foreach_isa.h"
#endif

namespace rlhf_fast::SIMD_ISA {
namespace {

template <class T>
inline void rows(const RMSNormProblem& p, int64_t begin, int64_t end) {
    const T* const weight = static_cast<const T*>(p.weight);
    for (int64_t r = begin; r < end; ++r) {
        const T* const x = static_cast<const T*>(p.x) + r * p.x_stride;
        T* const out = static_cast<T*>(p.out) + r * p.columns;
        f32x16 squares[2] = {set1(0.0f), set1(0.0f)};
        int64_t i = 0;
        for (; i + 2 * kLanes <= p.columns; i += 2 * kLanes)
            for (int k = 0; k < 2; ++k) {
                const f32x16 one = load16(x + i + k * kLanes);
                squares[k] = fma(one, one, squares[k]);
            }
        for (; i < p.columns; i += kLanes) {
            const f32x16 one = i + kLanes <= p.columns ? load16(x + i) : load_first(x + i, p.columns - i, 0.0f);
            squares[0] = fma(one, one, squares[0]);
        }
        const float mean = reduce_add(add(squares[0], squares[1])) / static_cast<float>(p.columns);
        const f32x16 scale = set1(1.0f / std::sqrt(mean + p.eps)), offset = set1(p.offset);
        for (i = 0; i + kLanes <= p.columns; i += kLanes)
            store16(out + i, mul(mul(load16(x + i), scale), add(load16(weight + i), offset)));
        if (i < p.columns) {
            const int64_t n = p.columns - i;
            const f32x16 w = add(load_first(weight + i, n, 0.0f), offset);
            store_first(out + i, n, mul(mul(load_first(x + i, n, 0.0f), scale), w));
        }
    }
}

void forward(const RMSNormProblem& p, int64_t begin, int64_t end) {
    with_element(p.dtype, [&](auto element) { rows<typename decltype(element)::type>(p, begin, end); });
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS

namespace rlhf_fast::cpu {
namespace {

void forward(const RMSNormProblem& p, const Run& run) {
    const auto kernel = SIMD_CHOOSE(forward);
    parallel_rows(p.rows, p.columns, run.threads, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

const RMSNormKernels rms_norm = {forward};

}  // namespace rlhf_fast::cpu

#endif  // SIMD_LAST_PASS
