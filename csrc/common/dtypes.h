// The element types of logits, and how one element becomes a float and back. Knows nothing of vectors or torch.
#pragma once

#include <cstdint>
#include <cstring>

// What a CUDA kernel may call too.
#if defined(__CUDACC__)
#define RLHF_FAST_HOST_DEVICE __host__ __device__
#else
#define RLHF_FAST_HOST_DEVICE
#endif

namespace rlhf_fast {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };  // the numbers that Python passes

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

RLHF_FAST_HOST_DEVICE inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

RLHF_FAST_HOST_DEVICE inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bool x) { return x ? 1.0f : 0.0f; }
inline float to_float(bf16 x) { return float_of(uint32_t{x.bits} << 16); }

inline float to_float(f16 x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude << 13));             // inf, nan
    if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + ((127u - 15u) << 23)));  // normal
    const float tiny = static_cast<float>(magnitude) * 0x1p-24f;                                   // subnormal, zero
    return float_of(sign | bits_of(tiny));
}

// To nearest, ties to even, like torch; nan stays nan.
template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

template <>
inline bf16 from_float<bf16>(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline f16 from_float<f16>(float x) {
    const uint32_t bits = bits_of(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to inf
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the bottom
        const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f);
        return {static_cast<uint16_t>(sign | (rounded & 0x7ffu))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - ((127u - 15u) << 23)) >> 13))};
}

}  // namespace rlhf_fast
