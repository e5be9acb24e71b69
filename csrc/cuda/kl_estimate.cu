// kl_estimate in CUDA C++: elementwise, 16 bytes of each input at a time; bound by memory, and below a million tokens
// by the launch.
#include "common/kl_estimate.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/sampled_kl.cuh"

namespace rlhf_fast::cuda {
namespace {

// A thread's kVector<T> elements from i: log p - log q, 0 where masked.
template <class T>
__device__ inline void load_d(const T* logprobs, const T* ref_logprobs, int64_t i, int64_t count, const bool* mask,
                              bool wide, float (&d)[kVector<T>]) {
    float p[kVector<T>], q[kVector<T>];
    load(logprobs, i, count, 1, wide, p);
    load(ref_logprobs, i, count, 1, wide, q);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) d[j] = i + j < count && (mask == nullptr || mask[i + j]) ? p[j] - q[j] : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const T* logprobs, const T* ref_logprobs, int64_t count,
                                                           const bool* mask, Estimate kind, float* out) {
    const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector<T>;
    if (i >= count) return;
    float d[kVector<T>];
    load_d(logprobs, ref_logprobs, i, count, mask, aligned16(logprobs) && aligned16(ref_logprobs), d);
    float values[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) values[j] = estimate(kind, d[j]);
    store_floats<T>(out, i, count, values);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const T* logprobs, const T* ref_logprobs, int64_t count, const bool* mask, Estimate kind,
                    const float* grad, T* out, T* ref_out) {
    const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector<T>;
    if (i >= count) return;
    float d[kVector<T>], g[kVector<T>], minus_g[kVector<T>];
    load_d(logprobs, ref_logprobs, i, count, mask, aligned16(logprobs) && aligned16(ref_logprobs), d);
#pragma unroll
    for (int j = 0; j < kVector<T>; j += kVector<float>) {
        float upstream[kVector<float>];
        load(grad, i + j, count, 1, aligned16(grad), upstream);
#pragma unroll
        for (int k = 0; k < kVector<float>; ++k) {
            const bool counts = i + j + k < count && (mask == nullptr || mask[i + j + k]);
            g[j + k] = counts ? upstream[k] * slope(kind, d[j + k]) : 0.0f;
            minus_g[j + k] = -g[j + k];
        }
    }
    if (out != nullptr) store(out, i, count, aligned16(out), g);
    if (ref_out != nullptr) store(ref_out, i, count, aligned16(ref_out), minus_g);
}

template <class T>
unsigned int blocks_for(int64_t count) {
    return grid((count + kThreads * kVector<T> - 1) / (kThreads * kVector<T>));
}

void forward(const void* logprobs, const void* ref_logprobs, DType dtype, int64_t count, const bool* mask,
             Estimate kind, float* out, const Run& run) {
    const OnDevice guard(run);
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        RLHF_FAST_LAUNCH(forward_kernel<T>, blocks_for<T>(count), kThreads, stream_of(run),
                         static_cast<const T*>(logprobs), static_cast<const T*>(ref_logprobs), count, mask, kind, out);
    });
    check(cudaGetLastError(), "kl_estimate: forward");
}

void gradient(const void* logprobs, const void* ref_logprobs, DType dtype, int64_t count, const bool* mask,
              Estimate kind, const float* grad, void* out, void* ref_out, const Run& run) {
    const OnDevice guard(run);
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        RLHF_FAST_LAUNCH(gradient_kernel<T>, blocks_for<T>(count), kThreads, stream_of(run),
                         static_cast<const T*>(logprobs), static_cast<const T*>(ref_logprobs), count, mask, kind, grad,
                         static_cast<T*>(out), static_cast<T*>(ref_out));
    });
    check(cudaGetLastError(), "kl_estimate: gradient");
}

}  // namespace

const KLEstimateKernels kl_estimate = {forward, gradient};

}  // namespace rlhf_fast::cuda
