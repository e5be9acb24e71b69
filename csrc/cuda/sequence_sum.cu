// sequence_sum in CUDA C++: a block a sequence, its sum in a fixed tree; bound by memory for long ones, by the launch
// for others.
#include "common/sequence_sum.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"

namespace rlhf_fast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(Sequences where, const T* x, const bool* mask, float* out) {
    __shared__ double scratch[kWarps];
    const int64_t b = blockIdx.x, end = where.begin(b + 1);
    double mine = 0.0;
    for (int64_t i = where.begin(b) + threadIdx.x; i < end; i += kThreads)
        if (mask == nullptr || mask[i]) mine += widen(x[i]);
    const double all = reduce_block(mine, Sum(), scratch);
    if (threadIdx.x == 0) out[b] = static_cast<float>(all);
}

void forward(const Sequences& where, const void* x, DType dtype, const bool* mask, float* out, const Run& run) {
    const OnDevice guard(run);
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        RLHF_FAST_LAUNCH(forward_kernel<T>, grid(where.count), kThreads, stream_of(run), where,
                         static_cast<const T*>(x), mask, out);
    });
    check(cudaGetLastError(), "sequence_sum: forward");
}

}  // namespace

const SequenceSumKernels sequence_sum = {forward};

}  // namespace rlhf_fast::cuda
