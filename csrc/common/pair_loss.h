// The losses of pairs, dpo_loss and reward_loss, as every backend offers them: per pair a loss of two rewards, its
// gradients and statistics. A batch has tens of pairs, so all of it is in double and nothing is bound by anything but
// the call.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtypes.h"
#include "common/run.h"

namespace rlhf_fast {

struct PairInputs {  // count elements of dtype each; the last two may be null, for 0
    const void *chosen, *rejected, *ref_chosen, *ref_rejected;
    DType dtype;
    int64_t count;
    const float* margins;  // by how much chosen should win; null: 0
    const float* weights;  // of a pair; where 0, it is not read; null: 1
    const float* kl;       // one number, for kto
};

enum class PairLoss : int { logistic, hinge, ipo, kto };

struct PairOptions {
    PairLoss kind;
    double beta;
    double agree, differ;  // of the logistic loss of the difference, and of its negative
    double center_coef;
};

// What is summed up over the pairs, with their weights.
enum PairSum : int { kPairLoss, kPairWins, kPairDifference, kPairChosen, kPairRejected, kPairWeight, kPairSums };
constexpr int kPairStats = 6;  // loss, accuracy, margin, chosen_reward, rejected_reward, 1 / divisor

struct PairResults {
    float* stats;
    float *grad_chosen, *grad_rejected;  // of the sum of the pairs' losses
};

struct PairTerms {
    double loss, chosen, rejected;  // the loss, and its gradients in the two rewards
};

RLHF_FAST_HOST_DEVICE inline double softplus(double x) { return (x > 0.0 ? x : 0.0) + log1p(exp(-fabs(x))); }

RLHF_FAST_HOST_DEVICE inline double sigmoid(double x) {
    const double e = exp(-fabs(x));
    return (x < 0.0 ? e : 1.0) / (1.0 + e);
}

// Of beta (chosen - ref_chosen) and beta (rejected - ref_rejected).
RLHF_FAST_HOST_DEVICE inline PairTerms pair_terms(const PairOptions& o, double chosen, double rejected, double margin,
                                                  double kl) {
    const double x = chosen - rejected - margin;
    double loss = 0.0, slope = 0.0;
    switch (o.kind) {
        case PairLoss::logistic:
            loss = o.agree * softplus(-x) + o.differ * softplus(x);
            slope = o.differ * sigmoid(x) - o.agree * sigmoid(-x);
            break;
        case PairLoss::hinge:
            loss = x >= 1.0 ? 0.0 : 1.0 - x;  // nan stays nan
            slope = x >= 1.0 ? 0.0 : -1.0;
            break;
        case PairLoss::ipo: {
            const double apart = (x - 0.5) / o.beta;
            loss = apart * apart;
            slope = 2.0 * apart / o.beta;
            break;
        }
        case PairLoss::kto: {
            const double worse = sigmoid(o.beta * kl - chosen), better = sigmoid(rejected - o.beta * kl);
            return {0.5 * (worse + better), -0.5 * worse * (1.0 - worse), 0.5 * better * (1.0 - better)};
        }
    }
    return {loss, slope, -slope};
}

// One pair's share of the sums, and its gradients in chosen and rejected.
RLHF_FAST_HOST_DEVICE inline void add_pair(const PairOptions& o, double chosen, double rejected, double ref_chosen,
                                           double ref_rejected, double margin, double kl, double weight, double* sums,
                                           float* in_chosen, float* in_rejected) {
    const double better = o.beta * (chosen - ref_chosen), worse = o.beta * (rejected - ref_rejected);
    const PairTerms terms = pair_terms(o, better, worse, margin, kl);
    const double both = chosen + rejected, pull = 2.0 * o.center_coef * both;
    sums[kPairLoss] += weight * (terms.loss + (o.center_coef != 0.0 ? o.center_coef * both * both : 0.0));
    sums[kPairWins] += weight * (better > worse ? 1.0 : better == worse ? 0.5 : 0.0);
    sums[kPairDifference] += weight * (better - worse);
    sums[kPairChosen] += weight * better;
    sums[kPairRejected] += weight * worse;
    sums[kPairWeight] += weight;
    *in_chosen = static_cast<float>(weight * (o.beta * terms.chosen + pull));
    *in_rejected = static_cast<float>(weight * (o.beta * terms.rejected + pull));
}

RLHF_FAST_HOST_DEVICE inline void pair_stats(const double* sums, double divisor, float* stats) {
    divisor = divisor == 0.0 ? 1.0 : divisor;
    for (int s = 0; s < kPairWeight; ++s) stats[s] = static_cast<float>(sums[s] / divisor);
    stats[kPairWeight] = static_cast<float>(1.0 / divisor);
}

struct PairLossKernels {
    // `there` divides if it is not null, else `number` if that is not 0, else the sum of the weights.
    void (*forward)(const PairInputs&, const PairOptions&, const float* there, double number, const PairResults&,
                    const Run&);
};

namespace cpu {
extern const PairLossKernels pair_loss;
}

namespace cuda {
extern const PairLossKernels pair_loss;
}

}  // namespace rlhf_fast
