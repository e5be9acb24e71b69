// The losses of pairs on the CPU: one loop, in double and in order, on one thread. A thousand pairs take some 60 us.
#include "common/pair_loss.h"

namespace rlhf_fast::cpu {
namespace {

template <class T>
void sweep(const PairInputs& in, const PairOptions& o, const PairResults& out, double* sums) {
    const auto read = [&](const void* data, int64_t i) {
        return data == nullptr ? 0.0 : static_cast<double>(to_float(static_cast<const T*>(data)[i]));
    };
    const double kl = in.kl != nullptr ? *in.kl : 0.0;
    for (int64_t i = 0; i < in.count; ++i) {
        float in_chosen = 0.0f, in_rejected = 0.0f;
        const double weight = in.weights != nullptr ? in.weights[i] : 1.0;
        const double margin = in.margins != nullptr && weight != 0.0 ? in.margins[i] : 0.0;
        if (weight != 0.0)
            add_pair(o, read(in.chosen, i), read(in.rejected, i), read(in.ref_chosen, i), read(in.ref_rejected, i),
                     margin, kl, weight, sums, &in_chosen, &in_rejected);
        if (out.grad_chosen != nullptr) out.grad_chosen[i] = in_chosen;
        if (out.grad_rejected != nullptr) out.grad_rejected[i] = in_rejected;
    }
}

void forward(const PairInputs& in, const PairOptions& o, const float* there, double number, const PairResults& out,
             const Run&) {
    double sums[kPairSums] = {};
    switch (in.dtype) {
        case DType::f32: sweep<float>(in, o, out, sums); break;
        case DType::bf16: sweep<bf16>(in, o, out, sums); break;
        case DType::f16: sweep<f16>(in, o, out, sums); break;
    }
    pair_stats(sums, there != nullptr ? *there : number != 0.0 ? number : sums[kPairWeight], out.stats);
}

}  // namespace

const PairLossKernels pair_loss = {forward};

}  // namespace rlhf_fast::cpu
