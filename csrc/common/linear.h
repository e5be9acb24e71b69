// linear, as every backend offers it: the rows of x times several weights that read the same rows.
//
//     out_p[m, n] = scale_p * (x[m] . weight_p[n] + low_p[m] . up_p[n] + bias_p[n]) + add_p[m, n]
//
// A row's results never depend on the other rows: each is one sum in one fixed order, however many rows there are.
// bench/ops/bench_linear.py times it; made for the few rows of decoding, where products are bound by reading weights.
#pragma once

#include "common/dtypes.h"
#include "common/run.h"

namespace rlhf_fast {

struct LinearPart {
    const void* weight;     // (rows, K), each row contiguous
    int64_t weight_stride;  // elements from row to row
    int64_t rows;
    const void* bias;  // (rows,) or null
    const void* low;   // (M, rank), contiguous: x times the first factor of a low-rank adapter, or null
    const void* up;    // (rows, rank), contiguous: its second factor
    int64_t rank;
    float scale;
    const void* add;     // (M, rows), each row contiguous, or null
    int64_t add_stride;  // elements from row to row
    void* out;           // (M, rows), each row contiguous
    int64_t out_stride;  // elements from row to row
};

constexpr int kLinearParts = 3;

struct LinearProblem {
    const void* x;  // (M, K), each row contiguous
    int64_t x_stride;
    DType dtype;  // of everything
    int64_t m, k;
    LinearPart parts[kLinearParts];
    int count;
    int gate;  // 0: none; else there are two parts, and out_0 = f(y_0) * y_1 with f = 1: SiLU, 2: GELU by tanh
};

struct LinearKernels {
    void (*forward)(const LinearProblem&, const Run&);
};

namespace cpu {
extern const LinearKernels linear;
}

}  // namespace rlhf_fast
