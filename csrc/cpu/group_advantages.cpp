// group_advantages on the CPU: loops in double, in order, each group on one thread; bound by the call.
#include "common/group_advantages.h"

#include "common/parallel.h"

namespace rlhf_fast::cpu {
namespace {

template <class T>
void groups(const GroupInputs& in, float* out, int64_t from, int64_t to) {
    const T* const rewards = static_cast<const T*>(in.rewards);
    for (int64_t g = from; g < to; ++g) {
        const int64_t begin = in.groups.begin(g), end = in.groups.begin(g + 1);
        double n = 0.0, sum = 0.0, squares = 0.0;
        const auto for_each = [&](const auto& body) {
            for (int64_t i = begin; i < end; ++i)
                if (in.mask == nullptr || in.mask[i]) body(i, static_cast<double>(to_float(rewards[i])));
        };
        for_each([&](int64_t, double reward) {
            n += 1.0;
            sum += reward;
        });
        for_each([&](int64_t, double reward) {
            const double apart = reward - sum / n;
            squares += apart * apart;
        });
        for (int64_t i = begin; i < end; ++i) out[i] = 0.0f;
        for_each([&](int64_t i, double reward) { out[i] = group_advantage(in.kind, in.eps, reward, n, sum, squares); });
    }
}

void forward(const GroupInputs& in, float* out, const Run& run) {
    const int64_t count = in.groups.count;
    const int64_t each = count > 0 ? 8 * ((in.groups.begin(count) - in.groups.begin(0)) / count + 1) : 1;
    parallel_rows(count, each, run.threads, [&](int64_t from, int64_t to) {
        switch (in.dtype) {
            case DType::f32: return groups<float>(in, out, from, to);
            case DType::bf16: return groups<bf16>(in, out, from, to);
            case DType::f16: return groups<f16>(in, out, from, to);
        }
    });
}

}  // namespace

const GroupAdvantagesKernels group_advantages = {forward};

}  // namespace rlhf_fast::cpu
