// rlhf_fast._C: what the compiled kernels look like from Python. Tensors and numbers in, plain values out; no torch
// headers, so one build serves every torch. std::invalid_argument arrives in Python as ValueError. Whatever an entry is
// handed, no kernel reads or writes memory that is not the tensors': given.h checks each one, and on a CPU the numbers
// that kernels follow to a place are looked at too.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "common/full_kl.h"
#include "common/gae.h"
#include "common/group_advantages.h"
#include "common/kl_estimate.h"
#include "common/linear.h"
#include "common/memory.h"
#include "common/paged_attention.h"
#include "common/pair_loss.h"
#include "common/ppo_loss.h"
#include "common/rms_norm.h"
#include "common/sample.h"
#include "common/sequence_sum.h"
#include "common/token_logprobs.h"
#include "cpu/isa.h"
#include "given.h"

namespace py = pybind11;

namespace {

using namespace rlhf_fast;

using RunTuple = std::tuple<int, int, std::uintptr_t>;  // threads; index of the device, stream

Run run(const RunTuple& t) { return {std::get<0>(t), std::get<1>(t), reinterpret_cast<void*>(std::get<2>(t))}; }

// Which kernels, and so whose memory they read.
struct Backend {
    bool is_cuda;

    Memories memories(const RunTuple& where) const {
#if defined(RLHF_FAST_ONLY_CUDA)
        (void)where;
        return Memories(-1);  // tests run the CUDA kernels on a CPU
#else
        return Memories(is_cuda ? std::get<1>(where) : -1);
#endif
    }
};

// The structs of csrc/common as tuples, in the order of their members.
using LogitsTuple = std::tuple<Given, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using TransformTuple = std::tuple<float, float, float, Given>;
using SequencesTuple = std::tuple<Given, int64_t, int64_t>;
using ThreeGiven = std::tuple<Given, Given, Given>;
using FourGiven = std::tuple<Given, Given, Given, Given>;
using SevenGiven = std::tuple<Given, Given, Given, Given, Given, Given, Given>;
using NineGiven = std::array<Given, 9>;

Logits logits(const Memories& memory, const char* name, const LogitsTuple& t) {
    const auto& [x, rows, columns, inner, outer_stride, inner_stride, column_stride] = t;
    expect(inner > 0, name, inner, "rows of at least 1 in a block");
    const int64_t all = times(name, rows, columns);
    int64_t last = 0;  // one past the last element
    if (all > 0) {
        const int64_t blocks = times(name, (rows - 1) / inner, outer_stride);
        const int64_t row = times(name, (rows < inner ? rows : inner) - 1, inner_stride);
        last = plus(name, plus(name, plus(name, blocks, row), times(name, columns - 1, column_stride)), 1);
    }
    const DType dtype = memory.dtype(name, x);
    return {memory.holds(name, x, last), dtype, rows, columns, inner, outer_stride, inner_stride, column_stride};
}

Transform transform(const Memories& memory, const TransformTuple& t, int64_t rows) {
    const auto& [scale, softcap, temperature, temperatures] = t;
    return {scale, softcap, temperature, memory.array_or_null<float>("temperatures", temperatures, rows)};
}

// int32 or int64.
Tokens tokens(const Memories& memory, const Given& x, int64_t rows) {
    if (x.kind == Kind::i32) return {memory.array<int32_t>("tokens", x, rows), false};
    return {memory.array<int64_t>("tokens", x, rows), true};
}

Mask mask(const Memories& memory, const Given& flags, int64_t rows) {
    return {memory.array_or_null<bool>("mask", flags, rows)};
}

// Sequences of `tokens` tokens in all. Where they begin is looked at where that is free.
Sequences sequences(const Memories& memory, const SequencesTuple& t, int64_t tokens) {
    const auto& [x, count, length] = t;
    if (!x.there) {
        expect(times("sequences", count, length) <= tokens, "sequences", times("sequences", count, length),
               "at most " + std::to_string(tokens) + " tokens");
        return {nullptr, false, count, length};
    }
    const int64_t starts = plus("sequences", count, 1);
    const bool wide = x.kind != Kind::i32;
    const void* data = nullptr;
    if (wide) data = memory.array<int64_t>("cu_seqlens", x, starts);
    else data = memory.array<int32_t>("cu_seqlens", x, starts);
    const Sequences found = {data, wide, count, length};
    int64_t before = 0;
    for (int64_t b = 0; memory.on_cpu() && b < starts; ++b) {
        const int64_t at = found.begin(b);
        expect(at >= before && at <= tokens, "cu_seqlens", at,
               "from " + std::to_string(before) + " to " + std::to_string(tokens) + " at index " + std::to_string(b));
        before = at;
    }
    return found;
}

TokenLogprobs token_logprobs_results(const Memories& memory, const FourGiven& t, int64_t rows) {
    const auto& [logprobs, entropy, shift, sum] = t;
    const TokenLogprobs found = {
        memory.array<float>("logprobs", logprobs, rows), memory.array<float>("entropy", entropy, rows),
        memory.array_or_null<float>("largest z", shift, rows), memory.array_or_null<float>("sum of exp(z)", sum, rows)};
    if (shift.there != sum.there) throw py::type_error("sum of exp(z): expected a tensor if largest z is one");
    return found;
}

FullKL full_kl_results(const Memories& memory, const NineGiven& t, int64_t rows) {
    const auto at = [&](int i) { return memory.array<float>("results", t[i], rows); };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
}

void def_token_logprobs(py::module_& m, const TokenLogprobsKernels& kernels, Backend backend) {
    // Of rows: one state of doubles each on a CPU; on a GPU one of floats for each segment of a row.
    const auto states = [backend](const Memories& memory, const Given& x, int64_t rows, int64_t per_row) -> void* {
        const int64_t numbers = times("states", times("states", rows, per_row), kTokenLogprobsState);
        if (backend.is_cuda) return memory.array<float>("states", x, numbers);
        return memory.array<double>("states", x, numbers);
    };
    // Which of those a block of columns is folded into.
    const auto expect_states = [backend](int64_t first_column, int64_t columns, int64_t per_row) {
        const int64_t segment = backend.is_cuda ? cuda::kTokenLogprobsSegment : cpu::kTokenLogprobsSegment;
        expect(first_column >= 0 && first_column % segment == 0, "first_column", first_column,
               "a multiple of " + std::to_string(segment));
        const int64_t last =
            !backend.is_cuda ? 1 : first_column / segment + columns / segment + (columns % segment != 0);
        expect(per_row >= last, "states", per_row, "at least " + std::to_string(last) + " a row");
    };
    m.def("token_logprobs_forward",
          [=](const LogitsTuple& x, const TransformTuple& t, const Given& token, const Given& flags,
              const Given& given_states, int64_t states_per_row, const FourGiven& out, const RunTuple& where) {
              const Memories memory = backend.memories(where);
              const Logits z = logits(memory, "logits", x);
              if (backend.is_cuda) expect_states(0, z.columns, states_per_row);
              void* const scratch = backend.is_cuda ? states(memory, given_states, z.rows, states_per_row) : nullptr;
              const Transform form = transform(memory, t, z.rows);
              const Tokens which = tokens(memory, token, z.rows);
              const Mask counts = mask(memory, flags, z.rows);
              const TokenLogprobs results = token_logprobs_results(memory, out, z.rows);
              py::gil_scoped_release release;
              kernels.forward(z, form, which, counts, scratch, states_per_row, results, run(where));
          });
    m.def("token_logprobs_update",
          [=](const LogitsTuple& x, const TransformTuple& t, const Given& token, const Given& flags,
              int64_t first_column, const Given& given_states, int64_t states_per_row, const RunTuple& where) {
              const Memories memory = backend.memories(where);
              const Logits z = logits(memory, "logits", x);
              expect_states(first_column, z.columns, states_per_row);
              void* const kept = states(memory, given_states, z.rows, states_per_row);
              const Transform form = transform(memory, t, z.rows);
              const Tokens which = tokens(memory, token, z.rows);
              const Mask counts = mask(memory, flags, z.rows);
              py::gil_scoped_release release;
              kernels.update(z, form, which, counts, first_column, kept, states_per_row, run(where));
          });
    m.def("token_logprobs_finish", [=](const Given& given_states, int64_t states_per_row, int64_t rows,
                                       const Given& flags, const FourGiven& out, const RunTuple& where) {
        const Memories memory = backend.memories(where);
        const void* const kept = states(memory, given_states, rows, states_per_row);
        expect(states_per_row > 0, "states", states_per_row, "at least 1 a row");
        const Mask counts = mask(memory, flags, rows);
        const TokenLogprobs results = token_logprobs_results(memory, out, rows);
        py::gil_scoped_release release;
        kernels.finish(kept, states_per_row, rows, counts, results, run(where));
    });
    m.def("token_logprobs_gradient", [=](const LogitsTuple& x, const TransformTuple& t, const Given& token,
                                         const Given& flags, int64_t first_column, const FourGiven& given_results,
                                         const FourGiven& grads, const Given& given_out, const RunTuple& where) {
        const Memories memory = backend.memories(where);
        const Logits z = logits(memory, "logits", x);
        const Transform form = transform(memory, t, z.rows);
        const Tokens which = tokens(memory, token, z.rows);
        const Mask counts = mask(memory, flags, z.rows);
        expect(first_column >= 0, "first_column", first_column, "at least 0");
        const TokenLogprobs results = token_logprobs_results(memory, given_results, z.rows);
        if (!std::get<2>(given_results).there) throw py::type_error("largest z: None, expected a tensor");
        const auto& [of_logprobs, of_entropy, of_log_sum, of_each] = grads;
        const float* const in_logprobs = memory.array_or_null<float>("grad of logprobs", of_logprobs, z.rows);
        const float* const in_entropy = memory.array_or_null<float>("grad of entropy", of_entropy, z.rows);
        const float* const in_log_sum = memory.array_or_null<float>("grad of log sum", of_log_sum, z.rows);
        const float* const in_each = memory.array_or_null<float>("grad of each", of_each, z.rows);
        void* const out = memory.like("out", given_out, z.dtype, times("out", z.rows, z.columns));
        py::gil_scoped_release release;
        kernels.gradient(z, form, which, counts, first_column, results, in_logprobs, in_entropy, in_log_sum, in_each,
                         out, run(where));
    });
}

// ref_logits of the same rows, columns and dtype as logits.
Logits ref_logits(const Memories& memory, const LogitsTuple& t, const Logits& like) {
    const Logits found = logits(memory, "ref_logits", t);
    memory.check("ref_logits", std::get<0>(t), static_cast<Kind>(like.dtype));
    expect(found.rows == like.rows, "ref_logits", found.rows, std::to_string(like.rows) + " rows");
    expect(found.columns == like.columns, "ref_logits", found.columns, std::to_string(like.columns) + " columns");
    return found;
}

void def_full_kl(py::module_& m, const FullKLKernels& kernels, Backend backend) {
    m.def("full_kl_forward",
          [=](const LogitsTuple& given_p, const LogitsTuple& given_q, const TransformTuple& t, const Given& flags,
              int64_t divergence, const Given& given_scratch, const NineGiven& out, const RunTuple& where) {
              const Memories memory = backend.memories(where);
              const Logits p = logits(memory, "logits", given_p), q = ref_logits(memory, given_q, p);
              const Transform form = transform(memory, t, p.rows);
              const Mask counts = mask(memory, flags, p.rows);
              float* scratch = nullptr;
              if (backend.is_cuda) {
                  const int64_t segments = p.columns / cuda::kFullKLSegment + (p.columns % cuda::kFullKLSegment != 0);
                  scratch = memory.array<float>("scratch", given_scratch, p.rows * segments * cuda::kFullKLState);
              }
              const Divergence which = option("divergence", divergence, Divergence::js);
              const FullKL results = full_kl_results(memory, out, p.rows);
              py::gil_scoped_release release;
              kernels.forward(p, q, form, counts, which, scratch, results, run(where));
          });
    m.def("full_kl_gradient",
          [=](const LogitsTuple& given_p, const LogitsTuple& given_q, const TransformTuple& t, const Given& flags,
              int64_t divergence, const NineGiven& given_results, const Given& given_grad, const Given& out_p,
              const Given& out_q, const RunTuple& where) {
              const Memories memory = backend.memories(where);
              const Logits p = logits(memory, "logits", given_p), q = ref_logits(memory, given_q, p);
              const Transform form = transform(memory, t, p.rows);
              const Mask counts = mask(memory, flags, p.rows);
              const Divergence which = option("divergence", divergence, Divergence::js);
              const FullKL results = full_kl_results(memory, given_results, p.rows);
              const float* const grad = memory.array<float>("grad", given_grad, p.rows);
              const int64_t all = p.rows * p.columns;  // no more than p holds, or looked at there
              void* const in_p = memory.like_or_null("gradient in logits", out_p, p.dtype, all);
              void* const in_q = memory.like_or_null("gradient in ref_logits", out_q, p.dtype, all);
              py::gil_scoped_release release;
              kernels.gradient(p, q, form, counts, which, results, grad, in_p, in_q, run(where));
          });
}

void def_kl_estimate(py::module_& m, const KLEstimateKernels& kernels, Backend backend) {
    m.def("kl_estimate_forward", [=](const Given& logprobs, const Given& ref_logprobs, const Given& flags,
                                     int64_t estimate, const Given& given_out, const RunTuple& where) {
        const Memories memory = backend.memories(where);
        const DType dtype = memory.dtype("logprobs", logprobs);
        const int64_t count = logprobs.elements;
        const void* const p = memory.like("logprobs", logprobs, dtype, count);
        const void* const q = memory.like("ref_logprobs", ref_logprobs, dtype, count);
        const bool* const counts = memory.array_or_null<bool>("mask", flags, count);
        const Estimate which = option("estimate", estimate, Estimate::k3);
        float* const out = memory.array<float>("out", given_out, count);
        py::gil_scoped_release release;
        kernels.forward(p, q, dtype, count, counts, which, out, run(where));
    });
    m.def("kl_estimate_gradient",
          [=](const Given& logprobs, const Given& ref_logprobs, const Given& flags, int64_t estimate,
              const Given& given_grad, const Given& out, const Given& ref_out, const RunTuple& where) {
              const Memories memory = backend.memories(where);
              const DType dtype = memory.dtype("logprobs", logprobs);
              const int64_t count = logprobs.elements;
              const void* const p = memory.like("logprobs", logprobs, dtype, count);
              const void* const q = memory.like("ref_logprobs", ref_logprobs, dtype, count);
              const bool* const counts = memory.array_or_null<bool>("mask", flags, count);
              const Estimate which = option("estimate", estimate, Estimate::k3);
              const float* const grad = memory.array<float>("grad", given_grad, count);
              void* const in_p = memory.like_or_null("gradient in logprobs", out, dtype, count);
              void* const in_q = memory.like_or_null("gradient in ref_logprobs", ref_out, dtype, count);
              py::gil_scoped_release release;
              kernels.gradient(p, q, dtype, count, counts, which, grad, in_p, in_q, run(where));
          });
}

void def_gae(py::module_& m, const GAEKernels& kernels, Backend backend) {
    m.def("gae_forward", [=](const SequencesTuple& where, const FourGiven& paid, float kl_coef, const Given& values,
                             const Given& flags, const Given& bootstrap, const std::tuple<float, float, float>& numbers,
                             const ThreeGiven& out, const RunTuple& on) {
        const Memories memory = backend.memories(on);
        const DType dtype = memory.dtype("values", values);
        const int64_t count = values.elements;
        const Sequences in = sequences(memory, where, count);
        const auto& [rewards, logprobs, ref_logprobs, scores] = paid;
        const auto& [gamma, lam, critic_lam] = numbers;
        const auto& [advantages, returns, sums] = out;
        if (logprobs.there != ref_logprobs.there)
            throw py::type_error("ref_logprobs: expected a tensor if logprobs are one");
        const GAEInputs inputs = {in,
                                  {memory.like_or_null("rewards", rewards, dtype, count),
                                   memory.like_or_null("logprobs", logprobs, dtype, count),
                                   memory.like_or_null("ref_logprobs", ref_logprobs, dtype, count),
                                   memory.array_or_null<float>("scores", scores, in.count), kl_coef},
                                  memory.like("values", values, dtype, count),
                                  dtype,
                                  memory.array_or_null<bool>("mask", flags, count),
                                  memory.array_or_null<float>("bootstrap", bootstrap, in.count),
                                  gamma,
                                  lam,
                                  critic_lam};
        const GAE results = {memory.array<float>("advantages", advantages, count),
                             memory.array<float>("returns", returns, count),
                             memory.array_or_null<double>("sums", sums, times("sums", in.count, 3))};
        py::gil_scoped_release release;
        kernels.forward(inputs, results, run(on));
    });
}

using PPOOptionsTuple =
    std::tuple<float, float, float, float, float, float, float, float, float, float, int64_t, int64_t, int64_t>;
using DenominatorTuple = std::tuple<Given, float>;

Denominator denominator(const Memories& memory, const DenominatorTuple& t) {
    return {memory.array_or_null<float>("denominator", std::get<0>(t), 1), std::get<1>(t)};
}

void def_ppo_loss(py::module_& m, const PPOLossKernels& kernels, Backend backend) {
    m.attr("ppo_loss_range") = kernels.range;
    m.attr("ppo_loss_sums") = static_cast<int>(kPPOSums);
    m.def("ppo_loss_forward", [=](const NineGiven& tensors, const FourGiven& others, const PPOOptionsTuple& options,
                                  const DenominatorTuple& of_terms, const DenominatorTuple& of_tokens,
                                  const SevenGiven& out, const RunTuple& where) {
        constexpr const char* kNames[9] = {"logprobs", "old_logprobs", "advantages",   "values",          "old_values",
                                           "returns",  "entropy",      "ref_logprobs", "rollout_logprobs"};
        const Memories memory = backend.memories(where);
        const DType dtype = memory.dtype("logprobs", tensors[0]);
        const int64_t count = tensors[0].elements;
        const auto at = [&](int i) -> const void* {
            if (i < 3 || (i == 5 && tensors[3].there)) return memory.like(kNames[i], tensors[i], dtype, count);
            return memory.like_or_null(kNames[i], tensors[i], dtype, count);
        };
        const auto& [flags, weights, log_ratios, sums] = others;
        const PPOInputs inputs = {at(0),
                                  at(1),
                                  at(2),
                                  at(3),
                                  at(4),
                                  at(5),
                                  at(6),
                                  at(7),
                                  at(8),
                                  dtype,
                                  count,
                                  memory.array_or_null<bool>("mask", flags, count),
                                  memory.array_or_null<float>("weights", weights, count),
                                  memory.array_or_null<float>("log_ratios", log_ratios, count),
                                  memory.array_or_null<double>("advantage_sums", sums, 3)};
        const auto& [low, high, dual, value_clip, value_coef, entropy_coef, kl_coef, cap, tau_pos, tau_neg, objective,
                     kl, kl_slope] = options;
        const PPOOptions o = {low,
                              high,
                              dual,
                              value_clip,
                              value_coef,
                              entropy_coef,
                              kl_coef,
                              cap,
                              tau_pos,
                              tau_neg,
                              option("objective", objective, Objective::sapo),
                              option("kl", kl, Estimate::k3),
                              option("kl_slope", kl_slope, Estimate::k3)};
        const auto& [loss, stats, inverse, in_logprobs, in_values, in_entropy, partials] = out;
        const int64_t ranges = count / kernels.range + (count % kernels.range != 0);
        const PPOResults results = {memory.array<float>("loss", loss, 1),
                                    memory.array<float>("stats", stats, kPPOStats),
                                    memory.array<float>("inverse", inverse, 1),
                                    memory.array_or_null<float>("gradient in logprobs", in_logprobs, count),
                                    memory.array_or_null<float>("gradient in values", in_values, count),
                                    memory.array_or_null<float>("gradient in entropy", in_entropy, count),
                                    memory.array<double>("partials", partials, ranges * kPPOSums)};
        const Denominator terms = denominator(memory, of_terms), all = denominator(memory, of_tokens);
        py::gil_scoped_release release;
        kernels.forward(inputs, o, terms, all, results, run(where));
    });
    m.def("ppo_loss_scale", [=](const std::array<Given, 3>& from, const std::array<Given, 3>& to, const Given& upstream,
                                const Given& inverse, const RunTuple& where) {
        const Memories memory = backend.memories(where);
        PPOGradients gradients = {
            {}, {}, 0, memory.array<float>("upstream", upstream, 1), memory.array<float>("inverse", inverse, 1)};
        for (const Given& x : to) gradients.count = std::max(gradients.count, x.elements);
        for (int i = 0; i < 3; ++i) {
            if (!to[i].there) continue;
            gradients.from[i] = memory.array<float>("gradients", from[i], gradients.count);
            gradients.to[i] = memory.array<float>("out", to[i], gradients.count);
        }
        py::gil_scoped_release release;
        kernels.scale(gradients, run(where));
    });
}

using PairOptionsTuple = std::tuple<int64_t, double, double, double, double>;

void def_pair_loss(py::module_& m, const PairLossKernels& kernels, Backend backend) {
    m.def("pair_loss_forward",
          [=](const FourGiven& tensors, const ThreeGiven& others, const PairOptionsTuple& options,
              const std::tuple<Given, double>& divisor, const ThreeGiven& out, const RunTuple& where) {
              const Memories memory = backend.memories(where);
              const auto& [chosen, rejected, ref_chosen, ref_rejected] = tensors;
              const auto& [margins, weights, kl] = others;
              const DType dtype = memory.dtype("chosen", chosen);
              const int64_t count = chosen.elements;
              const PairInputs inputs = {memory.like("chosen", chosen, dtype, count),
                                         memory.like("rejected", rejected, dtype, count),
                                         memory.like_or_null("ref_chosen", ref_chosen, dtype, count),
                                         memory.like_or_null("ref_rejected", ref_rejected, dtype, count),
                                         dtype,
                                         count,
                                         memory.array_or_null<float>("margins", margins, count),
                                         memory.array_or_null<float>("weights", weights, count),
                                         memory.array_or_null<float>("kl", kl, 1)};
              const auto& [kind, beta, agree, differ, center_coef] = options;
              const PairOptions o = {option("loss", kind, PairLoss::kto), beta, agree, differ, center_coef};
              const auto& [stats, in_chosen, in_rejected] = out;
              const PairResults results = {memory.array<float>("stats", stats, kPairStats),
                                           memory.array_or_null<float>("gradient in chosen", in_chosen, count),
                                           memory.array_or_null<float>("gradient in rejected", in_rejected, count)};
              const float* const there = memory.array_or_null<float>("denominator", std::get<0>(divisor), 1);
              const double number = std::get<1>(divisor);
              py::gil_scoped_release release;
              kernels.forward(inputs, o, there, number, results, run(where));
          });
}

// weight, weight_stride, rows, bias, low, up, rank, scale
using LinearTuple = std::tuple<Given, int64_t, int64_t, Given, Given, Given, int64_t, float>;
using PlaceTuple = std::tuple<Given, int64_t>;  // and the stride from row to row

void def_linear(py::module_& m, const LinearKernels& kernels, Backend backend) {
    m.def("linear_forward", [=](const PlaceTuple& given_x, int64_t rows, int64_t k,
                                const std::vector<LinearTuple>& parts, const std::vector<PlaceTuple>& outs,
                                const PlaceTuple& given_add, int64_t gate, const RunTuple& where) {
        const Memories memory = backend.memories(where);
        const auto& [x, x_stride] = given_x;
        const auto& [add, add_stride] = given_add;
        const DType dtype = memory.dtype("x", x);
        expect(gate >= 0 && gate <= 2, "gate", gate, "from 0 to 2");
        const auto count = static_cast<int64_t>(parts.size()), results = static_cast<int64_t>(outs.size());
        expect(gate != 0 ? count == 2 : count >= 1 && count <= kLinearParts, "weights", count,
               gate != 0 ? "2 with a gate" : "1 to " + std::to_string(kLinearParts));
        expect(results == (gate != 0 ? 1 : count), "results", results, "one for each product");
        LinearProblem problem{
            memory.rows("x", x, dtype, rows, k, x_stride), x_stride, dtype, rows, k, {}, 0, static_cast<int>(gate)};
        for (const LinearTuple& part : parts) {
            const auto& [weight, weight_stride, n, bias, low, up, rank, scale] = part;
            const auto& [out, out_stride] = outs[gate != 0 ? 0 : static_cast<std::size_t>(problem.count)];
            expect(rows <= 1 || out_stride >= n, "out", out_stride, "rows that do not overlap");
            expect(gate == 0 || n == std::get<2>(parts[0]), "weights", n, "as many rows in both with a gate");
            if (low.there != up.there) throw py::type_error("up: expected a tensor if low is one");
            problem.parts[problem.count++] = {
                memory.rows("weight", weight, dtype, n, k, weight_stride),
                weight_stride,
                n,
                memory.like_or_null("bias", bias, dtype, n),
                memory.like_or_null("low", low, dtype, low.there ? times("low", rows, rank) : 0),
                memory.like_or_null("up", up, dtype, up.there ? times("up", n, rank) : 0),
                rank,
                scale,
                add.there ? memory.rows("add", add, dtype, rows, n, add_stride) : nullptr,
                add_stride,
                memory.rows("out", out, dtype, rows, n, out_stride),
                out_stride};
        }
        kernels.forward(problem, run(where));
    });
}

// keys (blocks, kv heads, width, block size), values, dim, kv heads, width, block size
using CacheTuple = std::tuple<Given, Given, int64_t, int64_t, int64_t, int64_t>;

struct GivenCache {
    PagedCache cache;
    int64_t blocks;
};

GivenCache paged_cache(const Memories& memory, const CacheTuple& t) {
    const auto& [keys, values, dim, kv_heads, width, block_size] = t;
    const DType dtype = memory.dtype("keys", keys);
    expect(dim > 0 && dim <= width && width <= kMostDim && width % 16 == 0, "cache.dim", dim,
           "from 1 to a width that is a multiple of 16 and at most " + std::to_string(kMostDim));
    expect(block_size > 0 && block_size <= kMostKeys && block_size % 16 == 0, "cache.block_size", block_size,
           "a multiple of 16 and at most " + std::to_string(kMostKeys));
    expect(kv_heads > 0, "cache.kv_heads", kv_heads, "at least 1");
    const int64_t size = times("cache", kv_heads, width * block_size), blocks = keys.elements / size;
    return {{memory.like("keys", keys, dtype, blocks * size), memory.like("values", values, dtype, blocks * size),
             dtype, kv_heads, dim, width, block_size},
            blocks};
}

using Strides = std::tuple<int64_t, int64_t>;  // from token to token, from head to head

// (tokens, heads, dim) with dim contiguous.
char* heads_of(const Memories& memory, const char* name, const Given& x, DType dtype, int64_t tokens, int64_t heads,
               int64_t dim, const Strides& strides) {
    const auto& [token_stride, head_stride] = strides;
    memory.check(name, x, static_cast<Kind>(dtype));
    memory.last_contiguous(name, x);
    int64_t last = 0;
    if (times(name, tokens, heads) > 0)
        last = plus(name, plus(name, times(name, tokens - 1, token_stride), times(name, heads - 1, head_stride)), dim);
    return memory.holds(name, x, last);
}

// What kernels follow to reach keys and queries, where looking at it is free.
void expect_places(const PagedCache& c, int64_t blocks, const PagedQueries& q) {
    const auto rises = [](const char* name, const int32_t* starts, int64_t count, int64_t end) {
        for (int64_t i = 0; i <= count; ++i)
            expect(starts[i] >= (i == 0 ? 0 : starts[i - 1]) && starts[i] <= end, name, starts[i],
                   "starts that rise from 0 to " + std::to_string(end));
        expect(starts[0] == 0 && starts[count] == end, name, starts[count],
               "starts that rise from 0 to " + std::to_string(end));
    };
    rises("batch.cu_queries", q.cu_queries, q.sequences, q.tokens);
    rises("batch.groups", q.groups, q.count, q.sequences);
    for (int64_t g = 0; g < q.count; ++g) {
        expect(q.shared[g] >= 0, "batch.shared", q.shared[g], "at least 0");
        for (int64_t b = q.groups[g]; b < q.groups[g + 1]; ++b) {
            const int64_t queries = q.cu_queries[b + 1] - q.cu_queries[b], context = q.contexts[b];
            expect(context >= queries && context <= q.table_stride * c.block_size, "batch.contexts", context,
                   "at least each one's queries and at most " + std::to_string(q.table_stride * c.block_size));
            expect(q.shared[g] * c.block_size <= context - queries, "batch.shared", q.shared[g],
                   "blocks before each one's queries");
            for (int64_t i = 0; i * c.block_size < context; ++i) {
                const int64_t block = q.tables[b * q.table_stride + i];
                expect(block >= 0 && block < blocks, "batch.tables", block,
                       "blocks from 0 to " + std::to_string(blocks - 1));
            }
        }
    }
}

void def_paged_attention(py::module_& m, const PagedAttentionKernels& kernels, Backend backend) {
    using Where = std::tuple<Given, int64_t, Given, Given, Given, Given>;
    using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // tokens, sequences, groups, parts of keys
    m.def("paged_attention_forward", [=](const CacheTuple& given_cache, const Given& query, const Strides& strides,
                                         int64_t heads, const Where& t, float scale, float softcap, int64_t window,
                                         const Given& sinks, const Given& out, const Sizes& sizes, const Given& parts,
                                         const RunTuple& where) {
        const Memories memory = backend.memories(where);
        const auto [cache, blocks] = paged_cache(memory, given_cache);
        const auto& [tables, table_stride, cu_queries, contexts, groups, shared] = t;
        const auto& [tokens, sequences, count, number_of_parts] = sizes;
        expect(heads > 0 && heads % cache.kv_heads == 0, "query", heads,
               "heads, a multiple of " + std::to_string(cache.kv_heads));
        expect(window >= 0, "window", window, "at least 0");
        const int64_t results = times("out", times("out", tokens, heads), cache.dim);
        const int64_t of_parts =
            times("parts", times("parts", times("parts", tokens, heads), number_of_parts), cache.width + 2);
        const PagedQueries q = {heads_of(memory, "query", query, cache.dtype, tokens, heads, cache.dim, strides),
                                std::get<0>(strides),
                                std::get<1>(strides),
                                heads,
                                memory.array<int32_t>("batch.tables", tables, times("tables", sequences, table_stride)),
                                table_stride,
                                memory.array<int32_t>("batch.cu_queries", cu_queries, plus("sequences", sequences, 1)),
                                memory.array<int32_t>("batch.contexts", contexts, sequences),
                                memory.array<int32_t>("batch.groups", groups, plus("groups", count, 1)),
                                memory.array<int32_t>("batch.shared", shared, count),
                                count,
                                scale,
                                softcap,
                                window,
                                memory.array_or_null<float>("sinks", sinks, heads),
                                memory.like("out", out, cache.dtype, results),
                                tokens,
                                sequences,
                                memory.array_or_null<float>("parts", parts, of_parts),
                                number_of_parts};
        if (memory.on_cpu()) expect_places(cache, blocks, q);
        kernels.forward(cache, q, run(where));
    });
    m.def("write_kv_forward", [=](const CacheTuple& given_cache, const Given& key, const Strides& key_strides,
                                  const Given& value, const Strides& value_strides, const Given& given_slots,
                                  int64_t count, const Given& cos, const Given& sin, const Given& query,
                                  const Strides& query_strides, int64_t heads, const RunTuple& where) {
        const Memories memory = backend.memories(where);
        const auto [cache, blocks] = paged_cache(memory, given_cache);
        const int64_t* const slots = memory.array<int64_t>("slots", given_slots, count);
        for (int64_t n = 0; memory.on_cpu() && n < count; ++n)
            expect(slots[n] >= 0 && slots[n] < blocks * cache.block_size, "slots", slots[n],
                   "from 0 to " + std::to_string(blocks * cache.block_size - 1));
        const int64_t angles = times("cos", count, cache.dim);
        if (cos.there != sin.there || (query.there && !cos.there))
            throw py::type_error("cos, sin: expected both or neither, and both with a query");
        expect(!cos.there || cache.dim % 2 == 0, "cos", cache.dim, "an even dimension, of which halves are rotated");
        const NewTokens x = {
            heads_of(memory, "key", key, cache.dtype, count, cache.kv_heads, cache.dim, key_strides),
            heads_of(memory, "value", value, cache.dtype, count, cache.kv_heads, cache.dim, value_strides),
            std::get<0>(key_strides),
            std::get<1>(key_strides),
            std::get<0>(value_strides),
            std::get<1>(value_strides),
            slots,
            count,
            memory.like_or_null("cos", cos, cache.dtype, angles),
            memory.like_or_null("sin", sin, cache.dtype, angles),
            query.there ? heads_of(memory, "query", query, cache.dtype, count, heads, cache.dim, query_strides)
                        : nullptr,
            std::get<0>(query_strides),
            std::get<1>(query_strides),
            heads};
        kernels.write(cache, x, run(where));
    });
    m.attr("paged_attention_most_keys") = kMostKeys;
    m.attr("paged_attention_most_dim") = kMostDim;
    m.attr("paged_attention_part") = kPartOfKeys;
}

void def_rms_norm(py::module_& m, const RMSNormKernels& kernels, Backend backend) {
    m.def("rms_norm_forward", [=](const Given& x, int64_t stride, const Given& weight, const Given& out, int64_t rows,
                                  int64_t columns, float eps, float offset, const RunTuple& where) {
        const Memories memory = backend.memories(where);
        const DType dtype = memory.dtype("x", x);
        kernels.forward(
            {memory.rows("x", x, dtype, rows, columns, stride), stride, memory.like("weight", weight, dtype, columns),
             memory.like("out", out, dtype, times("out", rows, columns)), dtype, rows, columns, eps, offset},
            run(where));
    });
}

void def_sample(py::module_& m, const SampleKernels& kernels, Backend backend) {
    using Options = std::tuple<Given, Given, Given, Given, Given>;
    m.def("sample_forward", [=](const Given& logits, int64_t rows, int64_t columns, int64_t stride,
                                const Options& options, const FourGiven& results, const RunTuple& where) {
        const Memories memory = backend.memories(where);
        const auto& [temperature, top_k, top_p, min_p, uniform] = options;
        const auto& [tokens, logprobs, kept, entropy] = results;
        const DType dtype = memory.dtype("logits", logits);
        const SampleInputs inputs = {memory.rows("logits", logits, dtype, rows, columns, stride),
                                     dtype,
                                     rows,
                                     columns,
                                     stride,
                                     memory.array<float>("temperature", temperature, rows),
                                     memory.array<int32_t>("top_k", top_k, rows),
                                     memory.array<float>("top_p", top_p, rows),
                                     memory.array<float>("min_p", min_p, rows),
                                     memory.array<double>("uniform", uniform, rows)};
        kernels.forward(inputs,
                        {memory.array<int64_t>("tokens", tokens, rows), memory.array<float>("logprobs", logprobs, rows),
                         memory.array<float>("kept", kept, rows), memory.array<float>("entropy", entropy, rows)},
                        run(where));
    });
}

void def_sequence_sum(py::module_& m, const SequenceSumKernels& kernels, Backend backend) {
    m.def("sequence_sum_forward", [=](const SequencesTuple& where, const Given& x, const Given& flags,
                                      const Given& given_out, const RunTuple& on) {
        const Memories memory = backend.memories(on);
        const DType dtype = memory.dtype("x", x);
        const Sequences in = sequences(memory, where, x.elements);
        const void* const data = memory.like("x", x, dtype, x.elements);
        const bool* const counts = memory.array_or_null<bool>("mask", flags, x.elements);
        float* const out = memory.array<float>("out", given_out, in.count);
        py::gil_scoped_release release;
        kernels.forward(in, data, dtype, counts, out, run(on));
    });
}

void def_group_advantages(py::module_& m, const GroupAdvantagesKernels& kernels, Backend backend) {
    m.def("group_advantages_forward", [=](const SequencesTuple& where, const Given& rewards, const Given& flags,
                                          int64_t kind, double eps, const Given& given_out, const RunTuple& on) {
        const Memories memory = backend.memories(on);
        const DType dtype = memory.dtype("rewards", rewards);
        const int64_t count = rewards.elements;
        const GroupInputs inputs = {sequences(memory, where, count),
                                    memory.like("rewards", rewards, dtype, count),
                                    dtype,
                                    memory.array_or_null<bool>("mask", flags, count),
                                    option("kind", kind, GroupKind::rloo),
                                    eps};
        float* const out = memory.array<float>("out", given_out, count);
        py::gil_scoped_release release;
        kernels.forward(inputs, out, run(on));
    });
}

py::list isa_list() {
    py::list names;
    for (Isa one : isa_available()) names.append(isa_name(one));
    return names;
}

py::dict cpu_features_dict() {
    py::dict features;
    for (const auto& [name, present] : cpu_features()) features[name.c_str()] = present;
    return features;
}

py::dict build_info() {
#if defined(__clang__)
    const std::string name = "clang ";
    constexpr int version[] = {__clang_major__, __clang_minor__, __clang_patchlevel__};
#else
    const std::string name = "gcc ";
    constexpr int version[] = {__GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__};
#endif
    py::dict info;
    info["compiler"] =
        name + std::to_string(version[0]) + "." + std::to_string(version[1]) + "." + std::to_string(version[2]);
    info["cpp_standard"] = "C++" + std::to_string(__cplusplus / 100 % 100);
#if defined(_OPENMP)
    info["threads"] = "OpenMP";
#else
    info["threads"] = "C++";
#endif
#if defined(RLHF_FAST_CUDA)
    info["cuda"] = RLHF_FAST_CUDA;  // the architectures, and the compiler
#else
    info["cuda"] = py::none();
#endif
    return info;
}

#if defined(RLHF_FAST_MEMORY)
py::buffer_info buffer(Memory& memory) {
    const auto bytes = static_cast<py::ssize_t>(memory.bytes());
    return {memory.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {bytes}, {1}};
}
#endif

}  // namespace

#if !defined(RLHF_FAST_MODULE)
#define RLHF_FAST_MODULE _C
#endif

PYBIND11_MODULE(RLHF_FAST_MODULE, m) {
    m.doc() = "Compiled kernels of rlhf-fast.";
    m.def(
        "isa", [] { return isa_name(isa()); },
        "Instruction set in use: the best this CPU has, or the one RLHF_FAST_ISA names (read on first use).");
    m.def("isa_available", &isa_list, "Instruction sets this CPU can run, best first.");
    m.def("cpu_features", &cpu_features_dict, "Presence of each CPU feature that matters to kernels.");
    m.def("build_info", &build_info, "Compiler, C++ standard, kind of threads, and what CUDA kernels were built for.");
    m.def(
        "first_outside",
        [](const Given& token, const Given& flags, int64_t vocabulary) {
            const Memories memory(-1);
            const int64_t rows = token.elements;
            return first_outside(tokens(memory, token, rows), mask(memory, flags, rows), rows, vocabulary);
        },
        "The first unmasked row whose token is outside [0, vocabulary), or -1.");
#if defined(RLHF_FAST_MEMORY)
    py::class_<Memory>(m, "Memory", py::buffer_protocol(), py::module_local(),
                       "A large block of memory, uninitialised.")
        .def(py::init<std::size_t>(), py::arg("bytes"))
        .def_buffer(&buffer)
        .def_static("release", &Memory::release, "Give the blocks that are kept for the next call back to the system.");
#endif

    m.attr("token_logprobs_state") = kTokenLogprobsState;
#if !defined(RLHF_FAST_ONLY_CUDA)
    py::module_ on_cpu = m.def_submodule("cpu", "Kernels on memory of the CPU.");
    on_cpu.attr("token_logprobs_segment") = cpu::kTokenLogprobsSegment;
    def_token_logprobs(on_cpu, cpu::token_logprobs, Backend{false});
    def_full_kl(on_cpu, cpu::full_kl, Backend{false});
    def_kl_estimate(on_cpu, cpu::kl_estimate, Backend{false});
    def_linear(on_cpu, cpu::linear, Backend{false});
    def_paged_attention(on_cpu, cpu::paged_attention, Backend{false});
    def_rms_norm(on_cpu, cpu::rms_norm, Backend{false});
    def_sample(on_cpu, cpu::sample, Backend{false});
    def_gae(on_cpu, cpu::gae, Backend{false});
    def_ppo_loss(on_cpu, cpu::ppo_loss, Backend{false});
    def_pair_loss(on_cpu, cpu::pair_loss, Backend{false});
    def_sequence_sum(on_cpu, cpu::sequence_sum, Backend{false});
    def_group_advantages(on_cpu, cpu::group_advantages, Backend{false});
#endif
#if defined(RLHF_FAST_CUDA)
    py::module_ on_cuda = m.def_submodule("cuda", "Kernels on memory of a CUDA device.");
    on_cuda.attr("token_logprobs_segment") = cuda::kTokenLogprobsSegment;
    on_cuda.attr("full_kl_segment") = cuda::kFullKLSegment;
    on_cuda.attr("full_kl_state") = cuda::kFullKLState;
    def_token_logprobs(on_cuda, cuda::token_logprobs, Backend{true});
    def_full_kl(on_cuda, cuda::full_kl, Backend{true});
    def_kl_estimate(on_cuda, cuda::kl_estimate, Backend{true});
    def_paged_attention(on_cuda, cuda::paged_attention, Backend{true});
    def_sample(on_cuda, cuda::sample, Backend{true});
    def_gae(on_cuda, cuda::gae, Backend{true});
    def_ppo_loss(on_cuda, cuda::ppo_loss, Backend{true});
    def_pair_loss(on_cuda, cuda::pair_loss, Backend{true});
    def_sequence_sum(on_cuda, cuda::sequence_sum, Backend{true});
    def_group_advantages(on_cuda, cuda::group_advantages, Backend{true});
#endif
}
