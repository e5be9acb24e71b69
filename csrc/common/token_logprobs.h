// token_logprobs, as every backend offers it. Besides the whole op there are its steps, so that a row may arrive in
// blocks of columns (linear_token_logprobs makes one block of logits after another) and still give the bits that it
// gives whole.
#pragma once

#include "common/logits.h"
#include "common/run.h"

namespace rlhf_fast {

// Arrays of one float a row.
struct TokenLogprobs {
    float* logprobs;
    float* entropy;
    float* shift;  // the largest z, for the gradient; null in a forward that none will follow
    float* sum;    // of exp(z - shift), likewise
};

struct TokenLogprobsKernels {
    // Masked rows get log-probability and entropy 0. states: as below, for all columns at once; the CPU needs none.
    void (*forward)(const Logits&, const Transform&, const Tokens&, const Mask&, void* states, int64_t states_per_row,
                    const TokenLogprobs& out, const Run&);

    // Folds a block of logits, whose column 0 is column first_column of the vocabulary, into the rows' states:
    // states_per_row of a layout of the backend's own for each row. The block with first_column 0 begins them.
    void (*update)(const Logits&, const Transform&, const Tokens&, const Mask&, int64_t first_column, void* states,
                   int64_t states_per_row, const Run&);

    void (*finish)(const void* states, int64_t states_per_row, int64_t rows, const Mask&, const TokenLogprobs& out,
                   const Run&);

    // The gradient of sum(grad_logprobs * logprobs + grad_entropy * entropy + grad_log_sum * log sum exp(z) + grad_each
    // * sum(z)) in each logit of a block, written to out: contiguous (rows, columns) of the logits' dtype. It may be
    // the logits' own memory. A null gradient counts as 0. Masked rows get 0.
    void (*gradient)(const Logits&, const Transform&, const Tokens&, const Mask&, int64_t first_column,
                     const TokenLogprobs& results, const float* grad_logprobs, const float* grad_entropy,
                     const float* grad_log_sum, const float* grad_each, void* out, const Run&);
};

// A state is 4 numbers. A block begins and, unless it is the last, ends at a multiple of a segment.
constexpr int kTokenLogprobsState = 4;

namespace cpu {
extern const TokenLogprobsKernels token_logprobs;
constexpr int64_t kTokenLogprobsSegment = 4096;  // columns; one state of doubles for the whole row
}  // namespace cpu

namespace cuda {
extern const TokenLogprobsKernels token_logprobs;
constexpr int64_t kTokenLogprobsSegment = 8192;  // columns; one state of floats for each segment of a row
}  // namespace cuda

}  // namespace rlhf_fast
