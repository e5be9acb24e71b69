// sequence_sum on the CPU: in double, element i of a sequence in sum i mod 8, each sequence on one thread.
#include "common/sequence_sum.h"

#include "common/parallel.h"

namespace rlhf_fast::cpu {
namespace {

constexpr int kSums = 8;

template <class T>
void sum(const Sequences& where, const T* x, const bool* mask, float* out, int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
        const int64_t begin = where.begin(b), n = where.begin(b + 1) - begin;
        const T* const mine = x + begin;
        double sums[kSums] = {};
        int64_t i = 0;
        if (mask == nullptr)
            for (; i + kSums <= n; i += kSums)
                for (int k = 0; k < kSums; ++k) sums[k] += to_float(mine[i + k]);
        else
            for (; i + kSums <= n; i += kSums)
                for (int k = 0; k < kSums; ++k) sums[k] += mask[begin + i + k] ? to_float(mine[i + k]) : 0.0f;
        for (int k = 0; i < n; ++i, ++k) sums[k] += mask == nullptr || mask[begin + i] ? to_float(mine[i]) : 0.0f;
        double total = 0.0;
        for (double one : sums) total += one;
        out[b] = static_cast<float>(total);
    }
}

void forward(const Sequences& where, const void* x, DType dtype, const bool* mask, float* out, const Run& run) {
    const int64_t each = where.count > 0 ? (where.begin(where.count) - where.begin(0)) / where.count + 1 : 1;
    parallel_rows(where.count, each, run.threads, [&](int64_t from, int64_t to) {
        switch (dtype) {
            case DType::f32: return sum(where, static_cast<const float*>(x), mask, out, from, to);
            case DType::bf16: return sum(where, static_cast<const bf16*>(x), mask, out, from, to);
            case DType::f16: return sum(where, static_cast<const f16*>(x), mask, out, from, to);
        }
    });
}

}  // namespace

const SequenceSumKernels sequence_sum = {forward};

}  // namespace rlhf_fast::cpu
