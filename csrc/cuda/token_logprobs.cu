// token_logprobs in CUDA C++: log-probability and entropy of rows of logits, and their gradient.
//
// One block of 256 threads takes one segment of 8,192 columns of a row, 32 columns a thread, in registers: all its
// 16-byte loads are under way before the first is needed, and its only store is the segment's state of four floats. A
// second, small kernel brings a row's states together. Rows are cut the same way whatever their number, so a row gives
// the same bits in any batch, and few rows of a large vocabulary still fill the device. Logits are read once, and the
// gradient reads and writes once: 2 and 4 bytes a column in bfloat16.
#include "common/token_logprobs.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"
#include "cuda/transform.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int kSegment = kTokenLogprobsSegment;
template <class T>
constexpr int kLoads = kSegment / kThreads / kVector<T>;

// Largest z, sum of exp(z - largest), sum of exp(z - largest) (z - largest), and z of the token if it is in the
// segment.
using State = float4;

template <class T, Form form>
__global__ void __launch_bounds__(kThreads)
    update_kernel(Logits logits, Transform transform, Tokens tokens, Mask mask, int64_t first_column, uint32_t segments,
                  State* states, int64_t states_per_row) {
    __shared__ float scratch[3][kWarps];
    const uint32_t row = blockIdx.x / segments, part = blockIdx.x % segments;
    if (mask.hides(row)) return;
    const RowTransform<form> t(transform, row);
    const T* x = row_start<T>(logits, row);
    const int64_t begin = int64_t{part} * kSegment;

    float z[kLoads<T>][kVector<T>];
    load_segment(x, begin, logits.columns, logits.column_stride, z);
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLoads<T>; ++i) {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
            z[i][j] = t.z(z[i][j]);
            if (form == Form::capped && column_of<T>(begin, i) + j >= logits.columns)
                z[i][j] = -INFINITY;  // of which the soft cap has made a number
            largest = fmaxf(largest, z[i][j]);
        }
    }
    largest = reduce_block(largest, Max(), scratch[0]);

    const float shift = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kLoads<T>; ++i) {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
            const float d = below(z[i][j], shift), e = exp_of(d);
            sum += e;
            dot += e * d;
        }
    }
    sum = reduce_block(sum, Sum(), scratch[1]);
    dot = reduce_block(dot, Sum(), scratch[2]);

    if (threadIdx.x == 0) {
        const int64_t token = tokens[row] - first_column;
        const bool here = token >= begin && token < begin + kSegment && token < logits.columns;
        const float own = here ? t.z(widen(x[token * logits.column_stride])) : 0.0f;
        states[row * states_per_row + first_column / kSegment + part] = make_float4(largest, sum, dot, own);
    }
}

// One thread a row. In double, which costs nothing here, so that only the last rounding is left.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const State* states, int64_t states_per_row, int64_t rows, Mask mask, TokenLogprobs out) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= rows) return;
    float logprob = 0.0f, entropy = 0.0f, shift = 0.0f, total = 1.0f;
    if (!mask.hides(row)) {
        states += row * states_per_row;
        shift = -INFINITY;
        for (int64_t i = 0; i < states_per_row; ++i) shift = fmaxf(shift, states[i].x);
        double sum = 0.0, dot = 0.0, own = 0.0;
        for (int64_t i = 0; i < states_per_row; ++i) {
            const State state = states[i];
            own += static_cast<double>(state.w);
            if (state.y == 0.0f) continue;  // nothing but -inf
            const double d = static_cast<double>(state.x) - static_cast<double>(shift), factor = exp(d);
            sum += factor * static_cast<double>(state.y);
            dot += factor * (static_cast<double>(state.z) + static_cast<double>(state.y) * d);
        }
        if (sum == 0.0) sum = NAN;  // a row of nothing but -inf is no distribution
        const double log_sum = log(sum);
        logprob = static_cast<float>(own - static_cast<double>(shift) - log_sum);
        entropy = static_cast<float>(log_sum - dot / sum);
        total = static_cast<float>(sum);
    }
    out.logprobs[row] = logprob;
    out.entropy[row] = entropy;
    if (out.shift == nullptr) return;
    out.shift[row] = shift;
    out.sum[row] = total;
}

// d logprob / dz_v = [v = token] - p_v and d entropy / dz_v = -p_v (log p_v + entropy); together, with upstream
// gradients, p_v (slope log p_v + intercept) and at the token the first of them besides; d log sum / dz_v = p_v. out
// may be the logits' own memory: a thread reads each element before it writes it, and no other reads it.
template <class T, Form form>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Logits logits, Transform transform, Tokens tokens, Mask mask, int64_t first_column,
                    uint32_t segments, TokenLogprobs results, const float* grad_logprobs, const float* grad_entropy,
                    const float* grad_log_sum, const float* grad_each, T* out) {
    const uint32_t row = blockIdx.x / segments, part = blockIdx.x % segments;
    const int64_t begin = int64_t{part} * kSegment;
    float values[kLoads<T>][kVector<T>] = {};
    if (!mask.hides(row)) {
        const RowTransform<form> t(transform, row);
        load_segment(row_start<T>(logits, row), begin, logits.columns, logits.column_stride, values);
        const float shift = __ldg(results.shift + row), sum = __ldg(results.sum + row);
        const float inverse = 1.0f / sum, log_sum = logf(sum);
        const float upstream = grad_logprobs != nullptr ? __ldg(grad_logprobs + row) : 0.0f;
        const float slope = grad_entropy != nullptr ? -__ldg(grad_entropy + row) : 0.0f;
        const float of_log_sum = grad_log_sum != nullptr ? __ldg(grad_log_sum + row) : 0.0f;
        const float each = grad_each != nullptr ? __ldg(grad_each + row) : 0.0f;
        const float intercept = slope * __ldg(results.entropy + row) - upstream + of_log_sum;
        // Within the thread's part of the segment, if it is there.
        const int token = static_cast<int>(tokens[row] - first_column - column_of<T>(begin, 0));
#pragma unroll
        for (int i = 0; i < kLoads<T>; ++i) {
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) {
                const float raw = values[i][j], d = below(t.z(raw), shift), p = exp_of(d) * inverse;
                float gradient = p * (slope * (d - log_sum) + intercept) + each;
                if (i * kThreads * kVector<T> + j == token) gradient += upstream;
                values[i][j] = t.chain(gradient, raw);
            }
        }
    }
    store_segment(out + int64_t{row} * logits.columns, begin, logits.columns, values);
}

int64_t segments_of(const Logits& logits) { return (logits.columns + kSegment - 1) / kSegment; }

void update(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
            int64_t first_column, void* states, int64_t states_per_row, const Run& run) {
    const OnDevice guard(run);
    const int64_t segments = segments_of(logits);
    with_element(logits.dtype, [&](auto element) {
        with_form(transform, [&](auto form) {
            RLHF_FAST_LAUNCH((update_kernel<decltype(element), decltype(form)::value>), grid(logits.rows * segments),
                             kThreads, stream_of(run), logits, transform, tokens, mask, first_column,
                             static_cast<uint32_t>(segments), static_cast<State*>(states), states_per_row);
        });
    });
    check(cudaGetLastError(), "token_logprobs: update");
}

void finish(const void* states, int64_t states_per_row, int64_t rows, const Mask& mask, const TokenLogprobs& out,
            const Run& run) {
    const OnDevice guard(run);
    RLHF_FAST_LAUNCH(finish_kernel, grid((rows + kThreads - 1) / kThreads), kThreads, stream_of(run),
                     static_cast<const State*>(states), states_per_row, rows, mask, out);
    check(cudaGetLastError(), "token_logprobs: finish");
}

void forward(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask, void* states,
             int64_t states_per_row, const TokenLogprobs& out, const Run& run) {
    update(logits, transform, tokens, mask, 0, states, states_per_row, run);
    finish(states, states_per_row, logits.rows, mask, out, run);
}

void gradient(const Logits& logits, const Transform& transform, const Tokens& tokens, const Mask& mask,
              int64_t first_column, const TokenLogprobs& results, const float* grad_logprobs, const float* grad_entropy,
              const float* grad_log_sum, const float* grad_each, void* out, const Run& run) {
    const OnDevice guard(run);
    const int64_t segments = segments_of(logits);
    with_element(logits.dtype, [&](auto element) {
        with_form(transform, [&](auto form) {
            using T = decltype(element);
            RLHF_FAST_LAUNCH((gradient_kernel<T, decltype(form)::value>), grid(logits.rows * segments), kThreads,
                             stream_of(run), logits, transform, tokens, mask, first_column,
                             static_cast<uint32_t>(segments), results, grad_logprobs, grad_entropy, grad_log_sum,
                             grad_each, static_cast<T*>(out));
        });
    });
    check(cudaGetLastError(), "token_logprobs: gradient");
}

}  // namespace

const TokenLogprobsKernels token_logprobs = {forward, update, finish, gradient};

}  // namespace rlhf_fast::cuda
