// The losses of pairs in CUDA C++: one block goes through all pairs, in one launch; bound by that.
#include "common/pair_loss.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"

namespace rlhf_fast::cuda {
namespace {

template <class T>
__device__ inline double read(const void* data, int64_t i) {
    return data == nullptr ? 0.0 : static_cast<double>(widen(static_cast<const T*>(data)[i]));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(PairInputs in, PairOptions o, const float* there, double number, PairResults out) {
    __shared__ double scratch[kWarps];
    const double kl = in.kl != nullptr ? *in.kl : 0.0;
    double sums[kPairSums] = {};
    for (int64_t i = threadIdx.x; i < in.count; i += kThreads) {
        float in_chosen = 0.0f, in_rejected = 0.0f;
        const double weight = in.weights != nullptr ? in.weights[i] : 1.0;
        const double margin = in.margins != nullptr && weight != 0.0 ? in.margins[i] : 0.0;
        if (weight != 0.0)
            add_pair(o, read<T>(in.chosen, i), read<T>(in.rejected, i), read<T>(in.ref_chosen, i),
                     read<T>(in.ref_rejected, i), margin, kl, weight, sums, &in_chosen, &in_rejected);
        if (out.grad_chosen != nullptr) out.grad_chosen[i] = in_chosen;
        if (out.grad_rejected != nullptr) out.grad_rejected[i] = in_rejected;
    }
#pragma unroll
    for (int s = 0; s < kPairSums; ++s) {
        __syncthreads();
        sums[s] = reduce_block(sums[s], Sum(), scratch);
    }
    if (threadIdx.x == 0)
        pair_stats(sums, there != nullptr ? *there : number != 0.0 ? number : sums[kPairWeight], out.stats);
}

void forward(const PairInputs& in, const PairOptions& o, const float* there, double number, const PairResults& out,
             const Run& run) {
    const OnDevice guard(run);
    with_element(in.dtype, [&](auto element) {
        using T = decltype(element);
        RLHF_FAST_LAUNCH(forward_kernel<T>, 1, kThreads, stream_of(run), in, o, there, number, out);
    });
    check(cudaGetLastError(), "pair_loss: forward");
}

}  // namespace

const PairLossKernels pair_loss = {forward};

}  // namespace rlhf_fast::cuda
