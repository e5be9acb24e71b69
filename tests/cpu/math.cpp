// The largest errors of csrc/cpu/math.h against the C library in double, for every instruction set of this CPU.
#if !defined(SIMD_ISA)
#include <cstdio>

#define SIMD_FILE "math.cpp"
#include "cpu/foreach_isa.h"
#endif

#include "cpu/math.h"

namespace rlhf_fast::SIMD_ISA {
namespace {

// The largest error of f over every `step`th float from low to high, in units in the last place of the truth (or
// relative to allowed(x), where that is given).
template <class F, class Truth, class Allowed>
double largest_error(float low, float high, uint32_t step, const F& f, const Truth& truth, const Allowed& allowed) {
    double worst = 0.0;
    for (int sign = 0; sign < 2; ++sign) {
        for (uint64_t bits = 0; bits < 0x7f800000u; bits += step) {
            const float x = float_of(static_cast<uint32_t>(bits) | (sign != 0 ? 0x80000000u : 0u));
            if (x < low || x > high) continue;
            const double exact = truth(static_cast<double>(x)), got = static_cast<double>(first_lane(f(set1(x))));
            const double error = std::fabs(got - exact) / allowed(static_cast<double>(x), exact);
            if (!(error <= worst)) worst = error;
        }
    }
    return worst;
}

double unit(double, double exact) {
    const double size = std::fabs(exact) > 1.2e-38 ? std::fabs(exact) : 1.2e-38;
    return std::ldexp(1.0, std::ilogb(size) - 23);
}

void report() {
    const uint32_t step = 1009;
    const double of_exp = largest_error(
        kExpLeast, 88.0f, step, [](f32x16 x) { return exp(x); }, [](double x) { return std::exp(x); }, unit);
    const double of_expm1 = largest_error(
        -100.0f, 88.0f, step, [](f32x16 x) { return expm1(x); }, [](double x) { return std::expm1(x); }, unit);
    const double of_tanh = largest_error(
        -100.0f, 100.0f, step, [](f32x16 x) { return tanh(x); }, [](double x) { return std::tanh(x); }, unit);
    const double of_exp2 = largest_error(
        -87.0f, 80.0f, step, [](f32x16 x) { return exp2<true>(mul(x, set1(kLog2E))); },
        [](double x) { return std::exp(x); },
        [](double x, double exact) { return (1.2e-7 + 9e-8 * std::fabs(x)) * exact; });
    std::printf("exp %.3f\nexpm1 %.3f\ntanh %.3f\nexp2 %.3f\n", of_exp, of_expm1, of_tanh, of_exp2);
    const float nothing = first_lane(exp(set1(-INFINITY))), below = first_lane(exp(set1(-87.4f)));
    std::printf("zero %d\n", nothing == 0.0f && below == 0.0f && first_lane(exp2<true>(set1(-149.0f))) == 0.0f);
    const float nan = first_lane(exp(set1(NAN))), nan_2 = first_lane(expm1(set1(NAN))),
                nan_3 = first_lane(tanh(set1(NAN)));
    std::printf("nan %d\n", nan != nan && nan_2 != nan_2 && nan_3 != nan_3);
    std::printf("ends %d\n",
                first_lane(expm1(set1(INFINITY))) == INFINITY && first_lane(expm1(set1(-INFINITY))) == -1.0f &&
                    first_lane(tanh(set1(INFINITY))) == 1.0f && first_lane(tanh(set1(-INFINITY))) == -1.0f);
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS
int main() {
    using namespace rlhf_fast;
    SIMD_CHOOSE(report)();
}
#endif
