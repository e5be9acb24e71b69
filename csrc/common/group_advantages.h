// group_advantages, as every backend offers them: the rewards of a prompt's responses beside each other. Groups are
// small, so all of it is in double.
#pragma once

#include <cmath>

#include "common/dtypes.h"
#include "common/run.h"
#include "common/sequences.h"

namespace rlhf_fast {

enum class GroupKind : int { grpo, dr_grpo, rloo };

struct GroupInputs {
    Sequences groups;
    const void* rewards;
    DType dtype;
    const bool* mask;  // null: every response counts
    GroupKind kind;
    double eps;
};

// Of one response, from how many of its group count, the sum of their rewards, and that of the squares of their
// deviations. Alone in its group it says nothing: 0.
RLHF_FAST_HOST_DEVICE inline float group_advantage(GroupKind kind, double eps, double reward, double n, double sum,
                                                   double squares) {
    if (n < 2.0) return 0.0f;
    if (kind == GroupKind::rloo) return static_cast<float>(reward - (sum - reward) / (n - 1.0));
    const double apart = reward - sum / n;
    return static_cast<float>(kind == GroupKind::grpo ? apart / (sqrt(squares / (n - 1.0)) + eps) : apart);
}

struct GroupAdvantagesKernels {
    void (*forward)(const GroupInputs&, float* out, const Run&);
};

namespace cpu {
extern const GroupAdvantagesKernels group_advantages;
}

namespace cuda {
extern const GroupAdvantagesKernels group_advantages;
}

}  // namespace rlhf_fast
