// How a kernel is launched: on the caller's device and stream, without waiting, its error raised at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/run.h"

// One macro for all launches, so that a build without a GPU can run kernels on the CPU by giving it another meaning.
#if !defined(RLHF_FAST_LAUNCH)
#define RLHF_FAST_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace rlhf_fast::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes the run's device the current one for as long as it lives.
class OnDevice {
  public:
    explicit OnDevice(const Run& run) : device_(run.device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
    }
    ~OnDevice() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int device_, before_ = 0;
};

inline cudaStream_t stream_of(const Run& run) { return static_cast<cudaStream_t>(run.stream); }

inline unsigned int grid(int64_t blocks) {
    if (blocks > INT32_MAX)
        throw std::runtime_error("cuda: " + std::to_string(blocks) + " blocks are more than a grid has");
    return static_cast<unsigned int>(blocks);
}

}  // namespace rlhf_fast::cuda
