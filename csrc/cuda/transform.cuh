// From a raw logit x to z and back to dz/dx, in the three forms that kernels are compiled for; and exp of z - shift.
#pragma once

#include <cuda_runtime.h>

#include "common/logits.h"

namespace rlhf_fast::cuda {

// e^d by the hardware's 2^x; 0 where it would be subnormal (the files are compiled with -ftz=true).
__device__ inline float exp_of(float d) { return exp2f(d * 1.4426950408889634f); }

// z - shift, but no lower than where exp is 0 already, so that 0 times it is 0; nan stays nan.
__device__ inline float below(float z, float shift) {
    const float d = z - shift;
#if defined(__CUDA_ARCH__)
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(d), "f"(-200.0f));
    return out;
#else
    return d < -200.0f ? -200.0f : d;
#endif
}

enum class Form { identity, scaled, capped };

template <Form form>
struct RowTransform {
    float scale, softcap, temperature;

    __device__ RowTransform(const Transform& t, int64_t row)
        : scale(t.scale), softcap(t.softcap), temperature(form == Form::identity ? 1.0f : t.temperature_of(row)) {}

    __device__ float z(float x) const {
        if (form == Form::identity) return x;
        float z = x * scale;
        if (form == Form::capped) z = softcap * tanhf(__fdiv_rn(z, softcap));
        return __fdiv_rn(z, temperature);
    }
    __device__ float chain(float gradient, float x) const {
        if (form == Form::identity) return gradient;
        if (form == Form::capped) {  // 1 - tanh(y)^2 as 4 e / (1 + e)^2, which keeps its digits where tanh is nearly 1
            const float e = exp_of(-2.0f * fabsf(__fdiv_rn(x * scale, softcap)));
            gradient *= 4.0f * e / ((1.0f + e) * (1.0f + e));
        }
        return gradient * (scale / temperature);
    }
};

template <Form form>
struct FormTag {
    static constexpr Form value = form;
};

// Calls body(FormTag) for this transform.
template <class Body>
void with_form(const Transform& t, const Body& body) {
    if (t.softcap > 0.0f) return body(FormTag<Form::capped>());
    if (t.is_identity()) return body(FormTag<Form::identity>());
    return body(FormTag<Form::scaled>());
}

}  // namespace rlhf_fast::cuda
