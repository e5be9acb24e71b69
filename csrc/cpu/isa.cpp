#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rlhf_fast {
namespace {

constexpr Isa kAll[] = {Isa::avx512, Isa::avx2, Isa::neon, Isa::baseline};

#if defined(__x86_64__)

// __builtin_cpu_supports answers for the CPU and the operating system together (an OS that does not save the wide
// registers makes it say no), but clang before 19 does not know the names "f16c" and "amx-*". Those come from
// cpuid; F16C counts only beside AVX2, which vouches for the registers, and AMX asks the OS itself.

enum Register { eax, ebx, ecx, edx };

bool cpuid_bit(unsigned leaf, Register which, int bit) {
    unsigned registers[4] = {};
    return __get_cpuid_count(leaf, 0, &registers[eax], &registers[ebx], &registers[ecx], &registers[edx]) != 0 &&
           ((registers[which] >> bit) & 1u) != 0;
}

bool os_saves_amx_tiles() {
    if (!cpuid_bit(1, ecx, 27)) return false;  // OSXSAVE: without it xgetbv is an illegal instruction
    unsigned low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTileState = 3u << 17;  // tile configuration and tile data
    return (low & kTileState) == kTileState;
}

bool has_f16c() { return __builtin_cpu_supports("avx2") && cpuid_bit(1, ecx, 29); }

std::vector<Isa> detect() {
    __builtin_cpu_init();
    std::vector<Isa> found;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(Isa::avx512);
    }
    if (avx2) found.push_back(Isa::avx2);
    found.push_back(Isa::baseline);
    return found;
}

#elif defined(__aarch64__)

std::vector<Isa> detect() { return {Isa::neon}; }

#else

std::vector<Isa> detect() { return {Isa::baseline}; }

#endif

template <class Names>
std::string join(const Names& isas) {
    std::string text;
    for (Isa one : isas) {
        if (!text.empty()) text += ", ";
        text += isa_name(one);
    }
    return text;
}

Isa choose() {
    const std::vector<Isa>& available = isa_available();
    const char* wanted = std::getenv("RLHF_FAST_ISA");
    if (wanted == nullptr || *wanted == '\0') return available.front();
    const std::string name = wanted;
    for (Isa one : available) {
        if (name == isa_name(one)) return one;
    }
    bool known = false;
    for (Isa one : kAll) known = known || name == isa_name(one);
    throw std::invalid_argument("RLHF_FAST_ISA: '" + name + "' is " +
                                (known ? "not supported by this CPU" : "unknown (known: " + join(kAll) + ")") +
                                "; expected one that this CPU has: " + join(available));
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::neon: return "neon";
        case Isa::baseline: return "baseline";
    }
    return "unknown";
}

const std::vector<Isa>& isa_available() {
    static const std::vector<Isa> found = detect();
    return found;
}

Isa isa() {
    static const Isa chosen = choose();  // if choose() throws, the next call tries again
    return chosen;
}

std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool amx = os_saves_amx_tiles();
    return {
        {"avx2", __builtin_cpu_supports("avx2") != 0},
        {"fma", __builtin_cpu_supports("fma") != 0},
        {"f16c", has_f16c()},
        {"avx512f", __builtin_cpu_supports("avx512f") != 0},
        {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
        {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
        {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
        {"avx512vnni", __builtin_cpu_supports("avx512vnni") != 0},
        {"avx512bf16", __builtin_cpu_supports("avx512bf16") != 0},
        {"amx_tile", amx && cpuid_bit(7, edx, 24)},
        {"amx_bf16", amx && cpuid_bit(7, edx, 22)},
        {"amx_int8", amx && cpuid_bit(7, edx, 25)},
    };
#elif defined(__aarch64__)
    return {{"neon", true}};
#else
    return {};
#endif
}

}  // namespace rlhf_fast
