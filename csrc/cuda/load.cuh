// Sixteen bytes of a row at a time, as floats. Each thread of a block of 256 takes every 256th vector of a segment,
// whatever the row's alignment; an unaligned or strided row is read element by element into the same places, so the
// bits are the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/logits.h"

namespace rlhf_fast::cuda {

constexpr int kThreads = 256;

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of one 16-byte access

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
    return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
    return __float2half_rn(x);
}

template <class T>
union Vector {
    uint4 words;
    T elements[kVector<T>];
    __device__ Vector() : words() {}
};

__device__ inline bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// The row of `logits` at which a block works.
template <class T>
__device__ inline const T* row_start(const Logits& logits, uint32_t row) {
    const uint32_t inner = static_cast<uint32_t>(logits.inner);
    return static_cast<const T*>(logits.data) + int64_t{row / inner} * logits.outer_stride +
           int64_t{row % inner} * logits.inner_stride;
}

// The column of a thread's i-th vector in a segment.
template <class T>
__device__ inline int64_t column_of(int64_t begin, int i) {
    return begin + (i * kThreads + threadIdx.x) * kVector<T>;
}

// kVector elements from `column`, or fewer at the row's end: the rest are -inf.
template <class T>
__device__ inline void load(const T* row, int64_t column, int64_t columns, int64_t stride, bool wide,
                            float (&out)[kVector<T>]) {
    if (wide && column + kVector<T> <= columns) {
        Vector<T> v;
        v.words = __ldcs(reinterpret_cast<const uint4*>(row + column));
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) out[j] = widen(v.elements[j]);
    } else {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j)
            out[j] = column + j < columns ? widen(row[(column + j) * stride]) : -INFINITY;
    }
}

// The inverse, to a contiguous row.
template <class T>
__device__ inline void store(T* row, int64_t column, int64_t columns, bool wide, const float (&values)[kVector<T>]) {
    if (wide && column + kVector<T> <= columns) {
        Vector<T> v;
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) v.elements[j] = narrow<T>(values[j]);
        __stcs(reinterpret_cast<uint4*>(row + column), v.words);
    } else {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j)
            if (column + j < columns) row[column + j] = narrow<T>(values[j]);
    }
}

// kVector<T> floats, to results that are float32 whatever T is.
template <class T>
__device__ inline void store_floats(float* to, int64_t i, int64_t count, const float (&from)[kVector<T>]) {
#pragma unroll
    for (int j = 0; j < kVector<T>; j += kVector<float>) {
        float four[kVector<float>];
#pragma unroll
        for (int k = 0; k < kVector<float>; ++k) four[k] = from[j + k];
        store(to, i + j, count, aligned16(to), four);
    }
}

// A thread's kLoads vectors of the segment that begins at a column. In a whole segment of an aligned row all loads are
// under way before the first is needed; elsewhere each is checked.
template <class T, int kLoads>
__device__ inline void load_segment(const T* row, int64_t begin, int64_t columns, int64_t stride,
                                    float (&out)[kLoads][kVector<T>]) {
    const bool wide = stride == 1 && aligned16(row);
    if (wide && begin + kLoads * kThreads * kVector<T> <= columns) {
        Vector<T> v[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            v[i].words = __ldcs(reinterpret_cast<const uint4*>(row + column_of<T>(begin, i)));
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) out[i][j] = widen(v[i].elements[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) load(row, column_of<T>(begin, i), columns, stride, wide, out[i]);
    }
}

// The inverse, to a contiguous row.
template <class T, int kLoads>
__device__ inline void store_segment(T* row, int64_t begin, int64_t columns,
                                     const float (&values)[kLoads][kVector<T>]) {
    const bool wide = aligned16(row);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) store(row, column_of<T>(begin, i), columns, wide, values[i]);
}

// Calls body(a value of the element type) for these logits.
template <class Body>
void with_element(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::f32: return body(float{});
        case DType::bf16: return body(__nv_bfloat16{});
        case DType::f16: return body(__half{});
    }
}

}  // namespace rlhf_fast::cuda
