// sequence_sum on the CPU: a loop in double, in order, each sequence on one thread.
#include "common/sequence_sum.h"

#include "common/parallel.h"

namespace rlhf_fast::cpu {
namespace {

template <class T>
void sum(const Sequences& where, const T* x, const bool* mask, float* out, int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
        double total = 0.0;
        for (int64_t i = where.begin(b); i < where.begin(b + 1); ++i)
            if (mask == nullptr || mask[i]) total += to_float(x[i]);
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
