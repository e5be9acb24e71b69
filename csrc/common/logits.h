// A matrix of logits, what is done to a logit first, and which rows count: what all ops over a vocabulary read.
// Plain pointers and numbers, strides in elements; knows no torch.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace rlhf_fast {

// In a tensor (..., columns) of any strides. Rows have two levels, so that logits[:, :-1] needs no copy: row r starts
// at data + (r / inner) * outer_stride + (r % inner) * inner_stride.
struct Logits {
    const void* data;
    DType dtype;
    int64_t rows;
    int64_t columns;
    int64_t inner;  // how many rows are inner_stride apart
    int64_t outer_stride;
    int64_t inner_stride;
    int64_t column_stride;

    RLHF_FAST_HOST_DEVICE int64_t row(int64_t r) const {
        return (r / inner) * outer_stride + (r % inner) * inner_stride;
    }
};

// z = softcap * tanh(scale * x / softcap) / temperature; a softcap of 0 means none.
struct Transform {
    float scale;
    float softcap;
    float temperature;
    const float* temperatures;  // one a row, or null for the same one everywhere

    RLHF_FAST_HOST_DEVICE float temperature_of(int64_t r) const {
        return temperatures != nullptr ? temperatures[r] : temperature;
    }
    bool is_identity() const {
        return softcap == 0.0f && scale == 1.0f && temperatures == nullptr && temperature == 1.0f;
    }
};

// One flag a row, or null for all. The logits of a row whose flag is false are not read.
struct Mask {
    const bool* flags;
    RLHF_FAST_HOST_DEVICE bool hides(int64_t r) const { return flags != nullptr && !flags[r]; }
};

// One token a row, int32 or int64.
struct Tokens {
    const void* data;
    bool wide;  // int64
    RLHF_FAST_HOST_DEVICE int64_t operator[](int64_t r) const {
        return wide ? static_cast<const int64_t*>(data)[r] : int64_t{static_cast<const int32_t*>(data)[r]};
    }
};

// The first row that counts and whose token is outside [0, vocabulary), or -1.
inline int64_t first_outside(const Tokens& tokens, const Mask& mask, int64_t rows, int64_t vocabulary) {
    for (int64_t r = 0; r < rows; ++r)
        if (!mask.hides(r) && (tokens[r] < 0 || tokens[r] >= vocabulary)) return r;
    return -1;
}

}  // namespace rlhf_fast
