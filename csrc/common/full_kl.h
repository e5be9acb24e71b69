// full_kl, as every backend offers it: a divergence between two rows of logits over the whole vocabulary.
#pragma once

#include "common/logits.h"
#include "common/run.h"

namespace rlhf_fast {

enum class Divergence : int {
    kl = 0,  // sum p (log p - log q); the reverse one is this with p and q exchanged
    js = 1,  // Jensen-Shannon: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2
};

// Arrays of one float a row; all but the first are kept for the gradient.
//
// kl: mean_q is z_q of p's likeliest word, and mean_p + rest_p the mean under p of (z_p - shift_p) - (z_q - mean_q), in
// two floats. Measured from there, the terms that weigh most are the smallest, and what their roundings do is small.
// js: mean_p is KL(p || m) and rest_p is KL(p || m) - log 2, each with the digits that the other lacks; likewise q.
struct FullKL {
    float* divergence;
    float* shift_p;  // the largest z of p
    float* sum_p;    // of exp(z - shift_p)
    float* shift_q;
    float* sum_q;
    float* mean_p;
    float* rest_p;
    float* mean_q;
    float* rest_q;
};

struct FullKLKernels {
    // p and q have the same rows and columns. scratch: states of the backend's own, or null where it needs none. Masked
    // rows get divergence 0.
    void (*forward)(const Logits& p, const Logits& q, const Transform&, const Mask&, Divergence, float* scratch,
                    const FullKL& out, const Run&);

    // The gradient of sum(grad * divergence) in each logit of p and of q, contiguous (rows, columns) of their dtype;
    // one of the two may be null and is then not computed. Masked rows get 0.
    void (*gradient)(const Logits& p, const Logits& q, const Transform&, const Mask&, Divergence, const FullKL& results,
                     const float* grad, void* out_p, void* out_q, const Run&);
};

namespace cpu {
extern const FullKLKernels full_kl;
}

namespace cuda {
extern const FullKLKernels full_kl;
constexpr int64_t kFullKLSegment = 4096;  // columns; one state for each segment of a row
constexpr int kFullKLState = 6;           // floats
}  // namespace cuda

}  // namespace rlhf_fast
