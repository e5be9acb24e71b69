// Runs the CPU kernels on calls read from standard input and writes their outputs to standard output, so that a program
// for another processor can be compared, bit by bit, with the module in this Python. tests/cpu/calls.py writes the
// calls.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/full_kl.h"
#include "common/gae.h"
#include "common/kl_estimate.h"
#include "common/ppo_loss.h"
#include "common/token_logprobs.h"

using namespace rlhf_fast;

namespace {

struct Call {
    int32_t op, dtype, kind, pad;
    int64_t rows, columns;
    float scale, softcap, temperature, unused;
};

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

template <class T>
std::vector<T> read_array(size_t count) {
    std::vector<T> out(count);
    if (!read(out.data(), count * sizeof(T))) std::exit(2);
    return out;
}

template <class T>
void write(const std::vector<T>& x) {
    std::fwrite(x.data(), sizeof(T), x.size(), stdout);
}

}  // namespace

int main() {
    const Run run = {1, 0, nullptr};
    for (Call call; read(&call, sizeof call);) {
        const DType dtype = static_cast<DType>(call.dtype);
        const size_t rows = static_cast<size_t>(call.rows), count = rows * static_cast<size_t>(call.columns);
        const size_t bytes = count * (dtype == DType::f32 ? 4 : 2);
        const std::vector<char> p = read_array<char>(bytes), q = read_array<char>(bytes);
        const std::vector<int64_t> tokens = read_array<int64_t>(rows);
        const std::vector<float> grad = read_array<float>(count), grad_2 = read_array<float>(rows);
        const auto logits = [&](const std::vector<char>& x) {
            return Logits{x.data(), dtype, call.rows, call.columns, call.rows, 0, call.columns, 1};
        };
        const Transform transform = {call.scale, call.softcap, call.temperature, nullptr};
        std::vector<std::vector<float>> results(9, std::vector<float>(call.op >= 2 ? count : rows));
        std::vector<char> gradient_p(bytes), gradient_q(bytes);
        const auto at = [&](int i) { return results[static_cast<size_t>(i)].data(); };
        if (call.op == 0) {
            const TokenLogprobs out = {at(0), at(1), at(2), at(3)};
            const Tokens of_rows = {tokens.data(), true};
            cpu::token_logprobs.forward(logits(p), transform, of_rows, Mask{nullptr}, nullptr, 0, out, run);
            cpu::token_logprobs.gradient(logits(p), transform, of_rows, Mask{nullptr}, 0, out, grad.data(),
                                         grad_2.data(), grad_2.data(), grad.data(), gradient_p.data(), run);
        } else if (call.op == 1) {
            const FullKL out = {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
            const Divergence kind = static_cast<Divergence>(call.kind);
            cpu::full_kl.forward(logits(p), logits(q), transform, Mask{nullptr}, kind, nullptr, out, run);
            cpu::full_kl.gradient(logits(p), logits(q), transform, Mask{nullptr}, kind, out, grad.data(),
                                  gradient_p.data(), gradient_q.data(), run);
        } else if (call.op == 3) {
            const TokenRewards paid = {q.data(), p.data(), q.data(), grad_2.data(), 0.3f};
            const Sequences where = {nullptr, false, call.rows, call.columns};
            const GAEInputs in = {where, paid, p.data(), dtype, nullptr, grad_2.data(), 0.9f, 0.8f, 0.95f};
            cpu::gae.forward(in, GAE{at(0), at(1), nullptr}, run);
        } else if (call.op == 4) {
            const size_t ranges = (count + cpu::ppo_loss.range - 1) / cpu::ppo_loss.range;
            std::vector<double> partials(ranges * kPPOSums);
            const std::vector<char> flags = read_array<char>(count);
            const double sums[] = {10.0, 1.0, 20.0};
            const PPOInputs in = {p.data(),
                                  q.data(),
                                  q.data(),
                                  p.data(),
                                  q.data(),
                                  p.data(),
                                  p.data(),
                                  q.data(),
                                  p.data(),
                                  dtype,
                                  static_cast<int64_t>(count),
                                  reinterpret_cast<const bool*>(flags.data()),
                                  grad.data(),
                                  nullptr,
                                  sums};
            const Estimate kind = static_cast<Estimate>(call.kind);
            const Objective objective = static_cast<Objective>(call.kind);
            const PPOOptions o = {0.2f, 0.3f, 3.0f, 0.2f,      0.5f, 0.01f,       0.05f,
                                  2.0f, 1.5f, 2.5f, objective, kind, Estimate::k2};
            const Denominator of_count = {nullptr, 0.0f};
            float* const numbers = at(3);
            const PPOResults out = {numbers, numbers + 1, numbers + 1 + kPPOStats, at(0),
                                    at(1),   at(2),       partials.data()};
            cpu::ppo_loss.forward(in, o, of_count, of_count, out, run);
        } else {
            const Estimate kind = static_cast<Estimate>(call.kind);
            const int64_t n = static_cast<int64_t>(count);
            cpu::kl_estimate.forward(p.data(), q.data(), dtype, n, nullptr, kind, at(0), run);
            cpu::kl_estimate.gradient(p.data(), q.data(), dtype, n, nullptr, kind, grad.data(), gradient_p.data(),
                                      gradient_q.data(), run);
        }
        for (const std::vector<float>& result : results) write(result);
        write(gradient_p);
        write(gradient_q);
    }
}
