// sample, as every backend offers it: a token for each row of logits, with what is known of the distribution.
#pragma once

#include "common/dtypes.h"
#include "common/run.h"

namespace rlhf_fast {

// Row r keeps, of softmax(logits / temperature), the top_k likeliest tokens (0: all); of what these weigh, the
// likeliest that reach a share of top_p (1: all); and those at least min_p as likely as the likeliest (0: all). Equals
// rank by number. The token is where uniform, in [0, 1), lies in the cumulative distribution of those. Temperature 0
// takes the likeliest, of softmax(logits).
struct SampleInputs {
    const void* logits;  // (rows, columns), each row contiguous
    DType dtype;
    int64_t rows, columns, row_stride;
    const float* temperature;  // each (rows,)
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const double* uniform;
};

struct Samples {
    int64_t* tokens;  // -1 where there is no distribution: nan, inf, or nothing but -inf
    float* logprobs;  // under softmax(logits / temperature), nothing cut
    float* kept;      // the probability of all that was not cut
    float* entropy;   // of softmax(logits / temperature)
};

struct SampleKernels {
    void (*forward)(const SampleInputs&, const Samples&, const Run&);
};

namespace cpu {
extern const SampleKernels sample;
}
namespace cuda {
extern const SampleKernels sample;
}

}  // namespace rlhf_fast
