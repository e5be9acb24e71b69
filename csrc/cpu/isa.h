// Which instruction set the CPU kernels use. Knows nothing about any kernel.
//
// Every kernel is compiled once per instruction set and chosen through isa() when it is called, so one build
// runs on every machine of its architecture.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace rlhf_fast {

enum class Isa {
    baseline,  // what the platform's ABI guarantees (SSE2 on x86-64)
    neon,      // aarch64, where NEON is what the ABI guarantees: there is no separate baseline
    avx2,      // AVX2 + FMA + F16C
    avx512,    // AVX-512 F + BW + DQ + VL
};

const char* isa_name(Isa isa);

// What this CPU and its operating system can run, best first.
const std::vector<Isa>& isa_available();

// The one in use: the best available, or the one that RLHF_FAST_ISA names. Decided on the first call that
// succeeds. Throws std::invalid_argument if the variable names one that is unknown or not available.
Isa isa();

// Name and presence of the features that matter to kernels, in a fixed order. Empty where none are known.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace rlhf_fast
