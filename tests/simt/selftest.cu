// What the shim promises, tried by kernels small enough to be checked by hand. Prints one line a check: its name and 1
// or 0.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <stdexcept>
#include <vector>

namespace {

void report(const char* name, bool right) { std::printf("%s %d\n", name, right); }

template <class F>
bool throws(const F& f, const char* part) {
    try {
        f();
    } catch (const std::runtime_error& error) {
        return std::strstr(error.what(), part) != nullptr;
    }
    return false;
}

// Sums of 0..n-1 by shared memory, across warps, with a barrier between the writes and the reads.
__global__ void reverse_through_shared(const int* in, int* out) {
    __shared__ int shared[96];
    shared[threadIdx.x] = in[blockIdx.x * 96 + threadIdx.x];
    __syncthreads();
    out[blockIdx.x * 96 + threadIdx.x] = shared[95 - threadIdx.x];
}

__global__ void reverse_without_a_barrier(const int* in, int* out) {
    __shared__ int shared[96];
    shared[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = shared[95 - threadIdx.x];
}

__global__ void shuffles(int* out) {
    const int lane = static_cast<int>(threadIdx.x % 32), value = static_cast<int>(threadIdx.x);
    int* mine = out + threadIdx.x * 8;
    mine[0] = __shfl_xor_sync(0xffffffffu, value, 5);
    mine[1] = __shfl_down_sync(0xffffffffu, value, 3);
    mine[2] = __shfl_up_sync(0xffffffffu, value, 3);
    mine[3] = __shfl_sync(0xffffffffu, value, 7);
    mine[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
    mine[5] = __any_sync(0xffffffffu, lane == 31);
    mine[6] = __all_sync(0xffffffffu, lane < 31);
    mine[7] = static_cast<int>(2.0 * __shfl_xor_sync(0xffffffffu, 0.5 * value, 16));
}

__global__ void count(int* total, int* largest) {
    atomicAdd(total, 1);
    atomicMax(largest, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}

__global__ void where(int* out) {
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

__global__ void some_leave_early(int* out) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    atomicAdd(out, 1);
}

__global__ void half_of_a_warp_waits(int* out) {
    if (threadIdx.x < 16) __syncthreads();
    else __syncwarp();
    *out = 1;
}

__global__ void vectors(const float4* in, float4* out) {
    const float4 v = __ldcs(in + threadIdx.x);
    __stcs(out + threadIdx.x, make_float4(v.w, v.z, v.y, v.x));
}

__global__ void halves(float* out) {
    out[0] = __bfloat162float(__float2bfloat16_rn(1.00390625f));  // a tie, to even
    out[1] = __half2float(__float2half_rn(65520.0f));
}

}  // namespace

int main() {
    std::vector<int> in(192), out(192);
    for (int i = 0; i < 192; ++i) in[i] = i;
    bool right = true;
    for (int repeat = 0; repeat < 2; ++repeat) {  // once in either order of threads
        RLHF_FAST_LAUNCH(reverse_through_shared, 2, 96, nullptr, in.data(), out.data());
        for (int i = 0; i < 192; ++i) right = right && out[i] == i / 96 * 96 + 95 - i % 96;
    }
    report("barrier", right);

    std::vector<int> first(96), second(96);
    RLHF_FAST_LAUNCH(reverse_without_a_barrier, 1, 96, nullptr, in.data(), first.data());
    RLHF_FAST_LAUNCH(reverse_without_a_barrier, 1, 96, nullptr, in.data() + 96, second.data());
    right = true;
    for (int i = 0; i < 96; ++i) right = right && first[i] + 96 == second[i];
    report("missing_barrier_shows", !right);

    std::vector<int> lanes(64 * 8);
    RLHF_FAST_LAUNCH(shuffles, 1, 64, nullptr, lanes.data());
    right = true;
    for (int i = 0; i < 64; ++i) {
        const int* mine = &lanes[i * 8];
        const int lane = i % 32, warp = i - lane;
        unsigned thirds = 0;
        for (int j = 0; j < 32; j += 3) thirds |= 1u << j;
        right = right && mine[0] == warp + (lane ^ 5) && mine[1] == (lane + 3 < 32 ? i + 3 : i) &&
                mine[2] == (lane >= 3 ? i - 3 : i) && mine[3] == warp + 7 && static_cast<unsigned>(mine[4]) == thirds &&
                mine[5] == 1 && mine[6] == 0 && mine[7] == warp + (lane ^ 16);
    }
    report("shuffles_and_votes", right);

    int total = 0, largest = -1;
    RLHF_FAST_LAUNCH(count, 5, 33, nullptr, &total, &largest);
    report("atomics", total == 165 && largest == 164);

    std::vector<int> places(2 * 3 * 2 * 4 * 5 * 2);
    RLHF_FAST_LAUNCH(where, dim3(2, 3, 2), dim3(4, 5, 2), nullptr, places.data());
    right = true;
    for (int visits : places) right = right && visits == 1;
    report("dimensions", right);

    int left = 0;
    RLHF_FAST_LAUNCH(some_leave_early, 1, 64, nullptr, &left);
    report("early_exit", left == 40);
    int flag = 0;
    report("deadlock_is_told",
           throws([&] { RLHF_FAST_LAUNCH(half_of_a_warp_waits, 1, 32, nullptr, &flag); }, "deadlock"));

    alignas(16) float four[9] = {1, 2, 3, 4}, turned[8] = {};
    RLHF_FAST_LAUNCH(vectors, 1, 1, nullptr, reinterpret_cast<float4*>(four), reinterpret_cast<float4*>(turned));
    report("vectors", turned[0] == 4 && turned[3] == 1);
    report("misaligned_is_told", throws(
                                     [&] {
                                         RLHF_FAST_LAUNCH(vectors, 1, 1, nullptr, reinterpret_cast<float4*>(four + 1),
                                                          reinterpret_cast<float4*>(turned));
                                     },
                                     "misaligned"));
    float narrow[2];
    RLHF_FAST_LAUNCH(halves, 1, 1, nullptr, narrow);
    report("toolkit_halves", narrow[0] == 1.0f && std::isinf(narrow[1]));

    RLHF_FAST_LAUNCH(count, 1, 2000, nullptr, &total, &largest);
    report("too_many_threads",
           cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
}
