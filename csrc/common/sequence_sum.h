// sequence_sum, as every backend offers it: the sum of each sequence's elements that count, in double.
#pragma once

#include "common/dtypes.h"
#include "common/run.h"
#include "common/sequences.h"

namespace rlhf_fast {

struct SequenceSumKernels {
    void (*forward)(const Sequences&, const void* x, DType, const bool* mask, float* out, const Run&);
};

namespace cpu {
extern const SequenceSumKernels sequence_sum;
}

namespace cuda {
extern const SequenceSumKernels sequence_sum;
}

}  // namespace rlhf_fast
