// exp, expm1 and tanh on sixteen lanes. Included by each kernel file below foreach_isa.h, once per instruction set like
// simd.h, so there is no include guard. tests/cpu/math.cpp holds it to the errors claimed here.
//
// exp(x) = 2^n e^r with n = round(x / ln 2), and e^r = 1 + r + r^2 q(r) on |r| <= ln(2) / 2, with q of degree 4 by
// Remez exchange: 3e-9 off, a twentieth of a rounding.

namespace rlhf_fast::SIMD_ISA {
namespace {

constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer, ties to even, and leaves that in the low bits
constexpr float kLog2E = 0x1.715476p0f;
constexpr float kLn2High = 0x1.62e4p-1f;  // 15 bits: its products with n are exact
constexpr float kLn2Low = 0x1.7f7d1cp-20f;
constexpr float kExpLeast = -87.33654f;  // below, the result is no normal number

SIMD_INLINE f32x16 q_of(f32x16 r) {
    f32x16 q = fma(r, set1(0x1.6a23d0p-10f), set1(0x1.123a20p-7f));
    q = fma(q, r, set1(0x1.5558f2p-5f));
    q = fma(q, r, set1(0x1.555492p-3f));
    return fma(q, r, set1(0x1.fffffcp-2f));
}

// 2^y for -250 <= y <= 126, and 0 below -128; garbage for nan. With y = x / ln 2 it is e^x to within 1.2e-7 + 9e-8 |x|
// of it: the shortest way, for sums of probabilities, where the terms far below the largest need not be as exact.
// Without `Deep`, y >= -126.
template <bool Deep>
SIMD_INLINE f32x16 exp2(f32x16 y) {
    const f32x16 t = add(y, set1(kMagic));
    const f32x16 f = sub(y, sub(t, set1(kMagic)));
    f32x16 p = fma(f, set1(0x1.41fb2ep-13f), set1(0x1.5f3f30p-10f));  // 2^f = 1 + f p, by Remez: 2e-9
    p = fma(p, f, set1(0x1.3b2d50p-7f));
    p = fma(p, f, set1(0x1.c6aee6p-5f));
    p = fma(p, f, set1(0x1.ebfbdcp-3f));
    p = fma(p, f, set1(0x1.62e430p-1f));
    p = fma(p, f, set1(1.0f));
    return Deep ? times_power_of_two_or_0(p, t) : times_power_of_two(p, t);
}

// x as n ln 2 + r; returns n + kMagic.
SIMD_INLINE f32x16 reduce_by_ln2(f32x16 x, f32x16& r) {
    const f32x16 t = fma(x, set1(kLog2E), set1(kMagic));
    const f32x16 n = sub(t, set1(kMagic));
    r = fma(n, set1(-kLn2Low), fma(n, set1(-kLn2High), x));
    return t;
}

// e^x for x <= 88 to 1 unit in the last place (1.2 on the baseline, which rounds products); 0 where it would be
// subnormal, nan for nan.
SIMD_INLINE f32x16 exp(f32x16 x) {
    f32x16 r;
    const f32x16 t = reduce_by_ln2(x, r);
    const f32x16 e = fma(fma(q_of(r), r, set1(1.0f)), r, set1(1.0f));
    return select(less(x, set1(kExpLeast)), set1(0.0f), mul(e, power_of_two(t)));
}

// e^x - 1 to 2 units, near 0 too; inf above 88.8, nan for nan.
SIMD_INLINE f32x16 expm1(f32x16 x) {
    const f32x16 low = max(set1(-40.0f), x);  // -1 in float already
    const f32x16 bounded = select(less(set1(89.0f), low), set1(89.0f), low);
    f32x16 r;
    const f32x16 t = reduce_by_ln2(bounded, r);
    const f32x16 e = fma(mul(q_of(r), r), r, r);           // e^r - 1
    const f32x16 half = power_of_two(sub(t, set1(1.0f)));  // 2^(n - 1), since 2^n itself may be out of range
    const f32x16 scaled = fma(half, e, sub(half, set1(0.5f)));
    return add(scaled, scaled);
}

// To 4 units; nan for nan.
SIMD_INLINE f32x16 tanh(f32x16 x) {
    const f32x16 size = max(x, sub(set1(0.0f), x));
    const f32x16 e = expm1(mul(size, set1(-2.0f)));
    const f32x16 out = div(sub(set1(0.0f), e), add(set1(2.0f), e));
    return select(less(x, set1(0.0f)), sub(set1(0.0f), out), out);
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA
