// rlhf_fast._C: what the compiled kernels look like from Python. Integers, pointers and names in, plain values out;
// no torch headers, so one build serves every torch. std::invalid_argument arrives in Python as ValueError.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

py::list isa_available() {
    py::list names;
    for (rlhf_fast::Isa isa : rlhf_fast::isa_available()) names.append(rlhf_fast::isa_name(isa));
    return names;
}

py::dict cpu_features() {
    py::dict features;
    for (const auto& [name, present] : rlhf_fast::cpu_features()) features[name.c_str()] = present;
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
    info["compiler"] = name + std::to_string(version[0]) + "." + std::to_string(version[1]) + "." + std::to_string(version[2]);
    info["cpp_standard"] = "C++" + std::to_string(__cplusplus / 100 % 100);
    info["cuda"] = false;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of rlhf-fast.";
    m.def("isa", [] { return rlhf_fast::isa_name(rlhf_fast::isa()); },
          "Instruction set in use: the best this CPU has, or the one RLHF_FAST_ISA names (read on first use).");
    m.def("isa_available", &isa_available, "Instruction sets this CPU can run, best first.");
    m.def("cpu_features", &cpu_features, "Presence of each CPU feature that matters to kernels.");
    m.def("build_info", &build_info, "Compiler, C++ standard, and whether CUDA kernels were built.");
}
