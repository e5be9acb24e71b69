// full_kl in CUDA C++: KL or Jensen-Shannon divergence between two rows of logits, and its gradients.
//
// As in token_logprobs.cu, one block takes one segment of both rows in registers, here 4,096 columns, and a small
// kernel brings a row's segments together: with E over p, KL(p || q) = E[z_p - z_q] - log-sum-exp(z_p) +
// log-sum-exp(z_q), so both are read once. Jensen-Shannon needs the sums of both before its terms, hence a second pass.
// 4 bytes a column in bfloat16, 8 with the gradients of both.
#include "common/full_kl.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"
#include "cuda/transform.cuh"

namespace rlhf_fast::cuda {
namespace {

// Kernels are bound to two blocks of a multiprocessor, 128 registers a thread: left to itself, ptxas aims at 48 on
// sm_80 and spills.
constexpr int kSegment = kFullKLSegment;
template <class T>
constexpr int kLoads = kSegment / kThreads / kVector<T>;

constexpr double kLog2 = 0x1.62e42fefa39efp-1;

// What a segment adds to its row: references and sums of exp(z - reference) of both sides, z_q of p's likeliest word as
// the anchor, and the sum of exp(z_p - reference_p) ((z_p - reference_p) - (z_q - anchor)).
struct State {
    float reference_p, sum_p, reference_q, sum_q, anchor, dot;
};
static_assert(sizeof(State) == kFullKLState * sizeof(float));

// The same for Jensen-Shannon, in the same memory once the row's sums are known: each side's Terms.
struct JSState {
    float above[2], near[2], far[2];
};
static_assert(sizeof(JSState) == kFullKLState * sizeof(float));

// A thread's part of a segment, of one side: the raw logits, -inf past the end.
template <class T>
struct Part {
    float x[kLoads<T>][kVector<T>];
    __device__ Part(const Logits& logits, uint32_t row, int64_t begin) {
        load_segment(row_start<T>(logits, row), begin, logits.columns, logits.column_stride, x);
    }
};

// body(i, j, whether the column exists) for each of a thread's elements.
template <class T, class Body>
__device__ inline void for_each(int64_t begin, int64_t columns, const Body& body) {
#pragma unroll
    for (int i = 0; i < kLoads<T>; ++i) {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) body(i, j, column_of<T>(begin, i) + j < columns);
    }
}

// One side's softmax given its row's sums: from d = z - shift to p. For excluded words d is finite and p is 0.
struct Softmax {
    float shift, inverse;
    __device__ Softmax(float largest, float sum) : shift(largest), inverse(1.0f / sum) {}
    __device__ float d(float z) const { return below(z, shift); }
    __device__ float p(float d) const { return exp_of(d) * inverse; }
};

// What log p - log m and log q - log m are above a level, with m = (p + q) / 2. With s the smaller over the larger of p
// and q they are log(2 / (1 + s)), less the difference of the logarithms for the smaller one. Where p and q are near
// each other (s >= 1/2) the level is 0, and elsewhere log 2: so that what is small is computed as such, and keeps its
// digits.
struct AboveLevel {
    float p, q;
    bool far;  // the level is log 2

    // apart = log p - log q. log1p(x) = 2 atanh(x / (2 + x)), with x = (1 - s) / (1 + s) where near and s elsewhere.
    __device__ explicit AboveLevel(float apart) {
        const float s = exp_of(-fabsf(apart));
        far = s < 0.5f;
        const float a = (far ? -s : 1.0f - s) / (s + (far ? 2.0f : 3.0f)), a2 = a * a;
        float series = 0x1.37158ep-3f * a2 + 0x1.9928c0p-3f;  // atanh(a) = a + a^3 series, by Remez: 3e-9
        series = series * a2 + 0x1.5555b6p-2f;
        const float log = 2.0f * a * a2 * series + 2.0f * a;
        p = log + fminf(apart, 0.0f);
        q = log + fminf(-apart, 0.0f);
    }
};

// Sums over a row of one side's terms of KL(side || m): probability times what is above the level, and the
// probabilities at either level.
struct Terms {
    double above = 0.0, near = 0.0, far = 0.0;
    // KL(side || m), and that less log 2: of two sums that nearly cancel, each avoids the one of large terms.
    __device__ float mean() const { return static_cast<float>(above + kLog2 * far); }
    __device__ float rest() const { return static_cast<float>(above - kLog2 * near); }
    __device__ double divergence() const { return far > near ? kLog2 + (above - kLog2 * near) : above + kLog2 * far; }
};

template <class T, Form form>
__global__ void __launch_bounds__(kThreads, 2)
    states_kernel(Logits p, Logits q, Transform transform, Mask mask, uint32_t segments, State* states) {
    __shared__ float scratch[6][kWarps];
    const uint32_t row = blockIdx.x / segments;
    if (mask.hides(row)) return;
    const int64_t begin = int64_t{blockIdx.x % segments} * kSegment;
    const RowTransform<form> t(transform, row);
    Part<T> of_p(p, row, begin), of_q(q, row, begin);
    float largest_p = -INFINITY, largest_q = -INFINITY;
    for_each<T>(begin, p.columns, [&](int i, int j, bool inside) {
        of_p.x[i][j] = inside ? t.z(of_p.x[i][j]) : -INFINITY;  // a soft cap makes a number of -inf
        of_q.x[i][j] = inside ? t.z(of_q.x[i][j]) : -INFINITY;
        largest_p = fmaxf(largest_p, of_p.x[i][j]);
        largest_q = fmaxf(largest_q, of_q.x[i][j]);
    });
    largest_p = reduce_block(largest_p, Max(), scratch[0]);
    largest_q = reduce_block(largest_q, Max(), scratch[1]);

    float anchor = -INFINITY;
    for_each<T>(begin, p.columns, [&](int i, int j, bool) {
        if (of_p.x[i][j] == largest_p) anchor = fmaxf(anchor, of_q.x[i][j]);
    });
    anchor = reduce_block(anchor, Max(), scratch[5]);

    State state = {};
    state.reference_p = largest_p == -INFINITY ? 0.0f : largest_p;
    state.reference_q = largest_q == -INFINITY ? 0.0f : largest_q;
    state.anchor = anchor == -INFINITY ? 0.0f : anchor;
    for_each<T>(begin, p.columns, [&](int i, int j, bool) {
        const float d_p = below(of_p.x[i][j], state.reference_p), e_p = exp_of(d_p), z_q = of_q.x[i][j];
        state.sum_p += e_p;
        state.sum_q += exp_of(z_q - state.reference_q);
        if (e_p > 0.0f)
            state.dot += e_p * (d_p - (z_q - state.anchor));  // where p is 0, so is the term, whatever z_q is
    });
    state.sum_p = reduce_block(state.sum_p, Sum(), scratch[2]);
    state.sum_q = reduce_block(state.sum_q, Sum(), scratch[3]);
    state.dot = reduce_block(state.dot, Sum(), scratch[4]);
    if (threadIdx.x == 0) states[blockIdx.x] = state;
}

// A row's reference over its segments and its sum of exp(z - reference); nan for a row of nothing but -inf.
struct Side {
    float shift = -INFINITY;
    double sum = 0.0;

    __device__ void look(float reference, float part) {
        if (part != 0.0f) shift = fmaxf(shift, reference);
    }
    // What the segment's sums shrink by.
    __device__ double add(float reference, float part) {
        if (part == 0.0f) return 0.0;
        const double factor = exp(static_cast<double>(reference) - static_cast<double>(shift));
        sum += factor * static_cast<double>(part);
        return factor;
    }
    __device__ void finish() {
        if (sum == 0.0) sum = NAN;
        if (shift == -INFINITY) shift = 0.0f;
    }
};

__global__ void __launch_bounds__(kThreads, 2)
    finish_kernel(const State* states, int64_t segments, int64_t rows, Mask mask, FullKL out) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= rows) return;
    if (mask.hides(row)) {
        out.divergence[row] = out.shift_p[row] = out.shift_q[row] = 0.0f;
        out.mean_p[row] = out.rest_p[row] = out.mean_q[row] = out.rest_q[row] = 0.0f;
        out.sum_p[row] = out.sum_q[row] = 1.0f;
        return;
    }
    states += row * segments;
    Side p, q;
    for (int64_t i = 0; i < segments; ++i) {
        p.look(states[i].reference_p, states[i].sum_p);
        q.look(states[i].reference_q, states[i].sum_q);
    }
    double anchor = 0.0, dot = 0.0;
    for (int64_t i = 0; i < segments; ++i)
        if (states[i].sum_p != 0.0f && states[i].reference_p == p.shift) anchor = static_cast<double>(states[i].anchor);
    for (int64_t i = 0; i < segments; ++i) {
        const State state = states[i];
        q.add(state.reference_q, state.sum_q);
        const double factor = p.add(state.reference_p, state.sum_p);
        if (factor == 0.0) continue;
        const double moved = (static_cast<double>(state.reference_p) - static_cast<double>(p.shift)) -
                             (static_cast<double>(state.anchor) - anchor);
        dot += factor * (static_cast<double>(state.dot) + static_cast<double>(state.sum_p) * moved);
    }
    p.finish();
    q.finish();
    const double mean = dot / p.sum;
    const double to_anchor = static_cast<double>(q.shift) - anchor;
    out.divergence[row] = static_cast<float>(mean + to_anchor - log(p.sum) + log(q.sum));
    out.mean_p[row] = static_cast<float>(mean);
    out.rest_p[row] = static_cast<float>(mean - static_cast<double>(out.mean_p[row]));
    out.mean_q[row] = static_cast<float>(anchor);
    out.rest_q[row] = 0.0f;
    out.shift_p[row] = p.shift;
    out.sum_p[row] = static_cast<float>(p.sum);
    out.shift_q[row] = q.shift;
    out.sum_q[row] = static_cast<float>(q.sum);
}

template <class T, Form form>
__global__ void __launch_bounds__(kThreads, 2) js_states_kernel(Logits p, Logits q, Transform transform, Mask mask,
                                                                uint32_t segments, FullKL results, JSState* states) {
    __shared__ float scratch[6][kWarps];
    const uint32_t row = blockIdx.x / segments;
    if (mask.hides(row)) return;
    const int64_t begin = int64_t{blockIdx.x % segments} * kSegment;
    const RowTransform<form> t(transform, row);
    const Part<T> of_p(p, row, begin), of_q(q, row, begin);
    const Softmax softmax_p(__ldg(results.shift_p + row), __ldg(results.sum_p + row)),
        softmax_q(__ldg(results.shift_q + row), __ldg(results.sum_q + row));
    const float log_ratio = logf(__ldg(results.sum_p + row) / __ldg(results.sum_q + row));
    JSState state = {};
    for_each<T>(begin, p.columns, [&](int i, int j, bool inside) {
        const float d_p = softmax_p.d(t.z(of_p.x[i][j])), d_q = softmax_q.d(t.z(of_q.x[i][j]));
        const AboveLevel level(d_p - d_q - log_ratio);
        const float p_v = inside ? softmax_p.p(d_p) : 0.0f, q_v = inside ? softmax_q.p(d_q) : 0.0f;
        state.above[0] += p_v * level.p;
        state.above[1] += q_v * level.q;
        state.near[0] += level.far ? 0.0f : p_v;
        state.near[1] += level.far ? 0.0f : q_v;
        state.far[0] += level.far ? p_v : 0.0f;
        state.far[1] += level.far ? q_v : 0.0f;
    });
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        state.above[side] = reduce_block(state.above[side], Sum(), scratch[3 * side]);
        state.near[side] = reduce_block(state.near[side], Sum(), scratch[3 * side + 1]);
        state.far[side] = reduce_block(state.far[side], Sum(), scratch[3 * side + 2]);
    }
    if (threadIdx.x == 0) states[blockIdx.x] = state;
}

__global__ void __launch_bounds__(kThreads, 2)
    js_finish_kernel(const JSState* states, int64_t segments, int64_t rows, Mask mask, FullKL out) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= rows || mask.hides(row)) return;
    Terms terms[2];
    for (int64_t i = row * segments; i < (row + 1) * segments; ++i) {
        const JSState state = states[i];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            terms[side].above += static_cast<double>(state.above[side]);
            terms[side].near += static_cast<double>(state.near[side]);
            terms[side].far += static_cast<double>(state.far[side]);
        }
    }
    out.divergence[row] = static_cast<float>(0.5 * (terms[0].divergence() + terms[1].divergence()));
    out.mean_p[row] = terms[0].mean();
    out.rest_p[row] = terms[0].rest();
    out.mean_q[row] = terms[1].mean();
    out.rest_q[row] = terms[1].rest();
}

// kl: d/dz_p = p (log p - log q - KL), in which the logarithms of the sums cancel: it is p (far - E[far]) with
// far = (z_p - shift_p) - (z_q - anchor); and d/dz_q = q - p.
// js: d/dz_p = p (log p - log m - KL(p || m)) / 2, and the same of q.
template <class T, Form form, Divergence kind>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(Logits p, Logits q, Transform transform, Mask mask, uint32_t segments, FullKL results,
                    const float* grad, T* out_p, T* out_q) {
    const uint32_t row = blockIdx.x / segments;
    const int64_t begin = int64_t{blockIdx.x % segments} * kSegment;
    float g_p[kLoads<T>][kVector<T>] = {}, g_q[kLoads<T>][kVector<T>] = {};
    if (!mask.hides(row)) {
        const RowTransform<form> t(transform, row);
        const Part<T> of_p(p, row, begin), of_q(q, row, begin);
        const Softmax softmax_p(__ldg(results.shift_p + row), __ldg(results.sum_p + row));
        const Softmax softmax_q(__ldg(results.shift_q + row), __ldg(results.sum_q + row));
        const float mean_p = __ldg(results.mean_p + row), rest_p = __ldg(results.rest_p + row);
        const float mean_q = __ldg(results.mean_q + row), rest_q = __ldg(results.rest_q + row);
        const float log_ratio = logf(__ldg(results.sum_p + row) / __ldg(results.sum_q + row));
        const float upstream = kind == Divergence::js ? 0.5f * __ldg(grad + row) : __ldg(grad + row);
        for_each<T>(begin, p.columns, [&](int i, int j, bool) {
            const float x_p = of_p.x[i][j], x_q = of_q.x[i][j], z_q = t.z(x_q);
            const float d_p = softmax_p.d(t.z(x_p)), d_q = softmax_q.d(z_q), p_v = softmax_p.p(d_p),
                        q_v = softmax_q.p(d_q);
            float a, b;
            if (kind == Divergence::js) {
                const AboveLevel level(d_p - d_q - log_ratio);
                a = p_v * (level.p - (level.far ? rest_p : mean_p));
                b = q_v * (level.q - (level.far ? rest_q : mean_q));
            } else {  // log q may be -inf where p is 0
                a = p_v > 0.0f ? p_v * (d_p - (z_q - mean_q) - mean_p - rest_p) : 0.0f;
                b = q_v - p_v;
            }
            g_p[i][j] = t.chain(upstream * a, x_p);
            g_q[i][j] = t.chain(upstream * b, x_q);
        });
    }
    const int64_t to = int64_t{row} * p.columns;
    if (out_p != nullptr) store_segment(out_p + to, begin, p.columns, g_p);
    if (out_q != nullptr) store_segment(out_q + to, begin, p.columns, g_q);
}

void forward(const Logits& p, const Logits& q, const Transform& transform, const Mask& mask, Divergence kind,
             float* scratch, const FullKL& out, const Run& run) {
    const OnDevice guard(run);
    const int64_t segments = (p.columns + kSegment - 1) / kSegment;
    const unsigned int blocks = grid(p.rows * segments), row_blocks = grid((p.rows + kThreads - 1) / kThreads);
    State* states = reinterpret_cast<State*>(scratch);
    JSState* js_states = reinterpret_cast<JSState*>(scratch);
    with_element(p.dtype, [&](auto element) {
        with_form(transform, [&](auto form) {
            constexpr Form kForm = decltype(form)::value;
            using T = decltype(element);
            RLHF_FAST_LAUNCH((states_kernel<T, kForm>), blocks, kThreads, stream_of(run), p, q, transform, mask,
                             static_cast<uint32_t>(segments), states);
            RLHF_FAST_LAUNCH(finish_kernel, row_blocks, kThreads, stream_of(run), states, segments, p.rows, mask, out);
            if (kind == Divergence::kl) return;
            RLHF_FAST_LAUNCH((js_states_kernel<T, kForm>), blocks, kThreads, stream_of(run), p, q, transform, mask,
                             static_cast<uint32_t>(segments), out, js_states);
            RLHF_FAST_LAUNCH(js_finish_kernel, row_blocks, kThreads, stream_of(run), js_states, segments, p.rows, mask,
                             out);
        });
    });
    check(cudaGetLastError(), "full_kl: forward");
}

void gradient(const Logits& p, const Logits& q, const Transform& transform, const Mask& mask, Divergence kind,
              const FullKL& results, const float* grad, void* out_p, void* out_q, const Run& run) {
    const OnDevice guard(run);
    const int64_t segments = (p.columns + kSegment - 1) / kSegment;
    with_element(p.dtype, [&](auto element) {
        with_form(transform, [&](auto form) {
            using T = decltype(element);
            constexpr Form kForm = decltype(form)::value;
            const auto launch = [&](auto kernel) {
                RLHF_FAST_LAUNCH(kernel, grid(p.rows * segments), kThreads, stream_of(run), p, q, transform, mask,
                                 static_cast<uint32_t>(segments), results, grad, static_cast<T*>(out_p),
                                 static_cast<T*>(out_q));
            };
            if (kind == Divergence::js) launch(gradient_kernel<T, kForm, Divergence::js>);
            else launch(gradient_kernel<T, kForm, Divergence::kl>);
        });
    });
    check(cudaGetLastError(), "full_kl: gradient");
}

}  // namespace

const FullKLKernels full_kl = {forward, gradient};

}  // namespace rlhf_fast::cuda
