// What a token says about KL(p || q), from d = log p - log q. Included by kernel files below math.h, once per
// instruction set, so there is no include guard.

namespace rlhf_fast::SIMD_ISA {
namespace {

// e^x - 1 - x. Near 0 by its own series, since expm1(x) - x would leave only rounding errors there.
SIMD_INLINE f32x16 expm1_minus(f32x16 x) {
    f32x16 series = fma(x, set1(0x1.a0c634p-16f), set1(0x1.a2a1f0p-13f));  // by Remez on |x| <= 1/2: 7e-10
    series = fma(series, x, set1(0x1.6c17c6p-10f));
    series = fma(series, x, set1(0x1.110fcep-7f));
    series = fma(series, x, set1(0x1.555554p-5f));
    series = fma(series, x, set1(0x1.555556p-3f));
    series = fma(series, x, set1(0x1p-1f));
    const f32x16 size = max(x, sub(set1(0.0f), x));
    return select(less(size, set1(0.5f)), mul(mul(x, x), series), sub(expm1(x), x));
}

SIMD_INLINE f32x16 estimate(Estimate kind, f32x16 d) {
    if (kind == Estimate::k1) return d;
    if (kind == Estimate::k2) return mul(mul(d, d), set1(0.5f));
    return expm1_minus(sub(set1(0.0f), d));
}

SIMD_INLINE f32x16 slope(Estimate kind, f32x16 d) {
    if (kind == Estimate::k1) return set1(1.0f);
    if (kind == Estimate::k2) return d;
    return sub(set1(0.0f), expm1(sub(set1(0.0f), d)));
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA
