// rlhf_fast._C: what the compiled kernels look like from Python. Integers, pointers and numbers in, plain values out;
// no torch headers, so one build serves every torch. std::invalid_argument arrives in Python as ValueError. Nothing is
// checked here: rlhf_fast/ops/_compiled.py calls with what the public functions have checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

namespace py = pybind11;

namespace {

using namespace rlhf_fast;
using Address = std::uintptr_t;  // of tensor data, 0 for none

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// The structs of csrc/common as tuples, in the order of their members.
using LogitsTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using TransformTuple = std::tuple<float, float, float, Address>;
using TokensTuple = std::tuple<Address, bool>;
using SequencesTuple = std::tuple<Address, bool, int64_t, int64_t>;
using RunTuple = std::tuple<int, int, Address>;
using ThreeAddresses = std::tuple<Address, Address, Address>;
using FourAddresses = std::tuple<Address, Address, Address, Address>;
using NineAddresses = std::tuple<Address, Address, Address, Address, Address, Address, Address, Address, Address>;

Logits logits(const LogitsTuple& t) {
    return std::apply([](Address data, int dtype,
                         auto... sizes) { return Logits{at<void>(data), static_cast<DType>(dtype), sizes...}; },
                      t);
}
Transform transform(const TransformTuple& t) {
    const auto& [scale, softcap, temperature, temperatures] = t;
    return {scale, softcap, temperature, at<float>(temperatures)};
}
Tokens tokens(const TokensTuple& t) { return {at<void>(std::get<0>(t)), std::get<1>(t)}; }
Sequences sequences(const SequencesTuple& t) {
    return std::apply([](Address cu_seqlens, auto... rest) { return Sequences{at<void>(cu_seqlens), rest...}; }, t);
}
Mask mask(Address flags) { return {at<bool>(flags)}; }
Run run(const RunTuple& t) { return {std::get<0>(t), std::get<1>(t), at<void>(std::get<2>(t))}; }

TokenLogprobs token_logprobs_results(const FourAddresses& t) {
    return std::apply([](auto... address) { return TokenLogprobs{at<float>(address)...}; }, t);
}
FullKL full_kl_results(const NineAddresses& t) {
    return std::apply([](auto... address) { return FullKL{at<float>(address)...}; }, t);
}

void def_token_logprobs(py::module_& m, const TokenLogprobsKernels& kernels) {
    m.def("token_logprobs_forward",
          [kernels](const LogitsTuple& x, const TransformTuple& t, const TokensTuple& token, Address flags,
                    Address states, int64_t states_per_row, const FourAddresses& out, const RunTuple& where) {
              py::gil_scoped_release release;
              kernels.forward(logits(x), transform(t), tokens(token), mask(flags), at<void>(states), states_per_row,
                              token_logprobs_results(out), run(where));
          });
    m.def("token_logprobs_update",
          [kernels](const LogitsTuple& x, const TransformTuple& t, const TokensTuple& token, Address flags,
                    int64_t first_column, Address states, int64_t states_per_row, const RunTuple& where) {
              py::gil_scoped_release release;
              kernels.update(logits(x), transform(t), tokens(token), mask(flags), first_column, at<void>(states),
                             states_per_row, run(where));
          });
    m.def("token_logprobs_finish", [kernels](Address states, int64_t states_per_row, int64_t rows, Address flags,
                                             const FourAddresses& out, const RunTuple& where) {
        py::gil_scoped_release release;
        kernels.finish(at<void>(states), states_per_row, rows, mask(flags), token_logprobs_results(out), run(where));
    });
    m.def("token_logprobs_gradient", [kernels](const LogitsTuple& x, const TransformTuple& t, const TokensTuple& token,
                                               Address flags, int64_t first_column, const FourAddresses& results,
                                               const FourAddresses& grads, Address out, const RunTuple& where) {
        const auto& [of_logprobs, of_entropy, of_log_sum, of_each] = grads;
        py::gil_scoped_release release;
        kernels.gradient(logits(x), transform(t), tokens(token), mask(flags), first_column,
                         token_logprobs_results(results), at<float>(of_logprobs), at<float>(of_entropy),
                         at<float>(of_log_sum), at<float>(of_each), at<void>(out), run(where));
    });
}

void def_full_kl(py::module_& m, const FullKLKernels& kernels) {
    m.def("full_kl_forward",
          [kernels](const LogitsTuple& p, const LogitsTuple& q, const TransformTuple& t, Address flags, int divergence,
                    Address scratch, const NineAddresses& out, const RunTuple& where) {
              py::gil_scoped_release release;
              kernels.forward(logits(p), logits(q), transform(t), mask(flags), static_cast<Divergence>(divergence),
                              at<float>(scratch), full_kl_results(out), run(where));
          });
    m.def("full_kl_gradient",
          [kernels](const LogitsTuple& p, const LogitsTuple& q, const TransformTuple& t, Address flags, int divergence,
                    const NineAddresses& results, Address grad, Address out_p, Address out_q, const RunTuple& where) {
              py::gil_scoped_release release;
              kernels.gradient(logits(p), logits(q), transform(t), mask(flags), static_cast<Divergence>(divergence),
                               full_kl_results(results), at<float>(grad), at<void>(out_p), at<void>(out_q), run(where));
          });
}

void def_kl_estimate(py::module_& m, const KLEstimateKernels& kernels) {
    m.def("kl_estimate_forward", [kernels](Address logprobs, Address ref_logprobs, int dtype, int64_t count,
                                           Address flags, int estimate, Address out, const RunTuple& where) {
        py::gil_scoped_release release;
        kernels.forward(at<void>(logprobs), at<void>(ref_logprobs), static_cast<DType>(dtype), count, at<bool>(flags),
                        static_cast<Estimate>(estimate), at<float>(out), run(where));
    });
    m.def("kl_estimate_gradient",
          [kernels](Address logprobs, Address ref_logprobs, int dtype, int64_t count, Address flags, int estimate,
                    Address grad, Address out, Address ref_out, const RunTuple& where) {
              py::gil_scoped_release release;
              kernels.gradient(at<void>(logprobs), at<void>(ref_logprobs), static_cast<DType>(dtype), count,
                               at<bool>(flags), static_cast<Estimate>(estimate), at<float>(grad), at<void>(out),
                               at<void>(ref_out), run(where));
          });
}

void def_gae(py::module_& m, const GAEKernels& kernels) {
    m.def("gae_forward",
          [kernels](const SequencesTuple& where, const FourAddresses& paid, float kl_coef, Address values, int dtype,
                    Address flags, Address bootstrap, const std::tuple<float, float, float>& numbers,
                    const ThreeAddresses& out, const RunTuple& on) {
              const auto& [rewards, logprobs, ref_logprobs, scores] = paid;
              const auto& [gamma, lam, critic_lam] = numbers;
              const auto& [advantages, returns, sums] = out;
              const GAEInputs inputs = {
                  sequences(where),
                  {at<void>(rewards), at<void>(logprobs), at<void>(ref_logprobs), at<float>(scores), kl_coef},
                  at<void>(values),
                  static_cast<DType>(dtype),
                  at<bool>(flags),
                  at<float>(bootstrap),
                  gamma,
                  lam,
                  critic_lam};
              py::gil_scoped_release release;
              kernels.forward(inputs, {at<float>(advantages), at<float>(returns), at<double>(sums)}, run(on));
          });
}

using NineAddresses = std::tuple<Address, Address, Address, Address, Address, Address, Address, Address, Address>;
using PPOOptionsTuple = std::tuple<float, float, float, float, float, float, float, float, bool, int, int>;
using DenominatorTuple = std::tuple<Address, float>;
using SevenAddresses = std::tuple<Address, Address, Address, Address, Address, Address, Address>;

Denominator denominator(const DenominatorTuple& t) { return {at<float>(std::get<0>(t)), std::get<1>(t)}; }

void def_ppo_loss(py::module_& m, const PPOLossKernels& kernels) {
    m.attr("ppo_loss_range") = kernels.range;
    m.attr("ppo_loss_sums") = static_cast<int>(kPPOSums);
    m.def("ppo_loss_forward", [kernels](const NineAddresses& tensors, int dtype, int64_t count,
                                        const FourAddresses& others, const PPOOptionsTuple& options,
                                        const DenominatorTuple& of_terms, const DenominatorTuple& of_tokens,
                                        const SevenAddresses& out, const RunTuple& where) {
        const auto& [flags, weights, log_ratios, advantage_sums] = others;
        const PPOInputs inputs = std::apply(
            [&, flags = flags, weights = weights, log_ratios = log_ratios, sums = advantage_sums](auto... address) {
                return PPOInputs{at<void>(address)..., static_cast<DType>(dtype), count,           at<bool>(flags),
                                 at<float>(weights),   at<float>(log_ratios),     at<double>(sums)};
            },
            tensors);
        const auto& [low, high, dual, value_clip, value_coef, entropy_coef, kl_coef, cap, cispo, kl, kl_slope] =
            options;
        const PPOOptions o = {low,
                              high,
                              dual,
                              value_clip,
                              value_coef,
                              entropy_coef,
                              kl_coef,
                              cap,
                              cispo,
                              static_cast<Estimate>(kl),
                              static_cast<Estimate>(kl_slope)};
        const auto& [loss, stats, inverse, in_logprobs, in_values, in_entropy, partials] = out;
        const PPOResults results = {at<float>(loss),        at<float>(stats),     at<float>(inverse),
                                    at<float>(in_logprobs), at<float>(in_values), at<float>(in_entropy),
                                    at<double>(partials)};
        py::gil_scoped_release release;
        kernels.forward(inputs, o, denominator(of_terms), denominator(of_tokens), results, run(where));
    });
    m.def("ppo_loss_scale", [kernels](const ThreeAddresses& from, const ThreeAddresses& to, int64_t count,
                                      Address upstream, Address inverse, const RunTuple& where) {
        const auto& [a, b, c] = from;
        const auto& [to_a, to_b, to_c] = to;
        const PPOGradients gradients = {{at<float>(a), at<float>(b), at<float>(c)},
                                        {at<float>(to_a), at<float>(to_b), at<float>(to_c)},
                                        count,
                                        at<float>(upstream),
                                        at<float>(inverse)};
        py::gil_scoped_release release;
        kernels.scale(gradients, run(where));
    });
}

using PairOptionsTuple = std::tuple<int, double, double, double, double>;

void def_pair_loss(py::module_& m, const PairLossKernels& kernels) {
    m.def("pair_loss_forward",
          [kernels](const FourAddresses& tensors, int dtype, int64_t count, const ThreeAddresses& others,
                    const PairOptionsTuple& options, const std::tuple<Address, double>& divisor,
                    const ThreeAddresses& out, const RunTuple& where) {
              const auto& [chosen, rejected, ref_chosen, ref_rejected] = tensors;
              const auto& [margins, weights, kl] = others;
              const PairInputs inputs = {at<void>(chosen),       at<void>(rejected),        at<void>(ref_chosen),
                                         at<void>(ref_rejected), static_cast<DType>(dtype), count,
                                         at<float>(margins),     at<float>(weights),        at<float>(kl)};
              const auto& [kind, beta, agree, differ, center_coef] = options;
              const auto& [stats, in_chosen, in_rejected] = out;
              const auto& [there, number] = divisor;
              py::gil_scoped_release release;
              kernels.forward(inputs, {static_cast<PairLoss>(kind), beta, agree, differ, center_coef}, at<float>(there),
                              number, {at<float>(stats), at<float>(in_chosen), at<float>(in_rejected)}, run(where));
          });
}

// weight, weight_stride, rows, bias, low, up, rank, scale
using LinearTuple = std::tuple<Address, int64_t, int64_t, Address, Address, Address, int64_t, float>;
using PlaceTuple = std::tuple<Address, int64_t>;  // and the stride from row to row

void def_linear(py::module_& m, const LinearKernels& kernels) {
    m.def("linear_forward",
          [kernels](const PlaceTuple& x, int dtype, int64_t rows, int64_t k, const std::vector<LinearTuple>& parts,
                    const std::vector<PlaceTuple>& outs, const PlaceTuple& add, int gate, const RunTuple& where) {
              LinearProblem problem{
                  at<void>(std::get<0>(x)), std::get<1>(x), static_cast<DType>(dtype), rows, k, {}, 0, gate};
              for (const LinearTuple& part : parts) {
                  const auto& [weight, weight_stride, n, bias, low, up, rank, scale] = part;
                  const auto& [out, out_stride] = outs[gate != 0 ? 0 : static_cast<std::size_t>(problem.count)];
                  problem.parts[problem.count++] = {at<void>(weight),
                                                    weight_stride,
                                                    n,
                                                    at<void>(bias),
                                                    at<void>(low),
                                                    at<void>(up),
                                                    rank,
                                                    scale,
                                                    at<void>(std::get<0>(add)),
                                                    std::get<1>(add),
                                                    at<void>(out),
                                                    out_stride};
              }
              kernels.forward(problem, run(where));
          });
}

// keys, values, dtype, kv_heads, dim, width, block_size
using CacheTuple = std::tuple<Address, Address, int, int64_t, int64_t, int64_t, int64_t>;

PagedCache paged_cache(const CacheTuple& t) {
    const auto& [keys, values, dtype, kv_heads, dim, width, block_size] = t;
    return {at<void>(keys), at<void>(values), static_cast<DType>(dtype), kv_heads, dim, width, block_size};
}

void def_paged_attention(py::module_& m, const PagedAttentionKernels& kernels) {
    using Strides = std::tuple<int64_t, int64_t>;  // from token to token, from head to head
    using Where = std::tuple<Address, int64_t, Address, Address, Address, Address, int64_t>;
    using Sizes = std::tuple<int64_t, int64_t, int64_t>;  // tokens, sequences, parts of keys
    m.def("paged_attention_forward",
          [kernels](const CacheTuple& cache, Address query, const Strides& strides, int64_t heads, const Where& t,
                    float scale, float softcap, int64_t window, Address sinks, Address out, const Sizes& sizes,
                    Address parts, const RunTuple& where) {
              const auto& [tables, table_stride, cu_queries, contexts, groups, shared, count] = t;
              const auto& [tokens, sequences, number_of_parts] = sizes;
              kernels.forward(paged_cache(cache),
                              {at<void>(query),
                               std::get<0>(strides),
                               std::get<1>(strides),
                               heads,
                               at<int32_t>(tables),
                               table_stride,
                               at<int32_t>(cu_queries),
                               at<int32_t>(contexts),
                               at<int32_t>(groups),
                               at<int32_t>(shared),
                               count,
                               scale,
                               softcap,
                               window,
                               at<float>(sinks),
                               at<void>(out),
                               tokens,
                               sequences,
                               at<float>(parts),
                               number_of_parts},
                              run(where));
          });
    m.def("write_kv_forward", [kernels](const CacheTuple& cache, Address key, const Strides& key_strides, Address value,
                                        const Strides& value_strides, Address slots, int64_t count, Address cos,
                                        Address sin, Address query, const Strides& query_strides, int64_t heads,
                                        const RunTuple& where) {
        kernels.write(paged_cache(cache),
                      {at<void>(key), at<void>(value), std::get<0>(key_strides), std::get<1>(key_strides),
                       std::get<0>(value_strides), std::get<1>(value_strides), at<int64_t>(slots), count, at<void>(cos),
                       at<void>(sin), at<void>(query), std::get<0>(query_strides), std::get<1>(query_strides), heads},
                      run(where));
    });
    m.attr("paged_attention_most_keys") = kMostKeys;
    m.attr("paged_attention_most_dim") = kMostDim;
    m.attr("paged_attention_part") = kPartOfKeys;
}

void def_rms_norm(py::module_& m, const RMSNormKernels& kernels) {
    m.def("rms_norm_forward", [kernels](Address x, int64_t stride, Address weight, Address out, int dtype, int64_t rows,
                                        int64_t columns, float eps, float offset, const RunTuple& where) {
        kernels.forward({at<void>(x), stride, at<void>(weight), at<void>(out), static_cast<DType>(dtype), rows, columns,
                         eps, offset},
                        run(where));
    });
}

void def_sample(py::module_& m, const SampleKernels& kernels) {
    using Options = std::tuple<Address, Address, Address, Address, Address>;
    m.def("sample_forward", [kernels](Address logits, int dtype, int64_t rows, int64_t columns, int64_t stride,
                                      const Options& options, const FourAddresses& results, const RunTuple& where) {
        const auto& [temperature, top_k, top_p, min_p, uniform] = options;
        const auto& [tokens, logprobs, kept, entropy] = results;
        kernels.forward({at<void>(logits), static_cast<DType>(dtype), rows, columns, stride, at<float>(temperature),
                         at<int32_t>(top_k), at<float>(top_p), at<float>(min_p), at<double>(uniform)},
                        {at<int64_t>(tokens), at<float>(logprobs), at<float>(kept), at<float>(entropy)}, run(where));
    });
}

void def_sequence_sum(py::module_& m, const SequenceSumKernels& kernels) {
    m.def("sequence_sum_forward",
          [kernels](const SequencesTuple& where, Address x, int dtype, Address flags, Address out, const RunTuple& on) {
              py::gil_scoped_release release;
              kernels.forward(sequences(where), at<void>(x), static_cast<DType>(dtype), at<bool>(flags), at<float>(out),
                              run(on));
          });
}

void def_group_advantages(py::module_& m, const GroupAdvantagesKernels& kernels) {
    m.def("group_advantages_forward", [kernels](const SequencesTuple& where, Address rewards, int dtype, Address flags,
                                                int kind, double eps, Address out, const RunTuple& on) {
        const GroupInputs inputs = {sequences(where),
                                    at<void>(rewards),
                                    static_cast<DType>(dtype),
                                    at<bool>(flags),
                                    static_cast<GroupKind>(kind),
                                    eps};
        py::gil_scoped_release release;
        kernels.forward(inputs, at<float>(out), run(on));
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
        [](const TokensTuple& token, Address flags, int64_t rows, int64_t vocabulary) {
            return first_outside(tokens(token), mask(flags), rows, vocabulary);
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
    def_token_logprobs(on_cpu, cpu::token_logprobs);
    def_full_kl(on_cpu, cpu::full_kl);
    def_kl_estimate(on_cpu, cpu::kl_estimate);
    def_linear(on_cpu, cpu::linear);
    def_paged_attention(on_cpu, cpu::paged_attention);
    def_rms_norm(on_cpu, cpu::rms_norm);
    def_sample(on_cpu, cpu::sample);
    def_gae(on_cpu, cpu::gae);
    def_ppo_loss(on_cpu, cpu::ppo_loss);
    def_pair_loss(on_cpu, cpu::pair_loss);
    def_sequence_sum(on_cpu, cpu::sequence_sum);
    def_group_advantages(on_cpu, cpu::group_advantages);
#endif
#if defined(RLHF_FAST_CUDA)
    py::module_ on_cuda = m.def_submodule("cuda", "Kernels on memory of a CUDA device.");
    on_cuda.attr("token_logprobs_segment") = cuda::kTokenLogprobsSegment;
    on_cuda.attr("full_kl_segment") = cuda::kFullKLSegment;
    on_cuda.attr("full_kl_state") = cuda::kFullKLState;
    def_token_logprobs(on_cuda, cuda::token_logprobs);
    def_full_kl(on_cuda, cuda::full_kl);
    def_kl_estimate(on_cuda, cuda::kl_estimate);
    def_paged_attention(on_cuda, cuda::paged_attention);
    def_sample(on_cuda, cuda::sample);
    def_gae(on_cuda, cuda::gae);
    def_ppo_loss(on_cuda, cuda::ppo_loss);
    def_pair_loss(on_cuda, cuda::pair_loss);
    def_sequence_sum(on_cuda, cuda::sequence_sum);
    def_group_advantages(on_cuda, cuda::group_advantages);
#endif
}
