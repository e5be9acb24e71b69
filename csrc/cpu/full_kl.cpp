// full_kl on the CPU: KL or Jensen-Shannon divergence between two rows of logits, and its gradients.
//
// As in token_logprobs.cpp, a row goes by in tiles that stay in the L1 cache, here one of each side, and KL needs one
// sweep: with E over p, KL(p || q) = E[z_p - z_q] - log-sum-exp(z_p) + log-sum-exp(z_q). Jensen-Shannon needs the sums
// of both before its terms, hence a second sweep over the row, which the L2 cache still holds: memory is read once all
// the same.
#if !defined(SIMD_ISA)
#include "common/full_kl.h"

#include "common/parallel.h"

#define SIMD_FILE "cpu/full_kl.cpp"
#include "cpu/foreach_isa.h"
#endif

#include "cpu/math.h"
#include "cpu/tile.h"
#include "cpu/transform.h"

namespace rlhf_fast::SIMD_ISA {
namespace {

struct Factors {
    double older, newer;
};

constexpr double kLog2 = 0x1.62e42fefa39efp-1;

// One side of a row so far: its reference, and the sum of exp(z - reference). While the sum is 0 the reference is
// nothing.
struct Side {
    double reference = 0.0, sum = 0.0;

    // Takes in a tile's sum relative to its own reference. The larger of the two stays; returns what each sum shrinks
    // by.
    Factors fold(double other_reference, double other_sum) {
        Factors factors = {1.0, 1.0};
        if (sum == 0.0) {
            reference = other_reference;
        } else if (other_sum != 0.0 && other_reference > reference) {
            factors.older = std::exp(reference - other_reference);
            reference = other_reference;
        } else if (other_sum != 0.0) {
            factors.newer = std::exp(other_reference - reference);
        }
        sum = factors.older * sum + factors.newer * other_sum;
        return factors;
    }
};

// dot = sum of exp(z_p - reference_p) ((z_p - reference_p) - (z_q - anchor)), where anchor is z_q of p's likeliest
// word.
struct Pair {
    Side p, q;
    double anchor = 0.0, dot = 0.0;

    void fold(float reference_p, float sum_p, float reference_q, float sum_q, float tile_anchor, float tile_dot) {
        const double before = p.reference, anchor_before = anchor, old_sum = p.sum;
        const Factors factors = p.fold(reference_p, sum_p);
        q.fold(reference_q, sum_q);
        if (old_sum == 0.0 || p.reference != before) anchor = tile_anchor;
        dot = moved(dot, old_sum, before - p.reference, anchor_before - anchor, factors.older) +
              moved(tile_dot, sum_p, reference_p - p.reference, tile_anchor - anchor, factors.newer);
    }
    // A dot whose reference and anchor move by these amounts, and 0 where nothing is left of it, even if it was inf.
    static double moved(double dot, double sum, double by_reference, double by_anchor, double factor) {
        return sum == 0.0 || factor == 0.0 ? 0.0 : factor * (dot + sum * (by_reference - by_anchor));
    }
};

template <class T, class Z>
inline float reference_of(const T* x, int64_t n, const Z& z) {
    const float top = z_of(z, range_of(x, n).largest);
    return top > -INFINITY ? top : 0.0f;  // nothing but -inf: any number will do
}

template <class T, class Z>
inline f32x16 sixteen(const T* x, int64_t left, const Z& z) {
    return left >= kLanes ? z.z(load16(x)) : keep_first(z.z(load_first(x, left, 0.0f)), left, -INFINITY);
}

// The largest z_q among the words that have this z_p; 0 if that is -inf.
template <class T, class Z>
inline float anchor_of(const T* p, const T* q, int64_t n, const Z& z, float z_p) {
    f32x16 best = set1(-INFINITY);
    for (int64_t i = 0; i < n; i += kLanes) {
        const mask16 below = less(sixteen(p + i, n - i, z), set1(z_p));
        best = max(select(below, set1(-INFINITY), sixteen(q + i, n - i, z)), best);
    }
    const float anchor = reduce_max(best);
    return anchor > -INFINITY ? anchor : 0.0f;
}

template <class T, class Z>
inline void fold_tile(Pair& row, const T* p, const T* q, int64_t n, const Z& z) {
    const float reference_p = reference_of(p, n, z), reference_q = reference_of(q, n, z);
    const float anchor = anchor_of(p, q, n, z, reference_p);
    f32x16 sum_p[2] = {set1(0.0f), set1(0.0f)}, sum_q[2] = {set1(0.0f), set1(0.0f)}, dot[2] = {set1(0.0f), set1(0.0f)};
    for (int64_t i = 0, part = 0; i < n; i += kLanes, part ^= 1) {
        __builtin_prefetch(p + i + kTile);
        __builtin_prefetch(q + i + kTile);
        const f32x16 z_q = sixteen(q + i, n - i, z);
        const f32x16 d_p = max(set1(kLeast), sub(sixteen(p + i, n - i, z), set1(reference_p)));
        const f32x16 e_p = exp(d_p);
        sum_p[part] = add(sum_p[part], e_p);
        sum_q[part] = add(sum_q[part], exp(max(set1(kLeast), sub(z_q, set1(reference_q)))));
        // Where p is 0 the term is 0, even if q is 0 as well and z_q = -inf.
        const f32x16 term = mul(e_p, sub(d_p, sub(z_q, set1(anchor))));
        dot[part] = add(dot[part], select(less(set1(0.0f), e_p), term, set1(0.0f)));
    }
    row.fold(reference_p, reduce_add(add(sum_p[0], sum_p[1])), reference_q, reduce_add(add(sum_q[0], sum_q[1])), anchor,
             reduce_add(add(dot[0], dot[1])));
}

// One side's softmax, given its row's sums: from d = z - shift to p. For excluded words d is finite and p is 0.
struct Softmax {
    f32x16 shift, inverse_sum;
    Softmax(float largest, float sum) : shift(set1(largest)), inverse_sum(set1(1.0f / sum)) {}
    SIMD_INLINE f32x16 d(f32x16 own) const { return max(set1(kLeast), sub(own, shift)); }
    SIMD_INLINE f32x16 p(f32x16 d) const { return mul(exp(d), inverse_sum); }
};

// What log p - log m and log q - log m are above a level, with m = (p + q) / 2. With s the smaller over the larger of p
// and q they are log(2 / (1 + s)), less the difference of the logarithms for the smaller one. Where p and q are near
// each other (s >= 1/2) the level is 0, and elsewhere log 2: so that what is small is computed as such, and keeps its
// digits.
struct AboveLevel {
    f32x16 p, q;
    mask16 far;  // the level is log 2

    // apart = log p - log q. log1p(x) = 2 atanh(x / (2 + x)), with x = (1 - s) / (1 + s) where near and s elsewhere.
    SIMD_INLINE explicit AboveLevel(f32x16 apart) {
        const f32x16 zero = set1(0.0f), one = set1(1.0f), back = sub(zero, apart);
        const f32x16 s = exp(max(set1(kLeast), min(apart, back)));
        far = less(s, set1(0.5f));
        const f32x16 a = div(select(far, sub(zero, s), sub(one, s)), add(s, select(far, set1(2.0f), set1(3.0f))));
        const f32x16 a2 = mul(a, a);
        // atanh(a) = a + a^3 series, by Remez: 3e-9
        f32x16 series = fma(a2, set1(0x1.37158ep-3f), set1(0x1.9928c0p-3f));
        series = fma(series, a2, set1(0x1.5555b6p-2f));
        const f32x16 log = fma(mul(add(a, a), a2), series, add(a, a));
        p = add(log, min(apart, zero));
        q = add(log, min(back, zero));
    }
};

// Sums over a row of one side's terms of KL(side || m): probability times what is above the level, and the
// probabilities at either level.
struct Terms {
    double above = 0.0, near = 0.0, far = 0.0;
    // KL(side || m), and that less log 2: of two sums that nearly cancel, each avoids the one of large terms.
    float mean() const { return static_cast<float>(above + kLog2 * far); }
    float rest() const { return static_cast<float>(above - kLog2 * near); }
    double divergence() const { return far > near ? kLog2 + (above - kLog2 * near) : above + kLog2 * far; }
};

struct TileTerms {
    f32x16 above, near, far;
    SIMD_INLINE void add_to(f32x16 p, f32x16 value, mask16 is_far) {
        const f32x16 zero = set1(0.0f);
        above = fma(p, value, above);
        near = add(near, select(is_far, zero, p));
        far = add(far, select(is_far, p, zero));
    }
    void fold_into(Terms& row) const {
        row.above += static_cast<double>(reduce_add(above));
        row.near += static_cast<double>(reduce_add(near));
        row.far += static_cast<double>(reduce_add(far));
    }
};

// log of the ratio of two sums: what d_p - d_q lacks of log p - log q.
inline f32x16 log_of_ratio(float sum_p, float sum_q) {
    return set1(static_cast<float>(std::log(static_cast<double>(sum_p) / static_cast<double>(sum_q))));
}

template <class T, class Z>
void forward_rows(const Logits& p, const Logits& q, const Transform& transform, const Mask& mask, Divergence kind,
                  const FullKL& out, int64_t begin, int64_t end) {
    T buffer_p[kTile], buffer_q[kTile];
    for (int64_t r = begin; r < end; ++r) {
        for (float* each : {out.divergence, out.shift_p, out.shift_q, out.mean_p, out.rest_p, out.mean_q, out.rest_q})
            each[r] = 0.0f;
        out.sum_p[r] = out.sum_q[r] = 1.0f;
        if (mask.hides(r)) continue;
        const T* row_p = static_cast<const T*>(p.data) + p.row(r);
        const T* row_q = static_cast<const T*>(q.data) + q.row(r);
        const Z z(transform, r);
        const auto for_each_tile = [&](auto&& body) {
            for (int64_t column = 0; column < p.columns; column += kTile) {
                const int64_t n = p.columns - column < kTile ? p.columns - column : kTile;
                body(contiguous(row_p + column * p.column_stride, n, p.column_stride, buffer_p),
                     contiguous(row_q + column * q.column_stride, n, q.column_stride, buffer_q), n);
            }
        };
        Pair row;
        for_each_tile([&](const T* x, const T* y, int64_t n) { fold_tile(row, x, y, n, z); });
        const double log_p = row.p.sum > 0.0 ? std::log(row.p.sum) : NAN;
        const double log_q = row.q.sum > 0.0 ? std::log(row.q.sum) : NAN;
        out.shift_p[r] = static_cast<float>(row.p.reference);
        out.shift_q[r] = static_cast<float>(row.q.reference);
        out.sum_p[r] = static_cast<float>(row.p.sum);
        out.sum_q[r] = static_cast<float>(row.q.sum);
        if (kind == Divergence::kl) {
            const double mean = row.dot / row.p.sum;
            out.divergence[r] = static_cast<float>(mean + (row.q.reference - row.anchor) - log_p + log_q);
            out.mean_q[r] = static_cast<float>(row.anchor);
            out.mean_p[r] = static_cast<float>(mean);
            out.rest_p[r] = static_cast<float>(mean - static_cast<double>(out.mean_p[r]));
            continue;
        }
        const Softmax of_p(out.shift_p[r], out.sum_p[r]), of_q(out.shift_q[r], out.sum_q[r]);
        const f32x16 log_ratio = log_of_ratio(out.sum_p[r], out.sum_q[r]);
        const f32x16 zero = set1(0.0f);
        Terms terms_p, terms_q;
        for_each_tile([&](const T* x, const T* y, int64_t n) {
            TileTerms tile_p = {zero, zero, zero}, tile_q = tile_p;
            for (int64_t i = 0; i < n; i += kLanes) {
                const f32x16 d_p = of_p.d(sixteen(x + i, n - i, z)), d_q = of_q.d(sixteen(y + i, n - i, z));
                const AboveLevel level(sub(sub(d_p, d_q), log_ratio));
                tile_p.add_to(of_p.p(d_p), level.p, level.far);
                tile_q.add_to(of_q.p(d_q), level.q, level.far);
            }
            tile_p.fold_into(terms_p);
            tile_q.fold_into(terms_q);
        });
        out.divergence[r] = static_cast<float>(0.5 * (terms_p.divergence() + terms_q.divergence()) + (log_p - log_p));
        out.mean_p[r] = terms_p.mean();
        out.rest_p[r] = terms_p.rest();
        out.mean_q[r] = terms_q.mean();
        out.rest_q[r] = terms_q.rest();
    }
}

// kl: d/dz_p = p (log p - log q - KL), d/dz_q = q - p. The logarithms of the sums cancel in the first, and with them
// their roundings: it is p (far - E[far]) with far = (z_p - shift_p) - (z_q - anchor).
//
// js: d/dz_p = p (log p - log m - KL(p || m)) / 2, and the same of q.
template <class T, class Z>
void gradient_rows(const Logits& p, const Logits& q, const Transform& transform, const Mask& mask, Divergence kind,
                   const FullKL& results, const float* grad, T* out_p, T* out_q, int64_t begin, int64_t end) {
    T buffer_p[kTile], buffer_q[kTile];
    for (int64_t r = begin; r < end; ++r) {
        T* to_p = out_p != nullptr ? out_p + r * p.columns : nullptr;
        T* to_q = out_q != nullptr ? out_q + r * p.columns : nullptr;
        if (mask.hides(r)) {
            for (T* to : {to_p, to_q})
                if (to != nullptr) std::memset(static_cast<void*>(to), 0, static_cast<size_t>(p.columns) * sizeof(T));
            continue;
        }
        const T* row_p = static_cast<const T*>(p.data) + p.row(r);
        const T* row_q = static_cast<const T*>(q.data) + q.row(r);
        const Z z(transform, r);
        const Softmax of_p(results.shift_p[r], results.sum_p[r]), of_q(results.shift_q[r], results.sum_q[r]);
        const f32x16 log_ratio = log_of_ratio(results.sum_p[r], results.sum_q[r]);
        const f32x16 mean_p = set1(results.mean_p[r]), rest_p = set1(results.rest_p[r]);
        const f32x16 mean_q = set1(results.mean_q[r]), rest_q = set1(results.rest_q[r]);
        const f32x16 upstream = set1(kind == Divergence::kl ? grad[r] : 0.5f * grad[r]);
        const auto write = [](T* to, int64_t left, f32x16 value) {
            if (left >= kLanes) store16(to, value);
            else store_first(to, left, value);
        };
        for (int64_t column = 0; column < p.columns; column += kTile) {
            const int64_t n = p.columns - column < kTile ? p.columns - column : kTile;
            const T* x = contiguous(row_p + column * p.column_stride, n, p.column_stride, buffer_p);
            const T* y = contiguous(row_q + column * q.column_stride, n, q.column_stride, buffer_q);
            for (int64_t i = 0; i < n; i += kLanes) {
                const int64_t left = n - i;
                const f32x16 raw_p = left >= kLanes ? load16(x + i) : load_first(x + i, left, 0.0f);
                const f32x16 raw_q = left >= kLanes ? load16(y + i) : load_first(y + i, left, 0.0f);
                const f32x16 z_q = z.z(raw_q);
                const f32x16 d_p = of_p.d(z.z(raw_p)), d_q = of_q.d(z_q), p_v = of_p.p(d_p), q_v = of_q.p(d_q);
                f32x16 g_p, g_q;
                if (kind == Divergence::kl) {  // where p is 0, q may be too, and then log q is -inf
                    const f32x16 far = sub(d_p, sub(z_q, mean_q));
                    g_p = select(less(set1(0.0f), p_v), mul(p_v, sub(sub(far, mean_p), rest_p)), set1(0.0f));
                    g_q = sub(q_v, p_v);
                } else {
                    const AboveLevel level(sub(sub(d_p, d_q), log_ratio));
                    g_p = mul(p_v, sub(level.p, select(level.far, rest_p, mean_p)));
                    g_q = mul(q_v, sub(level.q, select(level.far, rest_q, mean_q)));
                }
                if (to_p != nullptr) write(to_p + column + i, left, z.chain(mul(upstream, g_p), raw_p));
                if (to_q != nullptr) write(to_q + column + i, left, z.chain(mul(upstream, g_q), raw_q));
            }
        }
    }
}

void forward(const Logits& p, const Logits& q, const Transform& transform, const Mask& mask, Divergence kind,
             const FullKL& out, int64_t begin, int64_t end) {
    with_element_and_form(p.dtype, transform, [&](auto element, auto form) {
        forward_rows<typename decltype(element)::type, typename decltype(form)::type>(p, q, transform, mask, kind, out,
                                                                                      begin, end);
    });
}

void gradient(const Logits& p, const Logits& q, const Transform& transform, const Mask& mask, Divergence kind,
              const FullKL& results, const float* grad, void* out_p, void* out_q, int64_t begin, int64_t end) {
    with_element_and_form(p.dtype, transform, [&](auto element, auto form) {
        using T = typename decltype(element)::type;
        gradient_rows<T, typename decltype(form)::type>(p, q, transform, mask, kind, results, grad,
                                                        static_cast<T*>(out_p), static_cast<T*>(out_q), begin, end);
    });
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS

namespace rlhf_fast::cpu {
namespace {

void forward(const Logits& p, const Logits& q, const Transform& transform, const Mask& mask, Divergence kind, float*,
             const FullKL& out, const Run& run) {
    const auto kernel = SIMD_CHOOSE(forward);
    parallel_rows(p.rows, p.columns, run.threads,
                  [&](int64_t begin, int64_t end) { kernel(p, q, transform, mask, kind, out, begin, end); });
}

void gradient(const Logits& p, const Logits& q, const Transform& transform, const Mask& mask, Divergence kind,
              const FullKL& results, const float* grad, void* out_p, void* out_q, const Run& run) {
    const auto kernel = SIMD_CHOOSE(gradient);
    parallel_rows(p.rows, p.columns, run.threads, [&](int64_t begin, int64_t end) {
        kernel(p, q, transform, mask, kind, results, grad, out_p, out_q, begin, end);
    });
}

}  // namespace

const FullKLKernels full_kl = {forward, gradient};

}  // namespace rlhf_fast::cpu

#endif  // SIMD_LAST_PASS
