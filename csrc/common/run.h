// Where and how a kernel runs, the same for every backend.
#pragma once

namespace rlhf_fast {

struct Run {
    int threads;   // CPU: at most this many
    int device;    // CUDA: the device's index
    void* stream;  // CUDA: a cudaStream_t; 0 is the default stream
};

}  // namespace rlhf_fast
