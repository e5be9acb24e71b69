// token_logprobs on the CPU: log-probability and entropy of rows of logits, and their gradient, in one sweep each.
//
// A row is taken in tiles of 4,096 columns, which stay in the L1 cache: one read for the tile's largest logit and one
// for the sums relative to it, while the next tile is fetched. So memory is read once, 4 bytes a column in float32, and
// the gradient reads and writes it once, 8 bytes. The arithmetic, some 15 vector operations for 16 columns, is less
// than that wherever a core has less than about 16 GB/s to itself.
#if !defined(SIMD_ISA)
#include "common/token_logprobs.h"

#include "common/parallel.h"

#define SIMD_FILE "cpu/token_logprobs.cpp"
#include "cpu/foreach_isa.h"
#endif

#include "cpu/math.h"
#include "cpu/tile.h"
#include "cpu/transform.h"

namespace rlhf_fast::SIMD_ISA {
namespace {

// A row between updates: largest z so far, sum of exp(z - max), sum of exp(z - max) (z - max), z of the row's token.
struct RowState {
    double max, sum, dot, token;
};
constexpr RowState kEmpty = {-INFINITY, 0.0, 0.0, 0.0};
static_assert(kTile == cpu::kTokenLogprobsSegment);  // then blocks are cut where whole rows are
static_assert(sizeof(RowState) == kTokenLogprobsState * sizeof(double));

struct TileSums {
    float max, sum, dot;
};

// The sums relative to shift, the largest z; with Deep, z may be any distance below it.
template <bool Deep, class T, class Z>
inline TileSums sums_below(float shift, const T* x, int64_t n, const Z& z, const T* ahead) {
    f32x16 sum[2] = {set1(0.0f), set1(0.0f)}, dot[2] = {set1(0.0f), set1(0.0f)};
    for_each_z(x, n, z, ahead, [&](int part, f32x16 own) SIMD_INLINE_LAMBDA {
        f32x16 d = sub(own, set1(shift));
        if (Deep) d = max(set1(kLeast), d);
        const f32x16 e = exp2<Deep>(mul(d, set1(kLog2E)));
        sum[part] = add(sum[part], e);
        dot[part] = fma(e, d, dot[part]);
    });
    const float dots = reduce_add(add(dot[0], dot[1]));  // nan where any z is
    return {shift, dots == dots ? reduce_add(add(sum[0], sum[1])) : NAN, dots};
}

template <class T, class Z>
inline TileSums tile_sums(const T* x, int64_t n, const Z& z, const T* ahead) {
    const Range range = range_of(x, n);
    const float shift = z_of(z, range.largest);
    if (!(shift > -INFINITY)) return has_nan(x, n) ? TileSums{NAN, NAN, NAN} : TileSums{-INFINITY, 0.0f, 0.0f};
    const bool deep = !(z_of(z, range.least) - shift >= kExpLeast) || n % kLanes != 0;
    return deep ? sums_below<true>(shift, x, n, z, ahead) : sums_below<false>(shift, x, n, z, ahead);
}

// Brings both to the larger maximum, in double: then the sizes of the parts do not matter.
inline void fold(RowState& row, const TileSums& tile) {
    if (tile.max == -INFINITY) return;
    if (tile.max > row.max) {
        if (row.sum > 0.0) {
            const double down = row.max - tile.max, factor = std::exp(down);
            row.dot = factor * (row.dot + row.sum * down);
            row.sum *= factor;
        }
        row.max = tile.max;
        row.sum += tile.sum;
        row.dot += tile.dot;
    } else {
        const double down = tile.max - row.max, factor = std::exp(down);
        row.sum += factor * tile.sum;
        row.dot += factor * (tile.dot + tile.sum * down);
    }
}

// Folds a block of a row's columns into its state.
template <class T, class Z>
inline void fold_row(RowState& row, const Logits& logits, const T* x, const Z& z, int64_t token, T* buffer) {
    for (int64_t column = 0; column < logits.columns; column += kTile) {
        const int64_t n = logits.columns - column < kTile ? logits.columns - column : kTile;
        const T* start = x + column * logits.column_stride;
        fold(row, tile_sums(contiguous(start, n, logits.column_stride, buffer), n, z, start + kTile));
    }
    if (token >= 0 && token < logits.columns) row.token = z_of(z, to_float(x[token * logits.column_stride]));
}

inline void finish_row(const RowState& row, const TokenLogprobs& out, int64_t r) {
    const double sum = row.sum > 0.0 ? row.sum : NAN;  // a row of nothing but -inf is no distribution
    const double log_sum = std::log(sum);
    out.logprobs[r] = static_cast<float>(row.token - row.max - log_sum);
    out.entropy[r] = static_cast<float>(log_sum - row.dot / sum);
    if (out.shift == nullptr) return;
    out.shift[r] = static_cast<float>(row.max);
    out.sum[r] = static_cast<float>(sum);
}

inline void finish_masked_row(const TokenLogprobs& out, int64_t r) {
    out.logprobs[r] = out.entropy[r] = 0.0f;
    if (out.shift == nullptr) return;
    out.shift[r] = 0.0f;
    out.sum[r] = 1.0f;
}

template <class T, class Z>
void forward_rows(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
                  const TokenLogprobs& out, int64_t begin, int64_t end) {
    T buffer[kTile];
    for (int64_t r = begin; r < end; ++r) {
        if (mask.hides(r)) {
            finish_masked_row(out, r);
            continue;
        }
        RowState row = kEmpty;
        fold_row(row, logits, static_cast<const T*>(logits.data) + logits.row(r), Z(transform, r), tokens[r], buffer);
        finish_row(row, out, r);
    }
}

template <class T, class Z>
void update_rows(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
                 int64_t first_column, RowState* states, int64_t begin, int64_t end) {
    T buffer[kTile];
    for (int64_t r = begin; r < end; ++r) {
        if (mask.hides(r)) continue;
        if (first_column == 0) states[r] = kEmpty;
        fold_row(states[r], logits, static_cast<const T*>(logits.data) + logits.row(r), Z(transform, r),
                 tokens[r] - first_column, buffer);
    }
}

// d logprob / dz_v = [v = token] - p_v and d entropy / dz_v = -p_v (log p_v + entropy); together, with upstream
// gradients, p_v (slope log p_v + intercept) and at the token the first of them besides; d log sum / dz_v = p_v.
template <class Z>
struct RowGradient {
    const Z& z;
    f32x16 shift, inverse_sum, log_sum, slope, intercept;

    RowGradient(const Z& form, const TokenLogprobs& results, int64_t r, float grad_logprob, float grad_entropy,
                float grad_log_sum)
        : z(form),
          shift(set1(results.shift[r])),
          inverse_sum(set1(1.0f / results.sum[r])),
          log_sum(set1(static_cast<float>(std::log(static_cast<double>(results.sum[r]))))),
          slope(set1(-grad_entropy)),
          intercept(set1(grad_log_sum - grad_logprob - grad_entropy * results.entropy[r])) {}

    SIMD_INLINE f32x16 at(f32x16 x, f32x16 added) const {
        const f32x16 d = max(set1(kLeast), sub(z.z(x), shift));
        const f32x16 p = mul(exp(d), inverse_sum);
        return z.chain(fma(p, fma(slope, sub(d, log_sum), intercept), added), x);
    }
};

template <class T, class Z>
void gradient_rows(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
                   int64_t first_column, const TokenLogprobs& results, const float* grad_logprobs,
                   const float* grad_entropy, const float* grad_log_sum, const float* grad_each, T* out, int64_t begin,
                   int64_t end) {
    T buffer[kTile];
    const auto of = [](const float* grad, int64_t r) { return grad != nullptr ? grad[r] : 0.0f; };
    for (int64_t r = begin; r < end; ++r) {
        T* to = out + r * logits.columns;
        if (mask.hides(r)) {
            std::memset(static_cast<void*>(to), 0, static_cast<size_t>(logits.columns) * sizeof(T));
            continue;
        }
        const T* x = static_cast<const T*>(logits.data) + logits.row(r);
        const Z z(transform, r);
        const float upstream = of(grad_logprobs, r);
        const RowGradient<Z> gradient(z, results, r, upstream, of(grad_entropy, r), of(grad_log_sum, r));
        const f32x16 each = set1(of(grad_each, r));
        const int64_t token = tokens[r] - first_column;
        const bool token_here = token >= 0 && token < logits.columns;
        f32x16 at_token = each;  // computed before the sweep, which may overwrite the logits
        if (token_here)
            at_token = gradient.at(set1(to_float(x[token * logits.column_stride])), add(each, set1(upstream)));
        for (int64_t column = 0; column < logits.columns; column += kTile) {
            const int64_t n = logits.columns - column < kTile ? logits.columns - column : kTile;
            const T* from = contiguous(x + column * logits.column_stride, n, logits.column_stride, buffer);
            int64_t i = 0;
            for (; i + kLanes <= n; i += kLanes) store16(to + column + i, gradient.at(load16(from + i), each));
            if (i < n) store_first(to + column + i, n - i, gradient.at(load_first(from + i, n - i, 0.0f), each));
        }
        if (token_here) store_first(to + token, 1, at_token);
    }
}

void forward(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
             const TokenLogprobs& out, int64_t begin, int64_t end) {
    with_element_and_form(logits.dtype, transform, [&](auto element, auto form) {
        forward_rows<typename decltype(element)::type, typename decltype(form)::type>(logits, transform, tokens, mask,
                                                                                      out, begin, end);
    });
}

void update(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
            int64_t first_column, void* states, int64_t begin, int64_t end) {
    with_element_and_form(logits.dtype, transform, [&](auto element, auto form) {
        update_rows<typename decltype(element)::type, typename decltype(form)::type>(
            logits, transform, tokens, mask, first_column, static_cast<RowState*>(states), begin, end);
    });
}

void finish(const void* states, int64_t rows, const Mask& mask, const TokenLogprobs& out) {
    for (int64_t r = 0; r < rows; ++r) {
        if (mask.hides(r)) finish_masked_row(out, r);
        else finish_row(static_cast<const RowState*>(states)[r], out, r);
    }
}

void gradient(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
              int64_t first_column, const TokenLogprobs& results, const float* grad_logprobs, const float* grad_entropy,
              const float* grad_log_sum, const float* grad_each, void* out, int64_t begin, int64_t end) {
    with_element_and_form(logits.dtype, transform, [&](auto element, auto form) {
        using T = typename decltype(element)::type;
        gradient_rows<T, typename decltype(form)::type>(logits, transform, tokens, mask, first_column, results,
                                                        grad_logprobs, grad_entropy, grad_log_sum, grad_each,
                                                        static_cast<T*>(out), begin, end);
    });
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS

namespace rlhf_fast::cpu {
namespace {

void forward(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask, void*, int64_t,
             const TokenLogprobs& out, const Run& run) {
    const auto kernel = SIMD_CHOOSE(forward);
    parallel_rows(logits.rows, logits.columns, run.threads,
                  [&](int64_t begin, int64_t end) { kernel(logits, transform, tokens, mask, out, begin, end); });
}

void update(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
            int64_t first_column, void* states, int64_t, const Run& run) {
    const auto kernel = SIMD_CHOOSE(update);
    parallel_rows(logits.rows, logits.columns, run.threads, [&](int64_t begin, int64_t end) {
        kernel(logits, transform, tokens, mask, first_column, states, begin, end);
    });
}

void finish(const void* states, int64_t, int64_t rows, const Mask& mask, const TokenLogprobs& out, const Run&) {
    SIMD_CHOOSE(finish)(states, rows, mask, out);
}

void gradient(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
              int64_t first_column, const TokenLogprobs& results, const float* grad_logprobs, const float* grad_entropy,
              const float* grad_log_sum, const float* grad_each, void* out, const Run& run) {
    const auto kernel = SIMD_CHOOSE(gradient);
    parallel_rows(logits.rows, logits.columns, run.threads, [&](int64_t begin, int64_t end) {
        kernel(logits, transform, tokens, mask, first_column, results, grad_logprobs, grad_entropy, grad_log_sum,
               grad_each, out, begin, end);
    });
}

}  // namespace

const TokenLogprobsKernels token_logprobs = {forward, update, finish, gradient};

}  // namespace rlhf_fast::cpu

#endif  // SIMD_LAST_PASS
