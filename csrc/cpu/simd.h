// Sixteen floats at a time: the same operations, in the same order, on every instruction set.
//
// foreach_isa.h includes this once for each set, inside its target region, so there is no include guard. An f32x16 is
// one register of AVX-512, two of AVX2, four of NEON and SSE2. Everything works lane by lane and every reduction is one
// fixed tree, so AVX-512, AVX2 and NEON give the same bits; the baseline has no fused multiply-add and rounds twice.
//
// Two layers: the few operations that one register offers, written for each set, and f32x16 on top, written once.

namespace rlhf_fast::SIMD_ISA {
namespace {

#if !defined(SIMD_INLINE)
#define SIMD_INLINE inline __attribute__((always_inline))
#define SIMD_INLINE_LAMBDA __attribute__((always_inline))  // a call would take the vectors through memory
#endif

// --- one register ----------------------------------------------------------------------------------------------------
// max(a, b) is `a > b ? a : b` exactly, and min alike: b where either is nan. less(a, b) is false where either is nan.
// power_of_two(t), for t = n + 1.5 * 2^23 with an integer n from -126 to 127, is 2^n: the low bits of t hold n.
// times_power_of_two(a, t), for an a near 1 and n from -125 to 126, is a 2^n; times_power_of_two_or_0 takes n from
// -250, and is 0 from -128 down.
//
// slide<k>(a, b) is the register that starts k lanes into a and ends in b; first_everywhere(a) is lane 0 in all lanes.
//
// bfloat16 and float16 round to nearest, ties to even, and keep nan.

#if defined(SIMD_AVX512)

using reg = __m512;
using reg_mask = __mmask16;
constexpr int kRegLanes = 16;

SIMD_INLINE reg load(const float* p) { return _mm512_loadu_ps(p); }
SIMD_INLINE void store(float* p, reg a) { _mm512_storeu_ps(p, a); }
SIMD_INLINE reg set1_reg(float x) { return _mm512_set1_ps(x); }
SIMD_INLINE reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
SIMD_INLINE reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
SIMD_INLINE reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
SIMD_INLINE reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
SIMD_INLINE reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
SIMD_INLINE reg min(reg a, reg b) { return _mm512_min_ps(a, b); }
SIMD_INLINE reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
SIMD_INLINE reg_mask less(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
SIMD_INLINE reg select(reg_mask m, reg a, reg b) { return _mm512_mask_blend_ps(m, b, a); }
template <int k>
SIMD_INLINE reg slide(reg a, reg b) {
    return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(b), _mm512_castps_si512(a), k));
}
SIMD_INLINE reg first_everywhere(reg a) { return _mm512_broadcastss_ps(_mm512_castps512_ps128(a)); }
SIMD_INLINE reg power_of_two(reg t) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)));
}
SIMD_INLINE reg times_power_of_two(reg a, reg t) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_castps_si512(a)));
}
SIMD_INLINE reg times_power_of_two_or_0(reg a, reg t) {
    const __m512i bits = _mm512_castps_si512(times_power_of_two(a, t));
    return _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_setzero_si512()));
}
SIMD_INLINE reg load(const bf16* p) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
SIMD_INLINE void store(bf16* p, reg a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
SIMD_INLINE reg load(const bool* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
SIMD_INLINE reg load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
SIMD_INLINE void store(f16* p, reg a) {
    const __m256i narrow = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}

// Lanes i and i + 8 of a added, beside those of b.
SIMD_INLINE reg halves(reg a, reg b) { return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); }
// The sums of four registers, each as reduce_add has it.
SIMD_INLINE void sums_of_four(reg a, reg b, reg c, reg d, float* out) {
    const reg ab = halves(a, b), cd = halves(c, d);
    reg s = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    s = add(s, _mm512_permute_ps(s, 0x4e));
    s = add(s, _mm512_permute_ps(s, 0xb1));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s)));
}

#elif defined(SIMD_AVX2)

using reg = __m256;
using reg_mask = __m256;
constexpr int kRegLanes = 8;

SIMD_INLINE reg load(const float* p) { return _mm256_loadu_ps(p); }
SIMD_INLINE void store(float* p, reg a) { _mm256_storeu_ps(p, a); }
SIMD_INLINE reg set1_reg(float x) { return _mm256_set1_ps(x); }
SIMD_INLINE reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
SIMD_INLINE reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
SIMD_INLINE reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
SIMD_INLINE reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
SIMD_INLINE reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
SIMD_INLINE reg min(reg a, reg b) { return _mm256_min_ps(a, b); }
SIMD_INLINE reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
SIMD_INLINE reg_mask less(reg a, reg b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
SIMD_INLINE reg select(reg_mask m, reg a, reg b) { return _mm256_blendv_ps(b, a, m); }
template <int k>
SIMD_INLINE reg slide(reg a, reg b) {
    const __m256i low = _mm256_castps_si256(a), high = _mm256_castps_si256(b);
    const __m256i middle = _mm256_permute2x128_si256(low, high, 0x21);
    if (k == 0) return a;
    if (k < 4) return _mm256_castsi256_ps(_mm256_alignr_epi8(middle, low, 4 * k % 16));
    if (k == 4) return _mm256_castsi256_ps(middle);
    return _mm256_castsi256_ps(_mm256_alignr_epi8(high, middle, 4 * k % 16));
}
SIMD_INLINE reg first_everywhere(reg a) { return _mm256_broadcastss_ps(_mm256_castps256_ps128(a)); }
SIMD_INLINE reg power_of_two(reg t) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
}
SIMD_INLINE reg times_power_of_two(reg a, reg t) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(a)));
}
SIMD_INLINE reg times_power_of_two_or_0(reg a, reg t) {
    const __m256i bits = _mm256_castps_si256(times_power_of_two(a, t));
    return _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_setzero_si256()));
}
SIMD_INLINE reg load(const bf16* p) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
SIMD_INLINE void store(bf16* p, reg a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
SIMD_INLINE reg load(const bool* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
SIMD_INLINE reg load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
SIMD_INLINE void store(f16* p, reg a) {
    const __m128i narrow = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}

SIMD_INLINE reg halves(reg a, reg b) {
    return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
SIMD_INLINE void sums_of_four(reg a, reg b, reg c, reg d, float* out) {
    reg ab = halves(a, b), cd = halves(c, d);
    ab = add(ab, _mm256_permute_ps(ab, 0x4e)), cd = add(cd, _mm256_permute_ps(cd, 0x4e));
    ab = add(ab, _mm256_permute_ps(ab, 0xb1)), cd = add(cd, _mm256_permute_ps(cd, 0xb1));
    float lanes[2 * kRegLanes];
    store(lanes, ab), store(lanes + kRegLanes, cd);
    for (int i = 0; i < 4; ++i) out[i] = lanes[4 * i];
}

#elif defined(SIMD_NEON)

using reg = float32x4_t;
using reg_mask = uint32x4_t;
constexpr int kRegLanes = 4;

SIMD_INLINE reg load(const float* p) { return vld1q_f32(p); }
SIMD_INLINE void store(float* p, reg a) { vst1q_f32(p, a); }
SIMD_INLINE reg set1_reg(float x) { return vdupq_n_f32(x); }
SIMD_INLINE reg add(reg a, reg b) { return vaddq_f32(a, b); }
SIMD_INLINE reg sub(reg a, reg b) { return vsubq_f32(a, b); }
SIMD_INLINE reg mul(reg a, reg b) { return vmulq_f32(a, b); }
SIMD_INLINE reg div(reg a, reg b) { return vdivq_f32(a, b); }
SIMD_INLINE reg max(reg a, reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
SIMD_INLINE reg min(reg a, reg b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
SIMD_INLINE reg fma(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
SIMD_INLINE reg_mask less(reg a, reg b) { return vcltq_f32(a, b); }
SIMD_INLINE reg select(reg_mask m, reg a, reg b) { return vbslq_f32(m, a, b); }
template <int k>
SIMD_INLINE reg slide(reg a, reg b) {
    return vextq_f32(a, b, k);
}
SIMD_INLINE reg first_everywhere(reg a) { return vdupq_laneq_f32(a, 0); }
SIMD_INLINE reg power_of_two(reg t) {
    const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(t), 23);
    return vreinterpretq_f32_u32(vaddq_u32(exponent, vdupq_n_u32(0x3f800000u)));
}
SIMD_INLINE reg times_power_of_two(reg a, reg t) {
    const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(t), 23);
    return vreinterpretq_f32_s32(vaddq_s32(exponent, vreinterpretq_s32_f32(a)));
}
SIMD_INLINE reg times_power_of_two_or_0(reg a, reg t) {
    const int32x4_t bits = vreinterpretq_s32_f32(times_power_of_two(a, t));
    return vreinterpretq_f32_s32(vmaxq_s32(bits, vdupq_n_s32(0)));
}
SIMD_INLINE reg load(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
SIMD_INLINE void store(bf16* p, reg a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t number = vceqq_f32(a, a);
    const uint32x4_t high = vbslq_u32(number, vshrq_n_u32(rounded, 16), vdupq_n_u32(0x7fc0));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(high));
}
SIMD_INLINE reg load(const bool* p) {
    const float lanes[4] = {to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
    return vld1q_f32(lanes);
}
SIMD_INLINE reg load(const f16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
SIMD_INLINE void store(f16* p, reg a) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a)));
}

SIMD_INLINE void sums_of_four(reg a, reg b, reg c, reg d, float* out) {
    const reg all[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
        const reg pairs = add(all[i], vextq_f32(all[i], all[i], 2));
        out[i] = vgetq_lane_f32(pairs, 0) + vgetq_lane_f32(pairs, 1);
    }
}

#else  // baseline: the compiler's own vectors of four, SSE2 on x86-64

typedef float reg __attribute__((vector_size(16)));
typedef int32_t reg_mask __attribute__((vector_size(16)));
typedef uint32_t reg_bits __attribute__((vector_size(16)));
constexpr int kRegLanes = 4;

SIMD_INLINE reg load(const float* p) {
    reg a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
SIMD_INLINE void store(float* p, reg a) { std::memcpy(p, &a, sizeof a); }
SIMD_INLINE reg set1_reg(float x) { return reg{x, x, x, x}; }
SIMD_INLINE reg add(reg a, reg b) { return a + b; }
SIMD_INLINE reg sub(reg a, reg b) { return a - b; }
SIMD_INLINE reg mul(reg a, reg b) { return a * b; }
SIMD_INLINE reg div(reg a, reg b) { return a / b; }
SIMD_INLINE reg fma(reg a, reg b, reg c) { return a * b + c; }
SIMD_INLINE reg_mask less(reg a, reg b) { return a < b; }
SIMD_INLINE reg select(reg_mask m, reg a, reg b) { return (reg)(((reg_mask)a & m) | ((reg_mask)b & ~m)); }
SIMD_INLINE reg max(reg a, reg b) { return select(a > b, a, b); }
SIMD_INLINE reg min(reg a, reg b) { return select(a < b, a, b); }
template <int k>
SIMD_INLINE reg slide(reg a, reg b) {
    reg out;
    for (int i = 0; i < kRegLanes; ++i) out[i] = i + k < kRegLanes ? a[i + k] : b[i + k - kRegLanes];
    return out;
}
SIMD_INLINE reg first_everywhere(reg a) { return set1_reg(a[0]); }
SIMD_INLINE reg power_of_two(reg t) { return (reg)(((reg_bits)t << 23) + 0x3f800000u); }
SIMD_INLINE reg times_power_of_two(reg a, reg t) { return (reg)(((reg_bits)t << 23) + (reg_bits)a); }
SIMD_INLINE reg times_power_of_two_or_0(reg a, reg t) {
    const reg_mask bits = (reg_mask)times_power_of_two(a, t);
    return (reg)(bits & (bits > 0));
}
template <class T>
SIMD_INLINE reg load(const T* p) {
    return reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
SIMD_INLINE void store(T* p, reg a) {
    for (int i = 0; i < kRegLanes; ++i) p[i] = from_float<T>(a[i]);
}

SIMD_INLINE void sums_of_four(reg a, reg b, reg c, reg d, float* out) {
    const reg all[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) out[i] = (all[i][0] + all[i][2]) + (all[i][1] + all[i][3]);
}

#endif

// --- sixteen lanes ---------------------------------------------------------------------------------------------------

constexpr int kLanes = 16;
constexpr int kRegs = kLanes / kRegLanes;

struct f32x16 {
    reg r[kRegs];
};
struct mask16 {
    reg_mask r[kRegs];
};

#define SIMD_EACH_REG(i) _Pragma("GCC unroll 4") for (int i = 0; i < kRegs; ++i)

template <class T>
SIMD_INLINE f32x16 load16(const T* p) {
    f32x16 out;
    SIMD_EACH_REG(i) out.r[i] = load(p + i * kRegLanes);
    return out;
}
template <class T>
SIMD_INLINE void store16(T* p, f32x16 a) {
    SIMD_EACH_REG(i) store(p + i * kRegLanes, a.r[i]);
}
SIMD_INLINE f32x16 set1(float x) {
    f32x16 out;
    SIMD_EACH_REG(i) out.r[i] = set1_reg(x);
    return out;
}

#define SIMD_BINARY(name)                                 \
    SIMD_INLINE f32x16 name(f32x16 a, f32x16 b) {         \
        f32x16 out;                                       \
        SIMD_EACH_REG(i) out.r[i] = name(a.r[i], b.r[i]); \
        return out;                                       \
    }
SIMD_BINARY(add)
SIMD_BINARY(sub)
SIMD_BINARY(mul)
SIMD_BINARY(div)
SIMD_BINARY(max)
SIMD_BINARY(min)
SIMD_BINARY(times_power_of_two)
SIMD_BINARY(times_power_of_two_or_0)
#undef SIMD_BINARY

// a * b + c, rounded once where the instruction set can.
SIMD_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    f32x16 out;
    SIMD_EACH_REG(i) out.r[i] = fma(a.r[i], b.r[i], c.r[i]);
    return out;
}
SIMD_INLINE mask16 less(f32x16 a, f32x16 b) {
    mask16 out;
    SIMD_EACH_REG(i) out.r[i] = less(a.r[i], b.r[i]);
    return out;
}
// a where m, b elsewhere.
SIMD_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) {
    f32x16 out;
    SIMD_EACH_REG(i) out.r[i] = select(m.r[i], a.r[i], b.r[i]);
    return out;
}
SIMD_INLINE f32x16 power_of_two(f32x16 t) {
    f32x16 out;
    SIMD_EACH_REG(i) out.r[i] = power_of_two(t.r[i]);
    return out;
}

// Lanes k to 15 of a, then the first k of b.
template <int k>
SIMD_INLINE f32x16 slide(f32x16 a, f32x16 b) {
    const auto part = [&](int i) SIMD_INLINE_LAMBDA { return i < kRegs ? a.r[i] : b.r[i - kRegs]; };
    f32x16 out;
    SIMD_EACH_REG(i)
        out.r[i] = slide<k % kRegLanes>(part(i + k / kRegLanes), part((i + k / kRegLanes + 1) % (2 * kRegs)));
    return out;
}
SIMD_INLINE f32x16 first_everywhere(f32x16 a) {
    f32x16 out;
    SIMD_EACH_REG(i) out.r[i] = first_everywhere(a.r[0]);
    return out;
}

// The first n < 16 elements at p, and `fill` in the others.
template <class T>
SIMD_INLINE f32x16 load_first(const T* p, int64_t n, float fill) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
    return load16(lanes);
}
// a in the first n < 16 lanes, and `fill` in the others.
SIMD_INLINE f32x16 keep_first(f32x16 a, int64_t n, float fill) {
    float lanes[kLanes];
    store16(lanes, a);
    return load_first(lanes, n, fill);
}
template <class T>
SIMD_INLINE void store_first(T* p, int64_t n, f32x16 a) {
    T lanes[kLanes];
    store16(lanes, a);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
SIMD_INLINE float first_lane(f32x16 a) {
    float lanes[kLanes];
    store16(lanes, a);
    return lanes[0];
}

// ((0+8)+(4+12)) + ... : halves are added until one lane is left.
SIMD_INLINE float reduce_add(f32x16 a) {
    float lanes[kLanes];
    store16(lanes, a);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
// Of up to four vectors at once, the same bits.
template <int n>
SIMD_INLINE void reduce_add(const f32x16 (&a)[n], float* out) {
    reg all[4];
    for (int i = 0; i < 4; ++i) {
        f32x16 one = a[i < n ? i : 0];
        for (int half = kRegs / 2; half > 0; half /= 2)
            for (int j = 0; j < half; ++j) one.r[j] = add(one.r[j], one.r[j + half]);
        all[i] = one.r[0];
    }
    if (n == 4) return sums_of_four(all[0], all[1], all[2], all[3], out);
    float sums[4];
    sums_of_four(all[0], all[1], all[2], all[3], sums);
    for (int i = 0; i < n; ++i) out[i] = sums[i];
}
SIMD_INLINE float reduce_max(f32x16 a) {
    float lanes[kLanes];
    store16(lanes, a);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

template <class Type>
struct Tag {
    using type = Type;
};

// Calls body(Tag<element>).
template <class Body>
inline void with_element(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::bf16: return body(Tag<bf16>());
        case DType::f16: return body(Tag<f16>());
        case DType::f32: return body(Tag<float>());
    }
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA
