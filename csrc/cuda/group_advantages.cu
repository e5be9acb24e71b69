// group_advantages in CUDA C++: a warp a group, in one launch, which is what bounds it.
#include "common/group_advantages.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"

namespace rlhf_fast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(GroupInputs in, float* out) {
    const int64_t g = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (g >= in.groups.count) return;
    const T* const rewards = static_cast<const T*>(in.rewards);
    const int64_t begin = in.groups.begin(g) + threadIdx.x % 32, end = in.groups.begin(g + 1);
    double n = 0.0, sum = 0.0, squares = 0.0;
    for (int64_t i = begin; i < end; i += 32) {
        if (in.mask != nullptr && !in.mask[i]) continue;
        n += 1.0;
        sum += widen(rewards[i]);
    }
    n = reduce_warp(n, Sum());
    sum = reduce_warp(sum, Sum());
    const double mean = n > 0.0 ? sum / n : 0.0;
    for (int64_t i = begin; i < end; i += 32) {
        if (in.mask != nullptr && !in.mask[i]) continue;
        const double apart = widen(rewards[i]) - mean;
        squares += apart * apart;
    }
    squares = reduce_warp(squares, Sum());
    for (int64_t i = begin; i < end; i += 32) {
        const bool counts = in.mask == nullptr || in.mask[i];
        out[i] = counts ? group_advantage(in.kind, in.eps, widen(rewards[i]), n, sum, squares) : 0.0f;
    }
}

void forward(const GroupInputs& in, float* out, const Run& run) {
    const OnDevice guard(run);
    with_element(in.dtype, [&](auto element) {
        using T = decltype(element);
        RLHF_FAST_LAUNCH(forward_kernel<T>, grid((in.groups.count + kWarps - 1) / kWarps), kThreads, stream_of(run), in,
                         out);
    });
    check(cudaGetLastError(), "group_advantages: forward");
}

}  // namespace

const GroupAdvantagesKernels group_advantages = {forward};

}  // namespace rlhf_fast::cuda
