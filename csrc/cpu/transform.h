// From a raw logit x to z and back to dz/dx, in the three forms that kernels are compiled for. Included by kernel files
// below math.h, once per instruction set, so there is no include guard.

namespace rlhf_fast::SIMD_ISA {
namespace {

// a / b, rounded like a division, for a b that stays: a multiplication and two corrections. `inverse` is 1 / b.
SIMD_INLINE f32x16 divide(f32x16 a, f32x16 b, f32x16 inverse) {
    const f32x16 quotient = mul(a, inverse);
    const f32x16 remainder = fma(sub(set1(0.0f), quotient), b, a);
    const f32x16 corrected = fma(remainder, inverse, quotient);
    return select(less(quotient, set1(-3e38f)), quotient, corrected);  // -inf stays -inf; its remainder is nan
}

struct Identity {
    Identity(const Transform&, int64_t) {}
    SIMD_INLINE f32x16 z(f32x16 x) const { return x; }
    SIMD_INLINE f32x16 chain(f32x16 gradient, f32x16) const { return gradient; }
};

struct Scaled {
    f32x16 scale, temperature, inverse, slope;
    Scaled(const Transform& t, int64_t row)
        : scale(set1(t.scale)),
          temperature(set1(t.temperature_of(row))),
          inverse(set1(1.0f / t.temperature_of(row))),
          slope(set1(t.scale / t.temperature_of(row))) {}
    SIMD_INLINE f32x16 z(f32x16 x) const { return divide(mul(x, scale), temperature, inverse); }
    SIMD_INLINE f32x16 chain(f32x16 gradient, f32x16) const { return mul(gradient, slope); }
};

struct Capped {
    Scaled scaled;
    f32x16 softcap;
    Capped(const Transform& t, int64_t row) : scaled(t, row), softcap(set1(t.softcap)) {}
    SIMD_INLINE f32x16 z(f32x16 x) const {
        const f32x16 share = tanh(div(mul(x, scaled.scale), softcap));
        return divide(mul(softcap, share), scaled.temperature, scaled.inverse);
    }
    // 1 - tanh(y)^2 as 4 e / (1 + e)^2 with e = exp(-2 |y|), which keeps its digits where tanh is nearly 1.
    SIMD_INLINE f32x16 chain(f32x16 gradient, f32x16 x) const {
        const f32x16 y = div(mul(x, scaled.scale), softcap);
        const f32x16 e = exp(mul(max(y, sub(set1(0.0f), y)), set1(-2.0f))), rest = add(e, set1(1.0f));
        return mul(mul(gradient, scaled.slope), div(mul(e, set1(4.0f)), mul(rest, rest)));
    }
};

template <class Z>
inline float z_of(const Z& z, float x) {
    return first_lane(z.z(set1(x)));
}

// Calls body(Tag<element>, Tag<form>) with the types of these logits.
template <class Body>
inline void with_element_and_form(DType dtype, const Transform& t, const Body& body) {
    with_element(dtype, [&](auto element) {
        if (t.softcap > 0.0f) return body(element, Tag<Capped>());
        if (t.is_identity()) return body(element, Tag<Identity>());
        return body(element, Tag<Scaled>());
    });
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA
