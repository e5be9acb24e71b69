// gae, as every backend offers it. Over the tokens of a sequence that count, from the last to the first:
//     delta = r - V + gamma V_next,  A = delta + gamma lam A_next,  return = V + (A with critic_lam in place of lam).
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/run.h"
#include "common/sequences.h"

namespace rlhf_fast {

// What a token is paid: rewards - kl_coef (logprobs - ref_logprobs), and the score on the last token that counts.
struct TokenRewards {
    const void* rewards;       // null: 0
    const void* logprobs;      // null: no penalty
    const void* ref_logprobs;  // with logprobs
    const float* scores;       // one a sequence; null: 0
    float kl_coef;
};

struct GAEInputs {
    Sequences sequences;
    TokenRewards paid;
    const void* values;
    DType dtype;             // of rewards, logprobs, ref_logprobs and values
    const bool* mask;        // null: every token counts
    const float* bootstrap;  // V after each sequence's last token that counts; null: 0
    float gamma, lam, critic_lam;
};

struct GAE {
    float* advantages;
    float* returns;
    double* sums;  // (sequences, 3): how many tokens count, sum and sum of squares of their advantages; may be null
};

struct GAEKernels {
    void (*forward)(const GAEInputs&, const GAE&, const Run&);
};

namespace cpu {
extern const GAEKernels gae;
}

namespace cuda {
extern const GAEKernels gae;
}

}  // namespace rlhf_fast
