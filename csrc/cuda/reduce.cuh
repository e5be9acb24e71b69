// Reductions over a block, in one fixed tree: lanes 16, 8, 4, 2, 1 apart, then the warps the same way.
#pragma once

#include <cuda_runtime.h>

namespace rlhf_fast::cuda {

constexpr int kWarps = 8;  // of a block of 256 threads
constexpr unsigned kAllLanes = 0xffffffffu;

struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }  // nan is left out
};
struct Sum {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

template <class T, class Combine>
__device__ inline T reduce_warp(T x, const Combine& combine) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, apart));
    return x;
}

// The same value for every thread. `scratch` (kWarps of them, shared) may be used again after the next __syncthreads().
template <class T, class Combine>
__device__ inline T reduce_block(T x, const Combine& combine, T* scratch) {
    x = reduce_warp(x, combine);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[threadIdx.x % kWarps];
#pragma unroll
    for (int apart = kWarps / 2; apart > 0; apart /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, apart));
    return x;
}

}  // namespace rlhf_fast::cuda
