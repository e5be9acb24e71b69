// linear on the CPU: every result is one dot product along rows that are contiguous in memory, so weights are read
// where they are, once for a block of x's rows, and never packed. A tile of kWeights by kRows results stays in
// registers.
#if !defined(SIMD_ISA)
#include "common/linear.h"

#include "common/parallel.h"

#define SIMD_FILE "cpu/linear.cpp"
#include "cpu/foreach_isa.h"
#endif

#include "cpu/math.h"

namespace rlhf_fast::SIMD_ISA {
namespace {

#if defined(SIMD_AVX512)
constexpr int kRows = 6;
constexpr int kWeights = 4;
#else
constexpr int kRows = 3;
constexpr int kWeights = 2;
#endif
constexpr int64_t kBlockBytes = 160 << 10;  // of x: half of a small L2 cache
constexpr int64_t kMostRows = 6 * 64;       // of x in a block

// Adds the products along k elements of R rows and W weights to sums.
template <int R, int W, class T>
SIMD_INLINE void products(const T* const (&x)[R], const T* const (&w)[W], int64_t k, f32x16 (&sums)[R][W],
                          const T* const (&next)[W], int first_next, int last_next) {
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
        for (int n = first_next; n < last_next; ++n) __builtin_prefetch(next[n] + i, 0, 2);
        SIMD_EACH_REG(part) {
            const int64_t at = i + part * kRegLanes;
            reg weights[W];
#pragma GCC unroll 8
            for (int n = 0; n < W; ++n) weights[n] = load(w[n] + at);
#pragma GCC unroll 8
            for (int m = 0; m < R; ++m) {
                const reg row = load(x[m] + at);
#pragma GCC unroll 8
                for (int n = 0; n < W; ++n) sums[m][n].r[part] = fma(row, weights[n], sums[m][n].r[part]);
            }
        }
    }
    if (i == k) return;
    for (int m = 0; m < R; ++m) {
        const f32x16 row = load_first(x[m] + i, k - i, 0.0f);
        for (int n = 0; n < W; ++n) sums[m][n] = fma(row, load_first(w[n] + i, k - i, 0.0f), sums[m][n]);
    }
}

SIMD_INLINE f32x16 activated(int gate, f32x16 x) {
    if (gate == 1) {  // -inf times 0 is nan, as the limit of exp would hide
        const f32x16 y = div(x, add(set1(1.0f), exp(min(sub(set1(0.0f), x), set1(88.0f)))));
        return select(less(x, set1(-0x1.fffffep127f)), set1(NAN), y);
    }
    const f32x16 inner = mul(set1(0.7978845608f), fma(mul(set1(0.044715f), mul(x, x)), x, x));
    return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
}

// A unit of columns: at most kWeights of one part, side by side.
struct Unit {
    int part, width;
    int64_t first;
};

// Results of R rows and W columns. They go to their place, or those of a gate to y (rows, kWeights) first.
template <int R, int W, class T>
inline void tile(const LinearProblem& p, int64_t m, const Unit& unit, const Unit& next, int from, int to, float* y) {
    const LinearPart& one = p.parts[unit.part];
    const T *x[R], *w[W], *following[W];
    for (int i = 0; i < R; ++i) x[i] = static_cast<const T*>(p.x) + (m + i) * p.x_stride;
    for (int n = 0; n < W; ++n) {
        w[n] = static_cast<const T*>(one.weight) + (unit.first + n) * one.weight_stride;
        const LinearPart& other = p.parts[next.part];
        following[n] = static_cast<const T*>(other.weight) + (next.first + n) * other.weight_stride;
    }
    f32x16 sums[R][W];
    for (int i = 0; i < R; ++i)
        for (int n = 0; n < W; ++n) sums[i][n] = set1(0.0f);
    products<R, W>(x, w, p.k, sums, following, from, to);
    if (one.low != nullptr) {  // an adapter: a few more elements of the same sums
        const T *low[R], *up[W];
        for (int i = 0; i < R; ++i) low[i] = static_cast<const T*>(one.low) + (m + i) * one.rank;
        for (int n = 0; n < W; ++n) up[n] = static_cast<const T*>(one.up) + (unit.first + n) * one.rank;
        products<R, W>(low, up, one.rank, sums, up, 0, 0);
    }
    float buffer[R][kWeights];
    T* const out = static_cast<T*>(one.out) + m * one.out_stride + unit.first;
    const bool plain = one.bias == nullptr && one.scale == 1.0f && W == kWeights;
    for (int i = 0; i < R; ++i) {
        float* const row = y != nullptr ? y + i * kWeights : buffer[i];
        if constexpr (sizeof(T) == sizeof(float)) {
            if (plain && y == nullptr && one.add == nullptr) {
                reduce_add(sums[i], reinterpret_cast<float*>(out) + i * one.out_stride);
                continue;
            }
        }
        reduce_add(sums[i], row);
        for (int n = 0; n < W && !plain; ++n) {
            if (one.bias != nullptr) row[n] += to_float(static_cast<const T*>(one.bias)[unit.first + n]);
            row[n] *= one.scale;
        }
        if (one.add != nullptr) {
            const T* const add = static_cast<const T*>(one.add) + (m + i) * one.add_stride + unit.first;
            for (int n = 0; n < W; ++n) row[n] += to_float(add[n]);
        }
        for (int n = 0; n < W && y == nullptr; ++n) out[i * one.out_stride + n] = from_float<T>(row[n]);
    }
}

template <int W, class T>
inline void rows_of(const LinearProblem& p, int64_t begin, int64_t end, const Unit& unit, const Unit& next, float* y) {
    const int64_t tiles = (end - begin + kRows - 1) / kRows;
    int64_t m = begin;
    for (int64_t t = 0; t < tiles; ++t, m += kRows) {  // the next weights come into the cache a share with each tile
        const int from = static_cast<int>(W * t / tiles), to = static_cast<int>(W * (t + 1) / tiles);
        float* const results = y == nullptr ? nullptr : y + (m - begin) * kWeights;
        switch (end - m) {
            case 1: tile<1, W, T>(p, m, unit, next, from, to, results); break;
            case 2: tile<2, W, T>(p, m, unit, next, from, to, results); break;
#if defined(SIMD_AVX512)
            case 3: tile<3, W, T>(p, m, unit, next, from, to, results); break;
            case 4: tile<4, W, T>(p, m, unit, next, from, to, results); break;
            case 5: tile<5, W, T>(p, m, unit, next, from, to, results); break;
#endif
            default: tile<kRows, W, T>(p, m, unit, next, from, to, results);
        }
    }
}

template <class T>
inline void rows_of(const LinearProblem& p, int64_t begin, int64_t end, const Unit& unit, const Unit& next, float* y) {
    const Unit& fitting = next.width == unit.width ? next : unit;
    switch (unit.width) {
        case 1: return rows_of<1, T>(p, begin, end, unit, fitting, y);
        case 2: return rows_of<2, T>(p, begin, end, unit, fitting, y);
#if defined(SIMD_AVX512)
        case 3: return rows_of<3, T>(p, begin, end, unit, fitting, y);
        case 4: return rows_of<4, T>(p, begin, end, unit, fitting, y);
#endif
    }
}

int64_t units_in(const LinearPart& part) { return (part.rows + kWeights - 1) / kWeights; }

// Unit u of all parts in turn, or of the first one alone.
SIMD_INLINE Unit unit_of(const LinearProblem& p, int64_t u) {
    int part = 0;
    for (; p.gate == 0 && part + 1 < p.count && u >= units_in(p.parts[part]); ++part) u -= units_in(p.parts[part]);
    const int64_t first = u * kWeights, left = p.parts[part].rows - first;
    return {part, static_cast<int>(left < kWeights ? left : kWeights), first};
}

// out = f(gates) * ups, both (rows, kWeights).
template <class T>
inline void combine(const LinearProblem& p, int64_t begin, int64_t end, const Unit& unit, float* gates,
                    const float* ups) {
    for (int64_t i = 0; i < (end - begin) * kWeights; i += kLanes)
        store16(gates + i, mul(activated(p.gate, load16(gates + i)), load16(ups + i)));
    const LinearPart& one = p.parts[0];
    for (int64_t m = begin; m < end; ++m)
        for (int n = 0; n < unit.width; ++n)
            static_cast<T*>(one.out)[m * one.out_stride + unit.first + n] =
                from_float<T>(gates[(m - begin) * kWeights + n]);
}

template <class T>
inline void units(const LinearProblem& p, int64_t begin, int64_t end, int64_t all) {
    int64_t block = kBlockBytes / (p.k * static_cast<int64_t>(sizeof(T)) + 1) / kRows * kRows;
    block = block < 4 * kRows ? 4 * kRows : block > kMostRows ? kMostRows : block;
    float gates[kMostRows * kWeights + kLanes] = {}, ups[kMostRows * kWeights + kLanes] = {};
    for (int64_t m = 0; m < p.m; m += block) {
        const int64_t last = m + block < p.m ? m + block : p.m;
        for (int64_t u = begin; u < end; ++u) {
            const Unit unit = unit_of(p, u), next = unit_of(p, u + 1 < all ? u + 1 : u);
            if (p.gate == 0) {
                rows_of<T>(p, m, last, unit, next, nullptr);
                continue;
            }
            const Unit up = {1, unit.width, unit.first};
            rows_of<T>(p, m, last, unit, up, gates);
            rows_of<T>(p, m, last, up, next, ups);
            combine<T>(p, m, last, unit, gates, ups);
        }
    }
}

void forward(const LinearProblem& p, int64_t begin, int64_t end, int64_t all) {
    with_element(p.dtype, [&](auto element) { units<typename decltype(element)::type>(p, begin, end, all); });
}

int64_t number_of_units(const LinearProblem& p) {
    int64_t all = 0;
    for (int i = 0; i < (p.gate == 0 ? p.count : 1); ++i) all += units_in(p.parts[i]);
    return all;
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS

namespace rlhf_fast::cpu {
namespace {

void forward(const LinearProblem& p, const Run& run) {
    const auto kernel = SIMD_CHOOSE(forward);
    const int64_t all = SIMD_CHOOSE(number_of_units)(p);
    parallel_rows(all, 4 * p.k * p.m, run.threads, [&](int64_t begin, int64_t end) { kernel(p, begin, end, all); });
}

}  // namespace

const LinearKernels linear = {forward};

}  // namespace rlhf_fast::cpu

#endif  // SIMD_LAST_PASS
