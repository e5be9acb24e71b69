// CUDA kernels on the CPU, for tests: the same .cu files, compiled by a C++ compiler that finds this header in place of
// the toolkit's cuda_runtime.h (cuda_bf16.h and cuda_fp16.h stay the toolkit's own, which also work on a host).
//
// A block runs as fibers, one a thread, that give way to each other where CUDA threads wait: at __syncthreads and at
// warp operations. Blocks run one after another, so __shared__ is static memory. Every other launch takes the threads
// of its blocks in reverse order: a kernel that depends on that order between two barriers, for want of one, shows as
// different bits when a test calls it twice.
//
// Not modelled: time, memory spaces, alignment faults, more than one block at a time. Launches return at once with an
// error for the same reasons that CUDA has (a block of no or too many threads), and throw std::runtime_error on a
// deadlock.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <vector_functions.h>
#include <vector_types.h>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __forceinline__
#define __forceinline__ inline

namespace simt {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 128 * 1024;

// Where `expected` threads wait for each other; the last one to arrive lets all go on.
struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};

// One thread of the block that runs; then that of the next block, for a new stack costs more than most threads do.
struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};
    jmp_buf state;
    bool started = false;
    uint3 thread;
    int index = 0;
    bool done = false;
};

struct Warp {
    Barrier barrier;
    int live = 0;
    uint64_t slots[2][kWarp];  // in turn: an operation fills one while slow lanes still read the other
};

struct Block {
    jmp_buf scheduler;
    int threads = 0;
    std::vector<Warp> warps;
    Barrier barrier;
    int live = 0;
    long progress = 0;  // grows whenever somebody arrives or ends; a round without it is a deadlock
    std::exception_ptr error;
    const std::function<void()>* body = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local Fiber* fiber = nullptr;
inline thread_local std::vector<std::unique_ptr<Fiber>> fibers;  // as many as the largest block so far
inline thread_local uint3 block_index;
inline thread_local dim3 block_size, grid_size;

// Between fibers by _longjmp, since swapcontext makes a system call each time.
inline void give_way() {
    if (_setjmp(fiber->state) == 0) _longjmp(block->scheduler, 1);
}

inline void wait(Barrier& barrier, const int& expected) {
    const unsigned generation = barrier.generation;
    ++block->progress;
    if (++barrier.arrived >= expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) {
        give_way();
        if (barrier.generation == generation && barrier.arrived >= expected) {  // the rest of them has ended
            barrier.arrived = 0;
            ++barrier.generation;
            ++block->progress;
        }
    }
}

inline Warp& own_warp() { return block->warps[static_cast<std::size_t>(fiber->index / kWarp)]; }
inline int lane() { return fiber->index % kWarp; }

inline void fiber_main() {
    for (;;) {
        try {
            (*block->body)();
        } catch (...) {
            block->error = std::current_exception();
        }
        fiber->done = true;
        --block->live;
        --own_warp().live;
        ++block->progress;
        give_way();
    }
}

// Let a fiber run until it gives way.
inline void resume(Fiber& next) {
    fiber = &next;
    if (_setjmp(block->scheduler) != 0) return;
    if (next.started) _longjmp(next.state, 1);
    next.started = true;
    ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = next.stack.get();
    first.uc_stack.ss_size = kStack;
    first.uc_link = nullptr;
    makecontext(&first, fiber_main, 0);
    setcontext(&first);
}

inline void run_block(Block& b, bool reverse) {
    const int threads = b.threads;
    b.warps.assign(static_cast<std::size_t>((threads + kWarp - 1) / kWarp), Warp());
    b.barrier = Barrier();
    b.live = threads;
    b.error = nullptr;
    for (int i = 0; i < threads; ++i) {
        Fiber& f = *fibers[static_cast<std::size_t>(i)];
        f.done = false;
        f.index = i;
        const unsigned x = block_size.x, y = block_size.y, u = static_cast<unsigned>(i);
        f.thread = make_uint3(u % x, u / x % y, u / x / y);
        ++b.warps[static_cast<std::size_t>(i / kWarp)].live;
    }
    while (b.live > 0) {
        const long before = b.progress;
        for (int i = 0; i < threads; ++i) {
            Fiber& f = *fibers[static_cast<std::size_t>(reverse ? threads - 1 - i : i)];
            if (f.done) continue;
            resume(f);
            if (b.error) std::rethrow_exception(b.error);
        }
        if (b.progress == before && b.live > 0) {
            throw std::runtime_error("simt: deadlock, " + std::to_string(b.live) +
                                     " threads wait for others that never come");
        }
    }
}

inline thread_local cudaError_t last_error = cudaSuccess;

inline void launch(dim3 grid, dim3 threads, const std::function<void()>& body) {
    const long count = static_cast<long>(threads.x) * threads.y * threads.z;
    const long blocks = static_cast<long>(grid.x) * grid.y * grid.z;
    if (count < 1 || count > 1024 || blocks < 1 || grid.y > 65535 || grid.z > 65535) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    Block b;
    b.threads = static_cast<int>(count);
    while (fibers.size() < static_cast<std::size_t>(count)) fibers.push_back(std::make_unique<Fiber>());
    b.body = &body;
    block = &b;
    block_size = threads;
    grid_size = grid;
    static thread_local bool reverse = false;
    reverse = !reverse;  // so that repeating a test runs it both ways
    for (long i = 0; i < blocks; ++i) {
        const unsigned u = static_cast<unsigned>(i);
        block_index = make_uint3(u % grid.x, u / grid.x % grid.y, u / grid.x / grid.y);
        try {
            run_block(b, reverse);
        } catch (...) {
            fibers.clear();  // some wait in the midst of this block
            throw;
        }
    }
    block = nullptr;
}

// Every lane's value in the slots, once all lanes have arrived.
template <class T>
inline const uint64_t* exchange(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Warp& warp = own_warp();
    uint64_t* slots = warp.slots[warp.barrier.generation % 2];
    std::memcpy(&slots[lane()], &value, sizeof value);
    wait(warp.barrier, warp.live);
    return slots;
}
template <class T>
inline T from_lane(const uint64_t* slots, int source) {
    T out;
    std::memcpy(&out, &slots[source], sizeof out);
    return out;
}

}  // namespace simt

// --- the language ----------------------------------------------------------------------------------------------------

#define threadIdx (simt::fiber->thread)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
constexpr int warpSize = simt::kWarp;

#define RLHF_FAST_LAUNCH(kernel, blocks, threads, stream, ...) \
    simt::launch(dim3(blocks), dim3(threads), [&] { kernel(__VA_ARGS__); })

inline void __syncthreads() { simt::wait(simt::block->barrier, simt::block->live); }
inline void __syncwarp(unsigned = 0xffffffffu) { simt::exchange(0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
inline T __shfl_sync(unsigned, T value, int source, int width = 32) {
    const int first = simt::lane() / width * width;
    return simt::from_lane<T>(simt::exchange(value), first + source % width);
}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int bits, int width = 32) {
    const int source = simt::lane() ^ bits;
    const bool inside = source / width <= simt::lane() / width && source < simt::kWarp;
    return simt::from_lane<T>(simt::exchange(value), inside ? source : simt::lane());
}
template <class T>
inline T __shfl_down_sync(unsigned, T value, unsigned apart, int width = 32) {
    const int source = simt::lane() + static_cast<int>(apart);
    return simt::from_lane<T>(simt::exchange(value), source / width == simt::lane() / width ? source : simt::lane());
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned apart, int width = 32) {
    const int within = simt::lane() % width, source = simt::lane() - static_cast<int>(apart);
    return simt::from_lane<T>(simt::exchange(value), within >= static_cast<int>(apart) ? source : simt::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const int live = simt::own_warp().live;
    const uint64_t* slots = simt::exchange(predicate != 0 ? 1 : 0);
    unsigned votes = 0;
    for (int i = 0; i < live; ++i) votes |= static_cast<unsigned>(simt::from_lane<int>(slots, i)) << i;
    return votes & mask;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// Fibers give way only at barriers, so an ordinary read and write is atomic.
template <class T>
inline T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = before + value;
    return before;
}
template <class T>
inline T atomicMax(T* address, T value) {
    const T before = *address;
    if (value > before) *address = value;
    return before;
}
template <class T>
inline T atomicMin(T* address, T value) {
    const T before = *address;
    if (value < before) *address = value;
    return before;
}
template <class T>
inline T atomicExch(T* address, T value) {
    const T before = *address;
    *address = value;
    return before;
}
template <class T>
inline T atomicCAS(T* address, T expected, T value) {
    const T before = *address;
    if (before == expected) *address = value;
    return before;
}

template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T __ldcs(const T* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) throw std::runtime_error("simt: misaligned load");
    return *p;
}
template <class T>
inline void __stcs(T* p, T value) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) throw std::runtime_error("simt: misaligned store");
    *p = value;
}

inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// --- the runtime, what launch.cuh uses of it; cuda_runtime_api.h has declared it
// ---------------------------------------

extern "C" inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
extern "C" inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
extern "C" inline cudaError_t cudaGetLastError() {
    const cudaError_t error = simt::last_error;
    simt::last_error = cudaSuccess;
    return error;
}
extern "C" inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "no error";
}
