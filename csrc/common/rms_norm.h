// rms_norm, as every backend offers it: each row divided by its root mean square and multiplied by offset + weight.
#pragma once

#include "common/dtypes.h"
#include "common/run.h"

namespace rlhf_fast {

struct RMSNormProblem {
    const void* x;  // (rows, columns), each row contiguous
    int64_t x_stride;
    const void* weight;  // (columns,)
    void* out;           // (rows, columns), contiguous
    DType dtype;         // of all three
    int64_t rows, columns;
    float eps, offset;
};

struct RMSNormKernels {
    void (*forward)(const RMSNormProblem&, const Run&);
};

namespace cpu {
extern const RMSNormKernels rms_norm;
}

}  // namespace rlhf_fast
